"""Which rows a recipe trains on: mixtures, general knowledge, held-out rows, bad rows, streams."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import script
from stepladder.data import audit, mixture
from stepladder.data.rows import SHUFFLE_BUFFER, Rows, Stream
from stepladder.errors import DataError
from stepladder.recipe.load import load as load_recipe

Load = Callable[..., "tuple[Rows, Rows | None]"]


@pytest.fixture
def load(write_recipe: Callable[..., Path]) -> Load:
    """Load the data of a recipe of these keys, as the scripts do."""

    def load(**keys: Any) -> Any:
        return mixture.load(load_recipe(str(write_recipe(**keys)), []))

    return load


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    """Write a set of so many rows, each of them unlike all others."""

    def make(name: str, count: int, question: str = "input", answer: str = "output") -> str:
        rows = [{question: f"Question {n} of {name}?", answer: f"Answer {n} of {name}."} for n in range(count)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return make


def answers(rows: Any) -> list[str]:
    return [example["messages"][-1]["content"] for example in rows.examples]


def per_set(texts: list[str]) -> dict[str, int]:
    return dict(Counter(text.rstrip(".").split(" of ")[-1] for text in texts))


def test_sets_are_joined_whole_and_in_order(load: Load, make: Callable[..., str]) -> None:
    """Guards against a mixture that loses or reorders rows where no share was asked for."""
    train, _ = load(datasets=[{"path": make("a", 3)}, {"path": "json", "data_files": make("b", 2)}])
    assert per_set(answers(train)) == {"a": 3, "b": 2}
    assert answers(train)[0] == "Answer 0 of a." and answers(train)[-1] == "Answer 1 of b."
    assert [(s["rows"], s["of"], s["share"]) for s in train.fingerprint()["sets"]] == [(3, 3, 0.6), (2, 2, 0.4)]


def test_weights_limit_by_the_scarcest_set(load: Load, make: Callable[..., str]) -> None:
    """Guards against a weight that repeats rows, or gives another share than it says."""
    sets = [{"path": make("a", 100), "weight": 3}, {"path": make("b", 20), "weight": 1}]
    train, _ = load(datasets=sets)
    assert per_set(answers(train)) == {"a": 60, "b": 20}
    assert len(set(answers(train))) == 80
    assert [s["share"] for s in train.fingerprint()["sets"]] == [0.75, 0.25]
    assert any("60 of the 100 rows" in note for note in train.notes)


def test_weights_draw_by_the_seed(load: Load, make: Callable[..., str]) -> None:
    """Guards against samples that change from run to run, or that the seed does not change."""
    sets = [{"path": make("a", 100), "weight": 1}, {"path": make("b", 20), "weight": 1}]
    first, again, other = (load(datasets=sets, seed=seed)[0] for seed in (1, 1, 2))
    assert first.fingerprint() == again.fingerprint()
    assert answers(first) != answers(other)
    assert answers(first)[:20] != [f"Answer {n} of a." for n in range(20)]


def test_fractions_mean_what_trl_documents(load: Load, make: Callable[..., str]) -> None:
    """Guards against other rows than `trl.get_dataset` takes: a set's first ones, capped by the scarcest."""
    from trl import DatasetMixtureConfig, get_dataset

    sets = [{"path": "json", "data_files": make(name, count)} for name, count in (("a", 50), ("b", 30), ("c", 7))]
    sets = [{**block, "fraction": share} for block, share in zip(sets, (0.5, 0.2, 0.1), strict=True)]
    train, _ = load(datasets=sets)
    theirs = get_dataset(DatasetMixtureConfig(datasets=[dict(block) for block in sets]))["train"]
    assert answers(train) == theirs["output"][:]


def test_counts(load: Load, make: Callable[..., str]) -> None:
    """Guards against `rows` that takes fewer rows than it says, or the same ones twice."""
    train, _ = load(
        datasets=[{"path": make("a", 50), "rows": 5}, {"path": make("b", 4)}, {"path": make("c", 8), "rows": 0.5}]
    )
    assert per_set(answers(train)) == {"a": 5, "b": 4, "c": 4} and len(set(answers(train))) == 13


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"weight": 1}, {}, "4:3: 'weight' is missing for .*b.jsonl"),
        ({"fraction": 0.5}, {"weight": 1}, "4:3: 'fraction' is missing for"),
        ({"weight": 1, "rows": 2}, {"weight": 1}, "4:3: 'rows' beside 'weight'"),
        ({"rows": 11}, {}, "3:3: 11 rows of .*a.jsonl, which has 10"),
        ({"rows": 0.01}, {}, "3:3: 0 rows of .*a.jsonl, which has 10"),
    ],
)
def test_shares_that_cannot_be_had(
    first: dict[str, Any], second: dict[str, Any], message: str, load: Load, make: Callable[..., str]
) -> None:
    """Guards against shares that are quietly ignored or made up."""
    with pytest.raises(DataError, match=rf"recipe.yaml:{message}"):
        load(datasets=[{"path": make("a", 10), **first}, {"path": make("b", 10), **second}])


def test_each_set_has_its_columns_and_split(load: Load, make: Callable[..., str], tmp_path: Path) -> None:
    """Guards against one set's column map or split being applied to another."""
    (tmp_path / "folder").mkdir()
    for split in ("train", "test"):
        Path(make(split, 2, "question", "answer")).rename(tmp_path / "folder" / f"{split}.jsonl")
    sets = [
        {"path": make("a", 2, "frage", "antwort"), "column_map": {"input": "frage", "output": "antwort"}},
        {"path": str(tmp_path / "folder"), "split": "test"},
    ]
    train, _ = load(datasets=sets)
    assert per_set(answers(train)) == {"a": 2, "test": 2}


def test_the_recipes_column_map(load: Load, make: Callable[..., str]) -> None:
    """Guards the recipe's own map; a set that has the new names already is taken as it is."""
    keys = {"column_map": {"input": "frage", "output": "antwort"}, "eval_dataset_name": make("e", 1)}
    train, evaluation = load(dataset_name=make("a", 2, "frage", "antwort"), eval_strategy="epoch", **keys)
    assert evaluation and len(train) == 2 and len(evaluation) == 1
    with pytest.raises(DataError, match=r"'frage', which is not there(.|\n)*'fragen'(.|\n)*did you mean 'fragen'"):
        load(dataset_name=make("b", 2, "fragen", "antwort"), column_map={"input": "frage", "output": "antwort"})
    with pytest.raises(DataError, match=r"recipe.yaml:(.|\n)*'imput'(.|\n)*did you mean 'input'"):
        load(dataset_name=make("c", 2), column_map={"imput": "input"})


def test_columns_selects(load: Load, tmp_path: Path) -> None:
    """Guards TRL's `columns`: a row of two shapes is read by the columns that were chosen."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"input": "a", "output": "b", "question": "c", "answer": "d"}\n')
    train, _ = load(datasets=[{"path": str(file), "columns": ["input", "output"]}])
    assert answers(train) == ["b"]
    with pytest.raises(DataError, match=r"columns names 'outputs'(.|\n)*did you mean 'output'"):
        load(datasets=[{"path": str(file), "columns": ["input", "outputs"]}])


@pytest.mark.parametrize(("rows", "share", "added"), [(72, 0.1, 8), (72, 0.2, 18), (90, 0.5, 90)])
def test_general_knowledge_is_that_share_of_the_whole(
    rows: int, share: float, added: int, load: Load, make: Callable[..., str]
) -> None:
    """Guards against a share of the task's rows instead of the whole, and against repeated rows."""
    train, _ = load(dataset_name=make("a", rows), mix_general=share)
    assert len(train) == rows + added and len(set(answers(train))) == len(train)
    assert train.sets[1]["name"] == "data/general.jsonl"
    assert abs(train.sets[1]["share"] - share) < 0.006
    assert load(dataset_name=make("a", rows), mix_general=share)[0].fingerprint() == train.fingerprint()


def test_too_few_general_rows(load: Load, make: Callable[..., str]) -> None:
    """Guards against repeating general rows, which would be learnt by heart; the largest share is one that works."""
    name = make("a", 1000)
    with pytest.raises(
        DataError, match=r"mix_general 0.4 of 1,000 rows needs 667(.|\n)*mix_general: (0\.\d+) at most"
    ) as e:
        load(dataset_name=name, mix_general=0.4)
    largest = float(e.value.help.split()[1])
    train, _ = load(dataset_name=name, mix_general=largest)
    assert train.sets[1]["rows"] >= train.sets[1]["of"] - 2
    with pytest.raises(DataError, match="needs 0 general rows"):
        load(dataset_name=make("b", 2), mix_general=0.1)


def test_the_general_rows_themselves() -> None:
    """Guards the shipped file: enough rows, no double, no overlap with the workshop's data, no emoji."""
    general = mixture.from_name("data/general.jsonl")
    assert len(general) >= 120 and not general.skipped
    questions = [example["messages"][0]["content"] for example in general.examples]
    assert len(set(questions)) == len(set(answers(general))) == len(general)
    for name in ("data/techco.jsonl", "data/techco_eval.jsonl"):
        others = mixture.from_name(name)
        assert not {example["messages"][0]["content"] for example in others.examples} & set(questions)
    for example in general.examples:
        question, answer = (turn["content"] for turn in example["messages"])
        assert len(question) >= 10 and 20 <= len(answer) <= 400
        assert all(ord(character) < 0x2190 or character == "−" for character in question + answer), answer


def test_held_out_rows(load: Load, make: Callable[..., str]) -> None:
    """Guards against rows that are trained and evaluated on, and against general rows in the evaluation."""
    keys = {"datasets": [{"path": make("a", 60)}, {"path": make("b", 40)}], "mix_general": 0.1}
    train, held_out = load(test_split_size=0.2, eval_strategy="epoch", **keys)
    assert held_out and len(held_out) == 20 and len(train) == 80 + 9
    assert not set(answers(train)) & set(answers(held_out))
    assert set(per_set(answers(held_out))) == {"a", "b"}
    assert sum(s["rows"] for s in held_out.sets) == 20
    again = load(test_split_size=20, eval_strategy="epoch", **keys)
    assert [rows.fingerprint() for rows in again if rows] == [train.fingerprint(), held_out.fingerprint()]
    with pytest.raises(DataError, match=r"test_split_size 100\.0 of 100 rows leaves one side empty"):
        load(test_split_size=100, **keys)


def test_what_is_evaluated_on(load: Load, make: Callable[..., str], tmp_path: Path) -> None:
    """Guards against an evaluation on nothing, or on another set than was named."""
    a = make("a", 3)
    with pytest.raises(DataError, match="nothing to evaluate on"):
        load(dataset_name=a, eval_strategy="epoch")
    (tmp_path / "folder").mkdir()
    for split in ("train", "test"):
        Path(make(split, 2)).rename(tmp_path / "folder" / f"{split}.jsonl")
    train, evaluation = load(dataset_name=str(tmp_path / "folder"), eval_strategy="epoch")
    assert (per_set(answers(train)), per_set(answers(evaluation))) == ({"train": 2}, {"test": 2})
    _, evaluation = load(dataset_name=a, eval_strategy="epoch", eval_dataset_name=str(tmp_path / "folder"))
    assert per_set(answers(evaluation)) == {"test": 2}


GOOD = '{"input": "Why?", "output": "Because."}\n'


def test_the_first_bad_row_stops_and_the_rest_are_counted(load: Load, tmp_path: Path) -> None:
    """Guards against a message that hides whether one line or the whole file is wrong."""
    file = tmp_path / "a.jsonl"
    file.write_text(
        GOOD * 3 + '{"input": "half\n' + GOOD + '{"input": "Why?", "output": 7}\n{"text": "another shape"}\n'
    )
    with pytest.raises(
        DataError,
        match=r"a.jsonl:4:11: invalid JSON(.|\n)*2 more bad rows follow, the next at .*:6(.|\n)*on_bad_row: skip",
    ):
        load(dataset_name=str(file))
    file.write_text(GOOD + "broken\n" * 500)
    with pytest.raises(DataError, match="at least 20 more bad rows follow"):
        load(dataset_name=str(file))


def test_bad_rows_are_skipped_counted_and_listed(load: Load, tmp_path: Path) -> None:
    """Guards against rows that vanish: each that is left out is named, and the run's record has them."""
    file = tmp_path / "a.jsonl"
    bad = ['{"input": "half', '{"input": "Why?", "output": null}', '{"text": "another shape"}', "[1]", "\udcff"]
    file.write_text("\n".join(bad) + "\n" + GOOD * 4, errors="surrogateescape")
    train, _ = load(dataset_name=str(file), on_bad_row="skip")
    assert len(train) == 4
    assert [line.removeprefix(str(file)).split(":")[1] for line in train.skipped] == ["1", "2", "3", "4", "5"]
    assert train.fingerprint()["skipped"] == 5 and train.fingerprint()["skipped_rows"] == train.skipped
    assert any("5 bad rows" in note for note in train.notes)
    file.write_text(GOOD.replace("Because.", "") * 3)
    with pytest.raises(DataError, match=r"no row of .* can be used(.|\n)*all 3 are bad(.|\n)*fill it in$"):
        load(dataset_name=str(file), on_bad_row="skip")


def test_a_row_of_another_shape_is_the_odd_one_even_at_the_top(load: Load, tmp_path: Path) -> None:
    """Guards against one odd first row that makes all the others wrong."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "A title line."}\n' + GOOD * 9)
    with pytest.raises(DataError, match=r"a.jsonl:1: columns 'text', while the rows of this set have input \+ output"):
        load(dataset_name=str(file))


def test_a_bad_mixture_through_the_command_line(
    tiny: Path, make: Callable[..., str], write_recipe: Callable[..., Path]
) -> None:
    """Guards against shares that the library refuses and the script turns into a traceback."""
    sets = [{"path": make("a", 10), "weight": 1}, {"path": make("b", 10)}]
    done = script("sft", "--recipe", write_recipe(model_name_or_path=str(tiny), datasets=sets))
    assert done.code == 2 and "Traceback" not in done.err, done
    assert "'weight' is missing for" in done.err and "recipe.yaml:5:3" in done.err, done


def passes(stream: Stream, epoch: int = 0) -> list[str]:
    return [example["messages"][-1]["content"] for example, _ in stream.read(epoch)]


def test_a_stream_gives_the_rows_that_loading_gives(load: Load, make: Callable[..., str]) -> None:
    """Guards against a stream that loses rows, or whose order is not the seed's and the epoch's alone."""
    sets = [{"path": make("a", 30)}, {"path": make("b", 20)}]
    held, (stream, _), (again, _), (other, _) = (
        load(datasets=sets)[0],
        load(datasets=sets, streaming=True),
        load(datasets=sets, streaming=True),
        load(datasets=sets, streaming=True, seed=7),
    )
    assert isinstance(stream, Stream)
    assert sorted(passes(stream)) == sorted(answers(held))
    assert passes(stream) == passes(stream) == passes(again)
    assert passes(stream) != passes(stream, epoch=1) and sorted(passes(stream, epoch=1)) == sorted(passes(stream))
    assert passes(stream) != passes(other)
    same = ("rows", "sha256", "skipped")
    assert {key: stream.fingerprint()[key] for key in same} == {key: held.fingerprint()[key] for key in same}


def test_a_stream_mixes_by_weight(load: Load, make: Callable[..., str]) -> None:
    """Guards against a stream that repeats the scarce set, or gives another share than the weights say."""
    sets = [{"path": make("a", 4000), "weight": 3}, {"path": make("b", 500), "weight": 1}]
    stream, _ = load(datasets=sets, streaming=True)
    texts = passes(stream)
    assert len(set(texts)) == len(texts) and per_set(texts)["b"] == 500
    shares = [s["share"] for s in stream.fingerprint()["sets"]]
    assert abs(shares[0] - 0.75) < 0.03 and sum(shares) == pytest.approx(1)
    assert sorted(passes(stream, epoch=3)) == sorted(texts)


def test_a_stream_is_read_lazily(load: Load, tmp_path: Path) -> None:
    """Guards against a stream that reads its file to the end before it gives the first row."""
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD * (SHUFFLE_BUFFER + 200) + "broken\n")
    stream, _ = load(dataset_name=str(file), dataset_streaming=True)
    rows = iter(stream)
    for _ in range(150):
        next(rows)
    with pytest.raises(DataError, match=r"a.jsonl:10201"):
        list(rows)
    with pytest.raises(DataError, match=r"a.jsonl:10201"):  # and found before the run, by the pass for its record
        stream.fingerprint()


def test_a_stream_skips_bad_rows_at_each_pass(load: Load, tmp_path: Path) -> None:
    """Guards against bad rows being counted once more at each epoch."""
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD * 2 + "broken\n")
    stream, _ = load(dataset_name=str(file), dataset_streaming=True, on_bad_row="skip")
    assert len(passes(stream)) == len(passes(stream, epoch=1)) == 2
    assert len(stream.skipped) == 1 and stream.fingerprint()["skipped"] == 1


@pytest.mark.parametrize("key", ["test_split_size", "mix_general", "fraction"])
def test_what_a_stream_cannot_do(key: str, load: Load, make: Callable[..., str]) -> None:
    """Guards against keys that a stream would ignore."""
    block = {"path": make("a", 10), **({"fraction": 1.0} if key == "fraction" else {})}
    with pytest.raises(DataError, match=f"{key} does not go with streaming"):
        load(datasets=[block], streaming=True, **({} if key == "fraction" else {key: 0.2}))


def test_the_text_column_may_have_another_name(tmp_path: Path) -> None:
    """Guards TRL's `dataset_text_field`, which would otherwise be a key without effect."""
    (tmp_path / "poems.jsonl").write_text('{"poem": "Roses are red, violets are blue."}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset_name: {tmp_path / 'poems.jsonl'}\ndataset_text_field: poem\n")
    train, _ = mixture.load(load_recipe(str(recipe), []))
    assert train.examples == [{"text": "Roses are red, violets are blue."}]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


UNUSED: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "metadata": (
        [{"input": "a", "output": "b", "id": 0, "tags": []}, {"input": "a", "output": "b", "id": 1, "tags": ["x"]}],
        ["columns that are not used: id (2 rows), tags (1 row)"],
    ),
    "reasoning": (
        [{"question": "a", "answer": "b", "reasoning": "c"}],
        ["columns that are not used: reasoning (1 row); column_map: {reasoning_content: reasoning} reads 'reasoning'"],
    ),
    "a system prompt under another name": (
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system_prompt": "c"}],
        ["columns that are not used: system_prompt (1 row); column_map: {system: system_prompt} reads 'system_prompt'"],
    ),
    "a system prompt that some rows have": (
        [{"input": "a", "output": "b", "system_message": "c"}, {"input": "a", "output": "b"}],
        ["columns that are not used: system_message (1 row); "
         "column_map: {system: system_message} reads 'system_message', once every row has it"],
    ),
    "system beside text": ([{"system": "a", "text": "b"}], ["columns that are not used: system (1 row)"]),
    "classes": (
        [{"text": "a", "label": "b"}],
        ["columns that are not used: label (1 row); column_map: {input: text, output: label} reads 'label'"],
    ),
    "classes as numbers": ([{"text": "a", "label": 0}], ["columns that are not used: label (1 row)"]),
    "a name that would steer a terminal": (
        [{"text": "a", "\x1b[2J": 1}], ["columns that are not used: '\\x1b[2J' (1 row)"],
    ),
    "more names than anybody reads": (
        [{"text": "a", **{f"c{n:02}": 1 for n in range(25)}}],
        [f"columns that are not used: {', '.join(f'c{n:02} (1 row)' for n in range(20))} and 5 more"],
    ),
    "all is used": (
        [{"instruction": "a", "input": "", "output": "b", "system": "c", "history": [], "tools": []}], [],
    ),
    "KTO": ([{"prompt": "a", "completion": "b", "label": True}], []),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSED)
def test_what_is_not_used_is_named_once_with_counts(name: str, load: Load, tmp_path: Path) -> None:
    """Guards against a column or key that is dropped without a word; the audit says it in the same words."""
    rows, notes = UNUSED[name]
    file = write(tmp_path, rows)
    train, _ = load(dataset_name=file)
    assert train.notes == [f"{file}: {note}" for note in notes]
    findings = audit.audit_source(file, audit.Limits(0, 0)).findings
    said = [f.what + f"; {f.help}" * bool(f.help) for f in findings if f.what.startswith(file)]
    assert said == train.notes


def test_keys_of_messages_are_named(load: Load, tmp_path: Path) -> None:
    """Guards keys that no meaning is known of. Training names those that its chat template does not read
    (tests/test_layout.py); a file by itself names them all.
    """
    asked = {"role": "user", "content": "a", "name": "Ann"}
    answer = {"role": "assistant", "content": "b", "mood": "calm", "weight": 1}
    file = write(tmp_path, [{"messages": [asked, answer]}])
    assert load(dataset_name=file)[0].notes == []
    said = [finding.what for finding in audit.audit_source(file, audit.Limits(0, 0)).findings]
    assert f"{file}: keys of messages that only the chat template may use: mood (1 message)" in said


def test_a_streams_first_rows_show_what_is_not_used(load: Load, tmp_path: Path) -> None:
    """Guards streams, whose rows nobody counts: what the first hundred show is said."""
    file = write(tmp_path, [{"text": f"Text {n}.", "id": n} for n in range(150)])
    stream, _ = load(dataset_name=file, streaming=True)
    assert stream.notes == [f"{file} (its first 100 rows): columns that are not used: id (100 rows)"]


def test_roles_by_other_names(load: Load, tmp_path: Path) -> None:
    """Guards `role_map`: of the recipe, of one set, in a stream, and a name in it that occurs nowhere."""
    talk = [{"from": "caller", "value": "Rome?"}, {"from": "bot", "value": "Sunny."}]
    file, other = write(tmp_path, [{"conversations": talk}]), write(tmp_path, [{"text": "Rome."}], "other.jsonl")
    expected = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny."}]
    roles = {"bot": "gpt", "caller": "user"}
    train, _ = load(dataset_name=file, role_map=roles)
    assert train.examples == [{"messages": expected}] and not train.notes
    sets = [{"path": file, "role_map": roles}, {"path": other}]
    train, _ = load(datasets=sets, role_map={"nobody": "user"})
    assert train.examples == [{"messages": expected}, {"text": "Rome."}]
    assert train.notes == [f"{other}: role_map names 'nobody', which no conversation has"]
    stream, _ = load(dataset_name=file, streaming=True, role_map=roles)
    assert [example for example, _ in stream] == [{"messages": expected}] and not stream.notes
    with pytest.raises(DataError, match=r"recipe.yaml:\d+:\d+: role_map maps to 'asistant'(.|\n)*mean 'assistant'"):
        load(dataset_name=file, role_map={"bot": "asistant"})


def test_rows_of_kto_train_the_good_answers_alone(load: Load, tmp_path: Path) -> None:
    """Guards against the training of answers that a person has marked as bad."""
    rows = [{"prompt": f"{n}?", "completion": f"{n}.", "label": n % 2 == 0} for n in range(4)]
    file = write(tmp_path, rows)
    with pytest.raises(DataError, match=r"rows.jsonl:2: the row's answer is marked as bad"):
        load(dataset_name=file)
    train, _ = load(dataset_name=file, on_bad_row="skip")
    assert answers(train) == ["0.", "2."] and [line.split(": ")[0] for line in train.skipped] == [
        f"{file}:2",
        f"{file}:4",
    ]
