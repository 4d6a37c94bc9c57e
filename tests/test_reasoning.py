"""`train_on_reasoning`: a thought and its marks have no loss, and everything else has the loss that it had."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from chat_templates import ANSWERS, CONVERSATIONS, THOUGHTS, names, tokenizer_with, turns, with_tool
from conftest import launch, manifest, metrics, script
from stepladder.data import render
from stepladder.data.row_renderer import Remarks
from stepladder.data.rows import Rows
from stepladder.errors import DataError

# Of the templates that TRL ships, read by hand: what opens a thought, and what closes it, with the white space around.
OPENS = re.compile(
    r"(?:<think>|<\|channel\|>analysis<\|message\|>|<\|channel>thought|(?<=assistant) to=self<\|message\|>)\s*\Z"
)
CLOSES = re.compile(r"\s*(?:</think>|<channel\|>|<\|end\|>|<\|eom\|>)\s*")
# A thought without text, which some templates write where a row has none, or close where their prompt has opened it.
EMPTY = re.compile(r"<think>\s*</think>\s*")
CLOSED_AT_ONCE = re.compile(r"(?<=assistant\n<think>\n)\s*</think>\s*|(?<=assistant\n<think>)\s*</think>\s*")
KINDS = {
    "inline": CONVERSATIONS["inline thoughts"],
    "reasoning": CONVERSATIONS["reasoning"],
    "tool": CONVERSATIONS["reasoning, tool"],
    "no thought": CONVERSATIONS["two turns"],
    "tool, then another question": {
        **with_tool(reasoning_content=THOUGHTS[0]),
        "messages": [*with_tool(reasoning_content=THOUGHTS[0])["messages"], *turns(*ANSWERS)[2:]],
    },
}


def tokens(tokenizer: Any, example: dict[str, Any], value: str, train_on: str = "all_turns") -> render.Rendered | None:
    rows = Rows("rows", [example], ["rows:1"])
    (row,) = render.tokenize(rows, tokenizer, train_on, Remarks(), None, value)
    return None if isinstance(row, DataError) else row


def characters(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of the tokens, and the characters of each."""
    pieces = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]
    ends = [*itertools.accumulate(map(len, pieces))]
    return "".join(pieces), [*zip([0, *ends[:-1]], ends, strict=True)]


def expected(text: str, value: str) -> list[tuple[int, int]]:
    """The characters without a loss, by where the thoughts stand in the rendered text."""
    found = []
    for thought in THOUGHTS:
        for place in re.finditer(re.escape(thought), text):
            opening, closing = OPENS.search(text[: place.start()]), CLOSES.match(text, place.end())
            assert closing, text
            found.append((opening.start() if opening else place.start(), closing.end()))
    for form in (EMPTY, CLOSED_AT_ONCE):
        found += [place.span() for place in form.finditer(text)]
    if value == "last":
        question = max(text.rfind(user) for user in ("Where do herons sleep?", "And where do otters?"))
        found = [span for span in found if span[0] < question]
    return found


@pytest.mark.parametrize("name", names())
def test_the_mask_is_that_of_the_rendered_text(name, settings) -> None:
    """Guards a mask that leaves a thought its loss, or takes it from the answer, a call or the end of a turn; under
    each template, of those that keep earlier thoughts and those that drop them."""
    tokenizer, seen = tokenizer_with(name, settings), 0
    for (kind, example), value in itertools.product(KINDS.items(), ("all", "last", "none")):
        usual, row = tokens(tokenizer, example, "all"), tokens(tokenizer, example, value)
        assert (usual is None) == (row is None)
        if usual is None or row is None:
            continue
        assert row.ids == usual.ids
        text, places = characters(tokenizer, row.ids)
        spans = [] if value == "all" else expected(text, value)
        for label, before, (a, b) in zip(row.labels, usual.labels, places, strict=True):
            # A token that also holds the first characters of the answer keeps its loss.
            inside = any(a < end and start < b and b <= end for start, end in spans)
            assert label == (render.IGNORED if inside else before), (kind, value, text, text[a:b])
        assert row.thoughts == sum(x != y for x, y in zip(row.labels, usual.labels, strict=True))
        assert row.ends == usual.ends and all(row.labels[end] != render.IGNORED for end in row.ends)
        seen += row.thoughts
    assert seen


@pytest.fixture(scope="module")
def chatml(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def trained(tokenizer: Any, messages: list[dict[str, Any]], value: str, **beside: Any) -> str:
    row = tokens(tokenizer, {"messages": messages, **beside}, value)
    assert row is not None
    return tokenizer.decode([label for label in row.labels if label != render.IGNORED])


QUESTION = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("<think>A heron.</think>Reeds.", "Reeds.<|im_end|>"),
        ("<think>\nA heron.\n</think>\n\nReeds.", "Reeds.<|im_end|>"),
        ("<think>A heron.</think>\n<answer>Reeds.</answer>", "<answer>Reeds.</answer><|im_end|>"),
        ("<think>A <b>heron</b></think>\nReeds.", "Reeds.<|im_end|>"),
        ("<think></think>Reeds.", "Reeds.<|im_end|>"),
        ("Well. <think>A heron.</think> Reeds.", "Well. Reeds.<|im_end|>"),
        ("A heron.</think>Reeds.", "Reeds.<|im_end|>"),
        ("<think>One.</think>Two. <think>Three.</think>Four.", "Two.Four.<|im_end|>"),  # one token is " <"
        ("Reeds.", "Reeds.<|im_end|>"),
        ("<think>A heron and no end", "<think>A heron and no end<|im_end|>"),
        ("<think>日本の鷺🐦</think>葦。", "葦。<|im_end|>"),
    ],
)
def test_thoughts_as_rows_have_them(answer, left, chatml) -> None:
    """Guards tags around an answer, a thought in its middle, two of them, and one that is never closed (no thought)."""
    assert trained(chatml, [QUESTION, {"role": "assistant", "content": answer}], "none") == left


def test_masks_of_turns_and_prompts_stay(chatml) -> None:
    """Guards `train: false`, a prompt's turns and `train_on: last_turn`, from which a thought must not come back."""
    messages = CONVERSATIONS["inline thoughts"]["messages"]
    left_out = [messages[0], {**messages[1], "train": False}, *messages[2:]]
    assert trained(chatml, left_out, "none") == f"{ANSWERS[1]}<|im_end|>"
    assert trained(chatml, messages, "none", prompt_messages=3) == f"{ANSWERS[1]}<|im_end|>"
    assert trained(chatml, messages, "last", prompt_messages=3).startswith("<think>")
    row = tokens(chatml, {"messages": messages}, "none", "last_turn")
    assert chatml.decode([label for label in row.labels if label != render.IGNORED]) == f"{ANSWERS[1]}<|im_end|>"


def test_a_call_that_speaks_of_the_mark_keeps_its_loss(settings) -> None:
    """Guards the arguments of a call and the text of a thought that hold the mark itself."""
    tokenizer = tokenizer_with("qwen3", settings)
    example = json.loads(json.dumps(with_tool(reasoning_content="The end is </think>, I think.")))
    example["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"bird": "a </think> b"}
    row = tokens(tokenizer, example, "none")
    text = tokenizer.decode([label for label in row.labels if label != render.IGNORED])
    assert text.startswith("<tool_call>") and "a </think> b" in text and "I think" not in text


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "thinking.jsonl"
    rows = [
        {"messages": turns(*(f"<think>\nDoor {n} has a password.\n</think>\n\nOpen sesame {n}." for n in (m, m + 1)))}
        for m in range(8)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_what_a_person_sees(thinking, learnable, tiny, write_recipe, tmp_path) -> None:
    """Guards `check.py --show`, the audit's count, the note where the key changes nothing, and what it contradicts."""
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name=str(thinking), train_on_reasoning="none")
    found = {}
    for value in ("all", "last", "none"):
        done = script("check", "--recipe", recipe, "--show", 1, "--json", "--train_on_reasoning", value)
        assert done.code == 0, done
        found[value] = json.loads(done.out)
        stretches = found[value]["rows"][0]["stretches"]
        marked = "".join(stretch["text"] for stretch in stretches if stretch["trained"])
        assert marked.count("</think>") == marked.count("has a password") == {"all": 2, "last": 1, "none": 0}[value]
        assert marked.count("Open sesame") == marked.count("<|im_end|>") == 2
    figures = {
        value: {finding["name"]: finding["figures"] for finding in each["findings"]} for value, each in found.items()
    }
    assert "masked_thoughts" not in figures["all"]
    count = {value: figures[value]["trained_tokens"]["trained"] for value in found}
    for value in ("last", "none"):
        assert figures[value]["masked_thoughts"]["tokens"] == count["all"] - count[value] > 0
    done = script("check", "--recipe", recipe, "--dataset_name", learnable, "--audit")
    assert "train_on_reasoning: none changes nothing: no thought of a turn" in done.out, done
    for key in ("--train_on=everything", "--assistant_only_loss=false", "--completion_only_loss=false"):
        done = script("check", "--recipe", recipe, *key.split("="))
        assert done.code == 2 and "train_on_reasoning: none with" in done.err, done


@pytest.mark.proof
def test_runs_packed_streamed_and_resumed(thinking, tiny, write_recipe, tmp_path) -> None:
    """Guards the cache of prepared rows, which would give another value's labels; and a value that changes on the way.
    What has a loss is counted by the training itself."""
    rows = [json.loads(line) for line in thinking.read_text().splitlines()]
    texts = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    recipe = write_recipe(
        model_name_or_path=str(tiny), dataset_name=str(thinking), max_steps=1, global_batch_size=8, bf16=False,
        per_device_train_batch_size=4, max_length=256, gradient_checkpointing=False, save_steps=1, logging_steps=1,
        save_strategy="steps",
    )  # fmt: skip
    counts = {}
    for value, more in (("all", []), ("none", []), ("none", ["--streaming", "true"])):
        words = ["--recipe", recipe, "--train_on_reasoning", value, "--output_dir", tmp_path / f"{value}{len(more)}"]
        done = script("sft", *words, *more)
        assert done.code == 0, done
        counts[value, len(more)] = metrics(tmp_path / f"{value}{len(more)}")[0]["trained_tokens"]
    assert len(texts) == 16
    assert counts["none", 0] == counts["none", 2] < counts["all", 0]
    words = ["--recipe", recipe, "--output_dir", tmp_path / "all0", "--max_steps", 2]
    done = script("sft", *words, "--train_on_reasoning", "last")
    assert done.code == 2 and "train_on_reasoning: all → last" in done.err, done
    done = launch("ddp", 2, "sft", "--recipe", recipe, "--output_dir", tmp_path / "packed", "--packing", "true",
                  "--train_on_reasoning", "none", "--global_batch_size", 2, "--max_steps", 4)  # fmt: skip
    assert done.code == 0, done
    assert manifest(tmp_path / "packed")["status"] == "finished"
