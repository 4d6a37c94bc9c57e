"""The audit as a person runs it: each flaw is found at its line, and good rows get the seeds' closing line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Done, run, script
from stepladder.data import audit, mixture, prepare
from stepladder.data.row_checks import Limits, check_texts, check_tokens
from stepladder.errors import DataError

THINGS = [
    *("password", "invoice", "delivery", "warranty", "charger", "refund", "address", "discount", "gift card", "screen"),
    *("battery", "headset", "return", "voucher", "account", "newsletter", "keyboard", "router", "update", "camera"),
]
GOOD = [
    {"input": f"What about my {thing}?", "output": f"Look under {thing} in your settings, row {n * n}. 😊"}
    for n, thing in enumerate(THINGS, start=1)
]
VALID = "✅ Dataset valid! 20 examples ready for fine-tuning."


def check(*words: Any, **env: str) -> Done:
    return script("check", *words, **{"FORCE_COLOR": "", "TTY_COMPATIBLE": "0", **env})


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (or raw lines) to a JSONL file."""

    def to_file(rows: list[Any], name: str = "training_data.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return tmp_path / name

    return to_file


def findings(file: Path, *words: Any) -> dict[str, dict[str, Any]]:
    """What `--data FILE --json` finds, by name."""
    done = check("--data", file, "--json", *words)
    assert "Traceback" not in done.err, done
    return {finding["name"]: finding for finding in json.loads(done.out)["findings"]}


def test_good_rows_get_the_seeds_line(write: Callable[..., Path]) -> None:
    """Guards the workshop's first exercise, whose page states this line."""
    done = check("--data", write(GOOD))
    assert done.code == 0 and done.out.splitlines()[-1] == VALID and "⚠" not in done.out, done


@pytest.mark.parametrize("name", ["techco", "techco_eval", "general"])
def test_the_shipped_data_is_clean(name: str) -> None:
    done = check("--data", f"data/{name}.jsonl")
    assert done.code == 0 and "✅ Dataset valid!" in done.out and "copies" not in done.out, done


FLAWS = {
    '{"input": "What about my shoes?"': "invalid JSON",
    '{"input": "What about my shoes?"}': "columns 'input', while the rows of this set have input + output",
    '{"input": "Shoes?", "output": "Look under shoes in your settings."}': "input too short: 'Shoes?' has 6 characters",
    '{"input": "What about my shoes?", "output": "Yes."}': "output too short: 'Yes.' has 4 characters, at least 20",
    '{"input": "What about my shoes?", "output": null}': "missing",
}


def test_each_flaw_is_listed_at_its_line(write: Callable[..., Path]) -> None:
    """Guards the list: all flaws at once, each with its line; the seeds' script dies at a missing field."""
    file = write([*GOOD[:3], *FLAWS, *GOOD[3:]])
    done = check("--data", file)
    assert done.code == 2 and "Traceback" not in done.err and "✅" not in done.out, done
    issues = done.out.split("❌ Issues found:\n")[1]
    for line, part in enumerate(FLAWS.values(), start=4):
        assert any(i.startswith(f"  - {file}:{line}:") and part in i for i in issues.splitlines()), (line, done)


def test_thresholds_can_be_set(write: Callable[..., Path]) -> None:
    file = write([{"input": "2 + 2?", "output": "It is 4."}])
    assert check("--data", file).code == 2
    assert check("--data", file, "--min_input", 6, "--min-output", 8).code == 0
    assert check("--data", file, "--min_input", 7, "--min_output", 8).code == 2
    assert check("--data", write(GOOD), "--min_output", 1000).code == 2


def test_a_file_without_tokenizer_needs_nothing_heavy(write: Callable[..., Path]) -> None:
    """Guards the seconds: a file alone is looked at without torch and its kin."""
    done = run(sys.executable, "-X", "importtime", "scripts/check.py", "--data", write(GOOD))
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.err.splitlines()}
    assert done.code == 0 and "stepladder.data.audit" in imported, done
    assert not imported & {"torch", "transformers", "trl", "datasets"}


def test_copies_are_named_with_what_they_copy(write: Callable[..., Path]) -> None:
    """Guards exact copies (case and blanks apart) and near ones; rows alike only by form are neither."""
    long = "To return it, open Orders, choose the item, print the label and hand the parcel in at any shop by {}."
    first = {"input": "How do I return my new headset?", "output": long.format("Friday")}
    near = {"input": "How do I return my new headset?", "output": long.format("Monday")}
    again = {"input": "what about  my password?", "output": GOOD[0]["output"].upper()}
    file = write([*GOOD, first, near, again])
    found = findings(file)
    assert (found["duplicates"]["where"], found["duplicates"]["like"]) == ([f"{file}:23"], [f"{file}:1"])
    assert (found["near_duplicates"]["where"], found["near_duplicates"]["like"]) == ([f"{file}:22"], [f"{file}:21"])
    done = check("--data", file)
    assert done.code == 0 and f"{file}:23, as {file}:1" in done.out, "a warning is no error"


CALL = {"type": "function", "function": {"name": "find", "arguments": {"number": 1}}}
OTHER_CALL = {"type": "function", "function": {"name": "find", "arguments": {"number": 2}}}
LONG_SYSTEM = "You are the support of TechCo and answer each question briefly. " * 20


def talk(system: str = "", question: str = "What about my order?", **answer: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is on its way.", **answer}]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (talk(), talk(), ["duplicates"]),
        (talk(reasoning_content="South, so sunny."), talk(reasoning_content="Parcels take two days."), []),
        (talk(reasoning_content="South, so sunny."), talk(), []),
        (talk(tool_calls=[CALL]), talk(tool_calls=[CALL]), ["duplicates"]),
        (talk(tool_calls=[CALL]), talk(tool_calls=[OTHER_CALL]), ["near_duplicates"]),
        ({**talk(), "tools": [{"name": "a"}]}, {**talk(), "tools": [{"name": "b"}]}, ["near_duplicates"]),
        (talk(LONG_SYSTEM), talk(LONG_SYSTEM, "Which shop is open?", content="The one in Rome."), []),
        (talk("Be brief, whatever they ask you."), talk("Answer like a pirate would, at great length."), []),
    ],
    ids=["alike", "reasoning", "one without reasoning", "one call", "other calls", "other tools", "one system prompt",
         "other system prompts"],
)  # fmt: skip
def test_a_copy_is_alike_in_all_that_is_trained(
    one: dict[str, Any], other: dict[str, Any], found: list[str], write: Callable[..., Path]
) -> None:
    """Guards against rows called copies that differ in reasoning, or share nothing but a long system prompt."""
    findings = audit.audit_source(str(write([one, other])), Limits(0, 0)).findings
    assert [finding.name for finding in findings if "duplicates" in finding.name] == found


@pytest.mark.parametrize("question", ["什么是猫？", "你是谁？", "고양이란?", "猫とは何？"])
def test_a_short_question_in_wide_characters_is_long_enough(question: str, write: Callable[..., Path]) -> None:
    """Guards Chinese, Korean and Japanese, where four characters say what ten letters do."""
    rows = [{"input": question, "output": "猫是一种小型的食肉动物，常与人同住。"}]
    assert not audit.audit_source(str(write(rows)), Limits()).errors
    (error,) = audit.audit_source(str(write([{**rows[0], "input": "猫？"}])), Limits()).errors
    assert error.what == "input too short: '猫？' has 2 characters (6, wide ones counted as 3), at least 10"


PRIVATE = {
    "an e-mail address": ("anna.schmidt@gmail.com", "anna@example.com"),
    "a key or password": ("api_key = 'f3k29dk2093kd02k'", "the api key is in your settings"),
    "a private key": ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
    "a card number": ("4111 1111 1111 1111", "4111 1111 1111 1112"),
    "a phone number": ("+49 170 1234567", "order 2026-11-23 or 1,234,567"),
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_private_data_is_found_and_not_repeated(kind: str, write: Callable[..., Path]) -> None:
    """Guards the warning, its line, and that neither the report nor look-alikes give a secret away."""
    secret, harmless = PRIVATE[kind]
    rows = [*GOOD, {"input": "Who can help me, please?", "output": f"Ask here: {secret}, at any time."}]
    file = write([*rows, {"input": "Where else can I look it up?", "output": f"Nothing but {harmless}, for sure."}])
    done = check("--data", file, "--json")
    (finding,) = [f for f in json.loads(done.out)["findings"] if f["name"] == "private"]
    assert done.code == 0 and finding["severity"] == "warning" and secret not in done.out, done
    assert finding["what"] == f"{kind} in 1 row" and finding["where"] == [f"{file}:21"], finding


@pytest.mark.parametrize("token", ["sk-" + "aB3" * 8, "ghp_" + "aB3" * 12, "AKIA" + "A1B2" * 4, "hf_" + "aBc" * 11])
def test_usual_keys_are_known(token: str) -> None:
    rows = mixture.Rows("r", [{"text": f"Use {token} for it."}], ["r:1"])
    assert [f.name for f in check_texts(rows, Limits())].count("private") == 1


@pytest.mark.parametrize("text", ["lost \ufffd here", "a bell\x07", "zero\u200bwidth", "cafÃ© au lait", "itâ€™s"])
def test_odd_characters_are_found(text: str, write: Callable[..., Path]) -> None:
    file = write([*GOOD, {"input": "What is written there?", "output": f"It says: {text}, and no more."}])
    assert findings(file)["odd_characters"]["where"] == [f"{file}:21"]


def test_usual_characters_are_not_odd(write: Callable[..., Path]) -> None:
    text = "Ärger, São Paulo, naïve — “quoted” 👩‍👩‍👧 ⚡\n\t日本語, می‌خواهم"
    assert "odd_characters" not in findings(write([{"input": "What is written there?", "output": text}]))


def test_classes_and_languages(write: Callable[..., Path]) -> None:
    rows = [{**row, "category": "billing" if n else "shipping"} for n, row in enumerate(GOOD)]
    german = "Wo finde ich die Rechnung für meine letzte Bestellung, und wie lange bleibt sie gespeichert?"
    rows.append({"input": german, "output": "Unter Konto und Rechnungen, zehn Jahre lang.", "category": "billing"})
    found = findings(write(rows))
    assert found["classes"]["figures"] == {"billing": 20, "shipping": 1}
    assert "20 rows of 'billing', 1 of 'shipping'" in found["imbalance"]["what"]
    assert found["languages"]["figures"]["de"] == pytest.approx(1 / 21, abs=1e-4)


def test_lengths_by_hand(write: Callable[..., Path]) -> None:
    rows = [{"input": "q" * (10 + n), "output": chr(96 + n) * 20 * n} for n in range(1, 21)]
    found = findings(write(rows))
    assert found["input_characters"]["figures"] == {"min": 11, "median": 20, "p95": 29, "max": 30}
    assert found["output_characters"]["figures"] == {"min": 20, "median": 200, "p95": 380, "max": 400}


def test_evaluation_rows_that_are_trained_on(write: Callable[..., Path], settings: Callable[..., Any]) -> None:
    """Guards the evaluation loss: of rows that are trained on it says nothing."""
    train = write(GOOD, "train.jsonl")
    other = {"input": "Do you have a shop in Rome?", "output": "Not yet, but two in Milan are open daily."}
    held = write([other, GOOD[4], GOOD[4]], "eval.jsonl")
    recipe = settings(dataset_name=str(train), eval_dataset_name=str(held), eval_strategy="epoch")
    (finding,) = [f for f in audit.audit_recipe(recipe, Limits()).findings if f.name == "eval_duplicates"]
    assert finding.where == [f"{held}:2", f"{held}:3"] and finding.like == [f"{train}:5"] * 2


def test_a_recipe_that_skips_bad_rows(write: Callable[..., Path], settings: Callable[..., Any]) -> None:
    """Guards the difference: what training skips is a warning, what stops it an error; both list all rows."""
    file = write(["{", *GOOD, "["])
    stops = audit.audit_recipe(settings(dataset_name=str(file)), Limits())
    assert [finding.where for finding in stops.errors] == [[f"{file}:1:2"], [f"{file}:22:2"]] and not stops.train
    skips = audit.audit_recipe(settings(dataset_name=str(file), on_bad_row="skip"), Limits())
    assert not skips.errors and [f.severity for f in skips.findings if f.name == "bad_row"] == ["warning"] * 2
    assert len(skips.train or []) == 20


def test_a_streamed_recipe(write: Callable[..., Path], settings: Callable[..., Any]) -> None:
    recipe = settings(dataset_name=str(write(GOOD)), streaming=True)
    assert len(audit.audit_recipe(recipe, Limits()).train or []) == 20


COUNTING = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Count to six please."},
        {"role": "assistant", "content": "one two three four five six"},
    ]
}


def test_tokens_by_hand(write: Callable[..., Path], smollm2: Path, write_recipe: Callable[..., Path]) -> None:
    """Guards the figures and the view token by token, through the command line."""
    recipe = write_recipe(model_name_or_path=str(smollm2), dataset_name=str(write([COUNTING])), eval_strategy="no")
    done = check(recipe, "--show", 5, "--json")
    assert done.code == 0, done
    facts = json.loads(done.out)
    found = {finding["name"]: finding["figures"] for finding in facts["findings"]}
    # <|im_start|> system ↵ Be kind . <|im_end|> ↵ is 8; <|im_start|> user ↵, 5, <|im_end|> ↵ is 10;
    # <|im_start|> ass istant ↵, six words and <|im_end|>, which are trained, ↵ is 12.
    assert found["tokens_per_row"] == {"min": 30, "median": 30, "p95": 30, "max": 30}
    assert found["trained_tokens"] == {"share": round(7 / 30, 4), "trained": 7, "of": 30}
    assert found["end_of_turn"] == {"turns": 1, "trained": 1}
    (row,) = facts["rows"]
    trained = [stretch["text"] for stretch in row["stretches"] if stretch["trained"]]
    assert trained == ["one two three four five six", "<|im_end|>"] and (row["tokens"], row["trained"]) == (30, 7)

    plain = check("--recipe", recipe, "--audit", "--show", 1)
    assert "<|im_start|>assistant\n⟦one two three four five six<|im_end|>⟧\n" in plain.out, plain
    assert "\x1b" not in plain.out and plain.out.endswith("✅ Dataset valid! 1 examples ready for fine-tuning.\n")
    colour = check(recipe, "--show", 1, FORCE_COLOR="1", TTY_COMPATIBLE="1", TERM="xterm-256color")
    assert "\x1b[2massistant" in colour.out, "what is not trained is dim"
    assert "\x1b[1;32mone two three four five six\x1b[0m" in colour.out and "⟦" not in colour.out, colour


def test_max_length_that_cuts(write: Callable[..., Path], smollm2: Path, write_recipe: Callable[..., Path]) -> None:
    """Guards the popular tools' silence: a row without its answer, and a set without one end of turn."""
    far = {**COUNTING, "messages": [{"role": "system", "content": "Be kind. " * 20}, *COUNTING["messages"][1:]]}
    file = write([COUNTING, far])
    recipe = write_recipe(model_name_or_path=str(smollm2), dataset_name=str(file), max_length=30, eval_strategy="no")
    done = check(recipe, "--audit")
    assert done.code == 2 and f"  - {file}:2: max_length 30 cuts off the whole answer" in done.out, done
    assert "⚠ 1 of 2 rows (50.0%) are cut" in done.out and "learn to stop" not in done.out, done
    done = check(recipe, "--show", 1, "--max_length", 26)
    assert done.code == 2 and "trained in no turn" in done.out and "✂ 4 more tokens are cut" in done.out, done


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def test_a_template_without_an_end(tokenizer: Any, settings: Callable[..., Any]) -> None:
    """Guards against a model that never stops: nothing that ends an answer is trained."""
    rows = mixture.Rows("r", [COUNTING], ["r:1"])
    assert not [f for f in check_tokens(rows, tokenizer, settings()) if f.severity == "error"]
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        found = check_tokens(rows, tokenizer, settings())
        with pytest.raises(DataError, match="trained in no turn"):
            prepare.prepare_rows(rows, None, tokenizer, settings())
    finally:
        tokenizer.chat_template = before
    assert [finding.name for finding in found if finding.severity == "error"] == ["no_end_of_turn"]
    with pytest.raises(DataError, match="trained in no turn"):
        audit.stop_on_errors(found)
    audit.stop_on_errors([])


def test_a_script_that_the_tokenizer_hardly_knows(tokenizer: Any, settings: Callable[..., Any]) -> None:
    rows = mixture.Rows("r", [{"text": "ᚠᚢᚦᚨᚱᚲᚷᚹᚺᚾᛁᛃ" * 3}, {"text": "Plain English text is fine."}], ["r:1", "r:2"])
    found = {f.name: f for f in check_tokens(rows, tokenizer, settings())}
    assert found["more_tokens_than_characters"].where == ["r:1"]


def test_a_row_cannot_steer_the_terminal(write: Callable[..., Path], smollm2: Path, write_recipe: Any) -> None:
    row = {"input": "What about\x1b[2J my shoes?", "output": "[red]Look[/red] under \x1b]0;shoes\x07 in your settings."}
    recipe = write_recipe(model_name_or_path=str(smollm2), dataset_name=str(write([row])), eval_strategy="no")
    done = check(recipe, "--show", 1)
    assert done.code == 0 and "\x1b" not in done.out and "[red]Look[/red] under \\x1b]0;shoes\\x07" in done.out, done


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--data", "data/tehcco.jsonl"), "did you mean 'data/techco.jsonl'"),
        (("--data", "data/techco.jsonl", "--lora_r", 8), "--dataset_name FILE"),
        (("--data", "data/techco.jsonl", "--show", 3), "--dataset_name FILE"),
        (("lora", "--audit", "--explain"), "no other view"),
        (("lora", "--min_output", 20), "need --data"),
        (("lora", "--audit", "--max_lenght", 5), "'max_length'"),
    ],
)
def test_bad_arguments(words: tuple[Any, ...], part: str) -> None:
    """Guards against flags that have no effect."""
    done = check(*words)
    assert done.code == 2 and part in done.err and "Traceback" not in done.err and not done.out, done
