"""What a model is asked is what training renders before an answer: nothing of a question is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepladder.data import mixture
from stepladder.data.rows import Rows
from stepladder.errors import DataError
from stepladder.evaluation import generation, questions, sides
from stepladder.evaluation.endpoint import Endpoint
from stepladder.evaluation.questions import Answer, Question
from stepladder.training.launch.launcher import Strategy

USER, ANSWER = {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "26 °C"}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to_file(*rows: dict[str, Any]) -> Path:
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "q.jsonl"

    return to_file


ASKED: dict[str, tuple[dict[str, Any], Question]] = {
    "instruction and input": (
        {"instruction": "Add.", "input": "1 and 2"},
        Question([{"role": "user", "content": "Add.\n\n1 and 2"}]),
    ),
    "instruction and an empty input": ({"instruction": "Rome?", "input": ""}, Question([USER])),
    "an answer left empty": ({"instruction": "Rome?", "input": "", "output": ""}, Question([USER])),
    "an answer of null": ({"question": "Rome?", "answer": None}, Question([USER])),
    "system and prompt": ({"system": "Be brief.", "prompt": "Rome?"}, Question([SYSTEM, USER])),
    "input alone": ({"input": "Rome?"}, Question([USER])),
    "input and output": ({"input": "Rome?", "output": "Sunny."}, Question([USER], "Sunny.")),
    "text": ({"text": "Rome?"}, Question([USER])),
    "history": (
        {"query": "Rome?", "history": [["Oslo?", "Ice."]]},
        Question([{"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": "Ice."}, USER]),
    ),
    "context and question": (
        {"context": "It is hot.", "question": "Is it?"},
        Question([{"role": "user", "content": "It is hot.\n\nIs it?"}]),
    ),
    "a document": ({"document": "Long."}, Question([{"role": "user", "content": "Summarize:\n\nLong."}])),
    "messages": ({"messages": [SYSTEM, USER]}, Question([SYSTEM, USER])),
    "messages with their answer": ({"messages": [USER, ANSWER]}, Question([USER], "Sunny.")),
    "an answer that is not trained": ({"messages": [USER, {**ANSWER, "loss": False}]}, Question([USER], "Sunny.")),
    "a bad answer of KTO": ({"prompt": "Rome?", "completion": "Snow.", "label": False}, Question([USER])),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ro"}, {"text": "me?"}]}]},
        Question([USER]),
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Rome?"}]}, Question([USER])),
    "a prompt of messages": ({"prompt": [SYSTEM, USER]}, Question([SYSTEM, USER])),
    "tools": ({"prompt": "Rome?", "tools": '[{"name": "weather"}]'}, Question([USER], "", TOOLS)),
    "a tool's result": (
        {"messages": [USER, {**CALLING, "content": None}, RESULT], "tools": TOOLS},
        Question([USER, CALLING, RESULT], "", TOOLS),
    ),
    "kwargs of the template": (
        {"prompt": "Rome?", "chat_template_kwargs": {"enable_thinking": False}},
        Question([USER], "", None, {"enable_thinking": False}),
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_question_is_read_as_a_training_row_is(name: str, write: Callable[..., Path]) -> None:
    """Guards against an input that is asked without its instruction, and against lost system prompts and tools."""
    row, question = ASKED[name]
    notes: list[str] = []
    assert questions.read_prompts(write(row), notes) == [question]
    assert not notes


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "", "input": "x"}, r"q.jsonl:1: the user's text \('instruction'\) is empty"),
        ({"messages": [ANSWER]}, "q.jsonl:1: this row holds no prompt"),
        ({"id": 1}, "q.jsonl:1: this row holds no prompt"),
        ({"prompt": "Rome?", "response": "Sunny."}, r"column_map: \{completion: response\}"),
        ({"prompt": "Rome?", "tools": "weather"}, "q.jsonl:1: 'tools' is not JSON"),
        ({"prompt": "Rome?", "chat_template_kwargs": {"tokenize": True}}, "q.jsonl:1: .* sets 'tokenize'"),
        ({"prompt": [USER, 3]}, "q.jsonl:1: a message has no 'role'"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(row: dict[str, Any], said: str, write: Callable[..., Path]) -> None:
    """Guards against a question of nothing, and against an answer that is taken for a part of the question."""
    with pytest.raises(DataError, match=said):
        questions.read_prompts(write(row))


def test_columns_of_questions_that_are_not_used_are_named(write: Callable[..., Path]) -> None:
    notes: list[str] = []
    file = write({"prompt": "Rome?", "chosen": "Sunny.", "rejected": "Snow."}, {"prompt": "Oslo?", "id": 3})
    assert [question.text for question in questions.read_prompts(file, notes)] == ["Rome?", "Oslo?"]
    assert notes == [f"{file}: columns that are not used: chosen (1 row), id (1 row), rejected (1 row)"]


def test_rows_that_ask_nothing_are_counted(write: Callable[..., Path]) -> None:
    """Guards comparisons: an answer that is a tool call has no text to be held to, and is not left out in silence."""
    rows = mixture.from_name(str(write({"messages": [USER, ANSWER]}, {"messages": [USER, CALLING]})))
    asked = questions.extract_questions(rows)
    assert asked == [Question([USER], "Sunny.")]
    assert questions.remarks(asked, rows)[0].startswith("1 of 2 rows ask nothing")


TEMPLATE = (
    "{{ tools | tojson if tools }} thinking {{ enable_thinking | default('on') }}:"
    "{% for m in messages %} {{ m.role }} says {{ m.content }}"
    "{% for c in m.tool_calls or [] %} and calls {{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %};{% endfor %}{% if add_generation_prompt %} assistant says{% endif %}"
)


def test_tools_and_kwargs_reach_the_template(tiny: Path) -> None:
    """Guards a model that was trained with tools against being asked without them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    question = Question([USER, CALLING, RESULT], "", TOOLS, {"enable_thinking": "off"})
    assert generation.prompt_text(tokenizer, question.example) == (
        '[{"type": "function", "function": {"name": "weather"}}] thinking off: user says Rome?;'
        ' assistant says  and calls weather {"city": "Rome"}; tool says 26 °C; assistant says'
    )


def test_samples_are_of_questions_that_the_template_renders(tiny: Path) -> None:
    """Guards a run with `on_bad_row: skip` against dying of a row that it has left out."""
    from stepladder.model.pretrained import load_for_inference

    model, tokenizer = load_for_inference(str(tiny))
    examples = [
        {"messages": [{"role": "user", "content": "Oslo?"}, ANSWER], "tools": TOOLS},
        {"messages": [USER, ANSWER]},
    ]
    ask = generation.sample_asker(Rows("r", examples, ["r:1", "r:2"]), tokenizer, Strategy("single"), "fp32")
    assert ask and [(row["question"], row["reference"]) for row in ask(model)] == [("Rome?", "Sunny.")]


def test_a_transcript_keeps_the_tools_and_knows_its_questions_by_them(tmp_path: Path) -> None:
    """Guards against an answer given with tools being taken for one given without."""
    with_tools, bare = Question([USER], "", TOOLS, {"enable_thinking": False}), Question([USER])
    kept = tmp_path / "kept.jsonl"
    kept.write_text(questions.transcript_row("m", with_tools.example, Answer("Sunny.", True), 8, 0.0))
    assert questions.transcript_answers(kept, [with_tools]) == [Answer("Sunny.", True)]
    assert questions.read_prompts(kept) == [with_tools._replace(reference="Sunny.")]
    with pytest.raises(DataError, match=r"answers 0 of 1 questions(.|\n)*another conversation"):
        questions.transcript_answers(kept, [bare])


@pytest.mark.parametrize("question", [Question([USER], "", TOOLS), Question([USER, CALLING, RESULT], "")])
def test_a_server_is_not_asked_what_it_would_not_be_told_whole(question: Question) -> None:
    with pytest.raises(DataError, match=r"cannot be asked 'Rome|cannot be asked '26 °C"):
        sides.check(Endpoint("http://127.0.0.1:9", "m", 1), sides.Measured([Question([USER]), question]))
