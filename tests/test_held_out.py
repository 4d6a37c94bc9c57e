"""Held out means held out: what a run keeps of its rows, and what a comparison makes of rows that were trained on."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, manifest, run, script
from stepladder import run as run_folder
from stepladder.data import mixture
from stepladder.data.rows import Rows, row_key, row_keys
from stepladder.errors import DataError
from stepladder.evaluation import held_out, questions
from stepladder.model import card
from stepladder.reporting import markdown, page, runs
from stepladder.reporting.series import Curve

ANSWER = "The door opens with the word that the owl said on {}, and with no other word."
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PAIRS = [(f"Which word opens door {n} on {day}?", ANSWER.format(day)) for n in range(4) for day in DAYS]
PAIRS = [(question, f"{answer} It is number {n}.") for n, (question, answer) in enumerate(PAIRS)]


def write(file: Path, pairs: list[tuple[str, str]]) -> Path:
    file.write_text("".join(json.dumps({"input": q, "output": a}) + "\n" for q, a in pairs))
    return file


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """A folder with `rows.jsonl`, and `run`, which held four of its 28 rows out."""
    folder = tmp_path_factory.mktemp("held-out")
    rows = write(folder / "rows.jsonl", PAIRS)
    done = script(
        "sft", "--recipe", "lora", "--model_name_or_path", tiny, "--dataset_name", rows, "--test_split_size", 4,
        "--max_steps", 4, "--bf16", "false", "--output_dir", folder / "run",
    )  # fmt: skip
    assert done.code == 0 and f"compare.py --base {tiny} --tuned {folder / 'run'}\n" in done.out, done
    assert "eval_dataset_name is left out" in done.out and "came with other" not in done.out, done
    return folder


def compared(folder: Path, *words: Any) -> tuple[dict[str, Any], str]:
    done = script("compare", *words, "--max_new_tokens", 4, "--show", 0, "--output_dir", folder)
    assert done.code == 0, done
    return json.loads((folder / "compare.json").read_text()), done.out


def test_a_comparison_is_on_the_rows_that_the_run_held_out(trained, tmp_path: Path) -> None:
    """Guards `better on 72 rows`, 68 of which were trained on: without --data, and with the whole file as --data."""
    kept = json.loads((trained / "run/held_out.json").read_text())
    assert (kept["rows"], len(kept["held_out"]), len(kept["trained"])) == (4, 4, 24)
    assert manifest(trained / "run")["held_out"] == {"rows": 4, "trained_on": 0, "foreign": ""}
    asked = [PAIRS[int(place.rsplit(":", 1)[1]) - 1][0] for place in kept["where"]]
    alone, _ = compared(tmp_path / "alone", "--tuned", trained / "run")
    whole, said = compared(tmp_path / "whole", "--tuned", trained / "run", "--data", trained / "rows.jsonl")
    assert alone["questions"] == whole["questions"] == asked
    assert [side["loss"] for side in alone["sides"]] == [side["loss"] for side in whole["sides"]]
    assert (alone["held_out_rows"], alone["left_out_rows"]) == (4, 0)
    assert (whole["held_out_rows"], whole["left_out_rows"], whole["on_training_rows"]) == (4, 24, False)
    note = f"24 of the 28 rows of {trained / 'rows.jsonl'} were trained on by {trained / 'run'}: they are left out"
    assert (
        note in said
        and "4 held-out rows, 24 trained rows left out" in (tmp_path / "whole/evaluation_results.md").read_text()
    )


def test_copies_of_a_row_are_one_row(trained, tmp_path: Path) -> None:
    """Guards against p = 0.0004 from one row that stood in the file twelve times; so with prompts."""
    other = [("Who keeps the blue key?", "Nobody does, since it was lost at sea long ago, said the old porter.")]
    rows = write(tmp_path / "rows.jsonl", [(f"  {q.upper()}" * (n % 2) or q, a) for n in range(12) for q, a in other])
    copies = "11 of the 12 rows"
    words = ("--tuned", trained / "run", "--data", rows, "--prompts", rows, "--require", "held-out loss not worse")
    done = script("compare", *words, "--max_new_tokens", 4, "--show", 0, "--output_dir", tmp_path / "out")
    facts = json.loads((tmp_path / "out/compare.json").read_text())
    assert done.code == 3 and facts["held_out_rows"] == len(facts["questions"]) == 1, done
    assert f"{copies} of {rows} are copies of another one: they are left out" in done.out, done
    assert "11 of 12 prompts are copies of another one: they are left out" in done.out, done


def test_figures_of_training_rows_are_called_so_everywhere(trained, tmp_path: Path) -> None:
    """Guards table, verdict, page and JSON of a comparison that has rows of the training set only."""
    places = json.loads((trained / "run/held_out.json").read_text())["where"]
    numbers = {int(place.rsplit(":", 1)[1]) - 1 for place in places}
    rows = write(tmp_path / "t.jsonl", [pair for n, pair in enumerate(PAIRS) if n not in numbers])
    copy = shutil.copytree(trained / "run", tmp_path / "run")
    facts, said = compared(copy, "--tuned", copy, "--data", rows, "--limit", 2)
    assert (facts["held_out_rows"], facts["training_rows"], facts["on_training_rows"]) == (0, 24, True)
    assert facts["metrics"][0]["name"] == "loss on training rows"
    judged = {v["name"]: v["severity"] for v in facts["verdicts"][0]["verdicts"]}
    assert judged["not held out"] == "look" and not judged.keys() & {"better than the base", "not memorized"}, judged
    table, shown = ((copy / name).read_text() for name in ("evaluation_results.md", "report.html"))
    for text in (said, table):
        assert "held-out loss" not in text and "loss on training rows" in text, text
        assert "improved on training rows" in text and "none is left: all figures are of training rows" in text
    assert "Base and tuned on training rows" in shown and "<span>held-out loss" not in shown
    report = markdown.mini_project_report(runs.read(copy), "doors")
    assert "**Not yet**: nothing shows that it is better" in report and "not held out (loss on training" in report
    assert "Each of these rows was trained on" in report


def test_the_card_says_what_its_held_out_loss_is_of(trained) -> None:
    """Guards the figure that a stranger reads: rows that are trained on too, or that came with other data."""
    facts = manifest(trained / "run")
    for held, said in (
        ({"rows": 4, "trained_on": 0, "foreign": ""}, " |"),
        ({"rows": 4, "trained_on": 3, "foreign": ""}, " (3 of its 4 rows are trained on too) |"),
        ({"rows": 4, "trained_on": None, "foreign": "b.jsonl"}, " on `b.jsonl`, which came with other data |"),
    ):
        text = card.render(trained / "run", "base", None, facts | {"held_out": held}, [1.0], merged=None)
        assert f"| held-out loss | {facts['final']['eval_loss']:.4f}{said}" in text, text


def test_a_merged_model_and_a_checkpoint_are_known_by_their_run(trained, tmp_path: Path) -> None:
    """Guards pipeline.sh, which compares what was merged: it has no recipe of its own, and nor has a checkpoint."""
    done = script("merge", "--adapter", trained / "run", "--output_dir", tmp_path / "merged", "--no_verify")
    assert done.code == 0, done
    facts, _ = compared(tmp_path / "out", "--tuned", tmp_path / "merged")
    assert (facts["held_out_rows"], len(facts["questions"])) == (4, 4)
    found = held_out.Runs([])
    assert (
        len(found.trained_keys(str(tmp_path / "merged")))
        == len(found.trained_keys(str(trained / "run/checkpoint-4")))
        == 24
    )
    # A model that was tuned further from it was trained on its rows too.
    further = tmp_path / "further"
    further.mkdir()
    recipe = {
        "model_name_or_path": str(tmp_path / "merged"),
        "dataset_name": str(write(tmp_path / "n.jsonl", PAIRS[:1])),
    }
    (further / "recipe.yaml").write_text(json.dumps(recipe))
    assert found.trained_keys(str(further)) == found.trained_keys(str(trained / "run")) | row_keys(
        mixture.from_name(recipe["dataset_name"]).examples
    )


def test_a_row_is_known_in_another_shape() -> None:
    """Guards against rows that pass for new ones by case, blanks, another format or another system prompt."""

    def key(*turns: tuple[str, str], **more: Any) -> str:
        return row_key({"messages": [{"role": role, "content": text} for role, text in turns], **more})

    question, answer = ("user", "Which word opens it?"), ("assistant", "The word that the owl said, and no other one.")
    known = key(question, answer)
    assert known == key(("system", "Be brief."), ("user", "which word  opens it?\n"), answer)
    assert known != key(question, ("assistant", "The word that the cat said, and no other one."))
    assert known != key(("user", "Which word closes it?"), answer)
    # A short answer is no row's own: the system prompt may hold what is asked about.
    yes = ("assistant", "Yes.")
    assert key(("system", "It rains."), question, yes) != key(("system", "It snows."), question, yes)
    assert row_key({"text": "\ud800"}) != row_key({"text": "a"})  # half a character, which JSON can hold


def made_run(folder: Path, keys: dict[str, Any], kept: Any = None) -> str:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(keys))
    if kept is not None:
        (folder / "held_out.json").write_text(kept if isinstance(kept, str) else json.dumps(kept))
    return str(folder)


def test_rows_that_are_gone_are_told(tmp_path: Path) -> None:
    """Guards rows held out by a file that has changed since: by content, in another place, counted, or refused."""
    rows = write(tmp_path / "rows.jsonl", PAIRS)
    examples = mixture.from_name(str(rows)).examples
    kept = {
        "name": "rows", "rows": 3, "held_out": [row_key(example) for example in examples[:3]],
        "where": ["rows:1", "rows:2", "rows:3"], "foreign": "b", "trained": sorted(row_keys(examples[3:])),
    }  # fmt: skip
    name = made_run(tmp_path / "run", {"model_name_or_path": "m", "dataset_name": str(rows)}, kept)
    write(rows, [*PAIRS[4:], ("A new one?", "It was written after the run, and it is long enough."), *PAIRS[1:3]])
    notes: list[str] = []
    found = held_out.Runs(notes)
    assert [row["messages"][0]["content"] for row in found.held_out(name).examples] == [PAIRS[1][0], PAIRS[2][0]]
    assert any("evaluated on b, which came with other" in note for note in notes), notes
    training = found.training_rows(name)
    assert training and len(training) == 24, "neither what is new nor what was held out"
    assert any("1 of the 3 rows" in note and "gone" in note for note in notes), notes
    assert any("has changed: 3 of its 27 rows were not trained on" in note for note in notes), notes
    write(rows, PAIRS[4:])
    with pytest.raises(DataError, match="are gone"):
        held_out.Runs([]).held_out(name)
    rows.unlink()
    with pytest.raises(DataError, match="cannot be read again"):
        held_out.Runs([]).held_out(name)
    notes = []
    assert held_out.Runs(notes).training_rows(name) is None and "cannot be read again" in notes[0]
    assert len(held_out.Runs([]).trained_keys(name)) == 25, "what was trained on is known without the file"


WRONG = {"name": "", "rows": 1, "held_out": [1], "where": [], "foreign": "", "trained": []}
NONE = {"name": "", "rows": 3, "held_out": [], "where": [], "foreign": "", "trained": []}


@pytest.mark.parametrize(
    "kept", [None, "", "{}", "[]", '{"trained": 3}', "[" * 9000, json.dumps(WRONG), json.dumps(NONE)]
)
def test_a_run_without_a_record_is_read_again(kept: str | None, tmp_path: Path) -> None:
    """Guards runs of before, and a record that was cut: their recipe says what they were trained on."""
    keys = {"model_name_or_path": "m", "dataset_name": str(write(tmp_path / "rows.jsonl", PAIRS)), "test_split_size": 4}
    notes: list[str] = []
    found = held_out.Runs(notes)
    name = made_run(tmp_path / "run", keys, kept)
    assert len(found.trained_keys(name)) == 24 and len(found.held_out(name)) == 4
    assert any("held_out.json" in note for note in notes)
    nothing = made_run(tmp_path / "nothing", {key: keys[key] for key in ("model_name_or_path", "dataset_name")}, kept)
    with pytest.raises(DataError, match="which rows it held out"):
        found.held_out(nothing)


def test_prompts_that_were_trained_on_are_left_out(tmp_path: Path) -> None:
    """Guards --prompts: rows with answers that were trained on, and questions that were asked before."""
    file = write(tmp_path / "p.jsonl", PAIRS[:3])
    (tmp_path / "p.txt").write_text(f"{PAIRS[0][0]}\nWhat else?\n")
    rows = mixture.from_name(str(file))
    notes: list[str] = []
    one = {"run": row_keys(rows.examples[:1])}
    free = held_out.leave_out_trained_prompts(questions.read_prompts(file), one, notes)
    assert len(free) == 2 and "1 of 3 prompts" in notes[0]
    with pytest.raises(DataError, match="each prompt was trained on"):
        held_out.leave_out_trained_prompts(questions.read_prompts(file), {"run": row_keys(rows.examples)}, notes)
    plain = questions.read_prompts(tmp_path / "p.txt")
    assert held_out.leave_out_trained_prompts(plain, one, notes) == plain
    assert held_out.note_asked_questions(plain, {"run": rows}) == [
        "1 of 2 questions were asked in the training of run too"
    ]


def test_a_run_says_which_of_its_evaluation_rows_are_trained_on(tmp_path: Path) -> None:
    """Guards `generalizes` of rows that are trained on, and curves of rows that came with other data."""
    rows = mixture.from_name(str(write(tmp_path / "rows.jsonl", PAIRS)))
    record = run_folder.Run(tmp_path, is_writer=True)
    record.manifest = {"resumed": [], "status": "running"}
    (note,) = mixture.write_held_out(record, rows, rows.take(range(3)), "other.jsonl")
    assert "3 of the 3 evaluation rows are trained on too" in note
    facts = manifest(tmp_path)
    assert facts["held_out"] == {"rows": 3, "trained_on": 3, "foreign": "other.jsonl"}
    logged = runs.LoggedRun(tmp_path, "r", facts=facts)
    steps = range(1, 99)
    logged.curves = {key: Curve(steps, [3 - 0.01 * n for n in steps]) for key in ("loss", "grad_norm", "eval_loss")}
    names = {verdict.name for verdict in page.judge_run(logged)}
    assert {"not held out", "foreign evaluation", "not evaluated"} <= names and "generalizes" not in names
    # Trained on with other rows after a resume: it knows both. A stream's rows are not kept.
    record.manifest["resumed"] = [{"step": 2}]
    more = write(tmp_path / "more.jsonl", [("Another?", "Another one, and a long answer to it, too.")])
    mixture.write_held_out(record, mixture.from_name(str(more)), None, "")
    kept = mixture.read_held_out(tmp_path)
    assert kept and kept.trained and len(kept.trained) == len(PAIRS) + 1 and kept.rows == 0
    (note,) = mixture.write_held_out(record, None, rows, "")
    kept = mixture.read_held_out(tmp_path)
    assert kept and kept.trained is None and "not known of a stream" in note
    logged.facts = manifest(tmp_path)
    assert "not held out" not in {verdict.name for verdict in page.judge_run(logged)}
    other = run_folder.Run(tmp_path / "other", is_writer=False)
    assert mixture.write_held_out(other, rows, rows, "") == [] and not other.folder.exists()


def test_very_many_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the size of held_out.json; what it leaves out is read again, and said."""
    monkeypatch.setattr(mixture, "MOST_TRAINED", 10)
    monkeypatch.setattr(mixture, "MOST_HELD_OUT", 2)
    file = write(tmp_path / "rows.jsonl", PAIRS)
    rows = mixture.from_name(str(file))
    folder = made_run(tmp_path / "run", {"model_name_or_path": "m", "dataset_name": str(file)})
    record = run_folder.Run(Path(folder), is_writer=True)
    record.manifest = {"resumed": [], "status": "running"}
    mixture.write_held_out(record, rows.take(range(20)), rows.take(range(20, 28)), "")
    kept = mixture.read_held_out(Path(folder))
    assert kept and (kept.trained, kept.rows, len(kept.held_out)) == (None, 8, 2)
    notes: list[str] = []
    found = held_out.Runs(notes)
    assert isinstance(found.held_out(folder), Rows) and "of the 8 rows" in notes[0]


def test_a_pipeline_needs_rows_that_are_held_out(write_recipe, tmp_path: Path) -> None:
    """Guards pipeline.sh, which fell back to the training set; refused on the login node, before the queue."""
    recipe = write_recipe(model_name_or_path="m", dataset_name=str(ROOT / "data/techco.jsonl"))
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho queued >&2; echo 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for words, code in (((), 2), (("--test_split_size", "0.1"), 0)):
        done = run("bash", "slurm/pipeline.sh", "--", "--recipe", recipe, *words, **env)
        assert done.code == code and ("queued" in done.err) == (not code), done
        assert ("holds out no rows" in done.err) == bool(code) and "Traceback" not in done.err, done
