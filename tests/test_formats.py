"""Rows of every shape to examples, and rows of none to a message that helps."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stepladder.data import formats, mixture
from stepladder.data.columns import ASKED, Converter, find_question_shape, find_shape
from stepladder.data.conversation import MASKS, REASONING
from stepladder.data.formats import COLUMNS, to_prompt
from stepladder.errors import DataError
from stepladder.recipe.load import load as load_recipe

USER, ANSWER = {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
RESULT = {"role": "tool", "content": "26 °C", "name": "weather", "tool_call_id": "c1"}
SYSTEM = {"role": "system", "content": "Be brief."}


def to_example(row: dict[str, Any], where: str) -> dict[str, Any]:
    return formats.to_example(row, where, find_shape(row, where))


MASKED = set(MASKS) - {"train"}
not_raising = contextlib.nullcontext


def said(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": [USER, ANSWER], "id": 7}, {"messages": [USER, ANSWER]}),
    "messages, several turns": (
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
    ),
    "messages with tools": (
        {"messages": [USER, {**CALLING, "content": None}, RESULT, ANSWER], "tools": TOOLS},
        {"messages": [USER, CALLING, RESULT, ANSWER], "tools": TOOLS},
    ),
    "arguments and tools as JSON text": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
                },
                RESULT,
                ANSWER,
            ],
            "tools": '[{"name": "weather"}]',
        },
        {
            "messages": [USER, {**CALLING, "tool_calls": [{"id": "c1", **CALL}]}, RESULT, ANSWER],
            "tools": [{"type": "function", "function": {"name": "weather"}}],
        },
    ),
    "messages as JSON text": (
        {"messages": '[{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny."}]'},
        {"messages": [USER, ANSWER]},
    ),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ro"}, {"text": "me?"}]}, ANSWER]},
        {"messages": [USER, ANSWER]},
    ),
    "other keys of a message": (
        {"messages": [{**USER, "name": "Ann"}, {**ANSWER, "reasoning_content": "South.", "tool_calls": None}]},
        {"messages": [{**USER, "name": "Ann"}, {**ANSWER, "reasoning_content": "South."}]},
    ),
    "an empty system prompt": (
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER]},
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER]},
    ),
    "no media in media columns": ({"messages": [USER, ANSWER], "images": []}, {"messages": [USER, ANSWER]}),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Rome?"}, {"from": "gpt", "value": "Sunny."}], "system": ""},
        {"messages": [USER, ANSWER]},
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Rome?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": "26 °C"},
                {"from": "gpt", "value": "Sunny."},
            ],
            "system": "Be brief.",
            "tools": '[{"name": "weather"}]',
        },
        {
            "messages": [
                SYSTEM,
                USER,
                CALLING,
                {"role": "tool", "content": "26 °C"},
                ANSWER,
            ],
            "tools": [{"type": "function", "function": {"name": "weather"}}],
        },
    ),
    "ShareGPT that begins with the assistant": (
        {"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Rome?"},
                           {"from": "gpt", "value": "Sunny."}]},
        {"messages": [{"role": "assistant", "content": "Hello!"}, USER, ANSWER]},
    ),
    "two turns of one role": ({"messages": [USER, USER, ANSWER]}, {"messages": [USER, USER, ANSWER]}),
    "conversations with role and content": ({"conversations": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
    "prompt and completion": ({"prompt": "Rome?", "completion": "Sunny."}, {"messages": [USER, ANSWER]}),
    "prompt and completion, conversational": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"messages": [SYSTEM, USER, ANSWER]},
    ),
    "prompt and completion, the system prompt apart": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "system": "Be brief."},
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER], "prompt_messages": 4},
    ),
    "KTO, a good answer": ({"prompt": "Rome?", "completion": "Sunny.", "label": True}, {"messages": [USER, ANSWER]}),
    "KTO in CSV, a good answer": (
        {"prompt": "Rome?", "completion": "Sunny.", "label": "True"},
        {"messages": [USER, ANSWER]},
    ),
    "classes as numbers": ({"query": "Rome?", "response": "Sunny.", "label": 0}, {"messages": [USER, ANSWER]}),
    "history": (
        {"instruction": "Rome?", "output": "Sunny.", "system": "Be brief.", "history": [["Oslo?", "Ice."]]},
        {"messages": [SYSTEM, *said("Oslo?", "Ice.", "Rome?", "Sunny.")]},
    ),
    "history as JSON text, beside query and response": (
        {"query": "Rome?", "response": "Sunny.", "history": '[["Oslo?", "Ice."], ["Kyiv?", "Rain."]]'},
        {"messages": said("Oslo?", "Ice.", "Kyiv?", "Rain.", "Rome?", "Sunny.")},
    ),
    "an empty history": ({"query": "Rome?", "response": "Sunny.", "history": []}, {"messages": [USER, ANSWER]}),
    "Dolly": (
        {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "maths"},
        {"messages": said("Add.\n\n1 and 2", "3")},
    ),
    "Dolly's context in Alpaca's rows": (
        {"instruction": "Add.", "input": "1 and 2", "context": "Slowly.", "output": "3"},
        {"messages": said("Add.\n\n1 and 2\n\nSlowly.", "3")},
    ),
    "reasoning in its own column": (
        {"question": "Rome?", "reasoning_content": "South.", "answer": "Sunny."},
        {"messages": [USER, {**ANSWER, "reasoning_content": "South."}]},
    ),
    "reasoning under two names, alike": (
        {"messages": [USER, {**ANSWER, "reasoning": "South.", "thinking": "South.", "reasoning_content": " "}]},
        {"messages": [USER, {**ANSWER, "reasoning": "South."}]},
    ),
    "kwargs of the template": (
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False, "date": None}},
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "kwargs of the template as JSON text": (
        {"input": "Rome?", "output": "Sunny.", "chat_template_kwargs": '{"enable_thinking": false}'},
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "OpenAI's earlier function_call": (
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": "weather",
                             "arguments": '{"city": "Rome"}'}}, RESULT, ANSWER]},
        {"messages": [USER, CALLING, RESULT, ANSWER]},
    ),
    "tools of OpenAI's Responses API": (
        {"messages": [USER, ANSWER], "tools": [{"type": "function", "name": "weather", "description": "now"}]},
        {"messages": [USER, ANSWER],
         "tools": [{"type": "function", "function": {"name": "weather", "description": "now"}}]},
    ),
    "marks on turns that are not trained anyway": (
        {"messages": [{**SYSTEM, "train": False}, {**USER, "weight": 0}, {**ANSWER, "loss": True, "weight": 1}]},
        {"messages": [SYSTEM, USER, ANSWER]},
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief."},
        {"messages": [SYSTEM, *said("Add.\n\n1 and 2", "3")]},
    ),
    "Alpaca without input": (
        {"instruction": "Rome?", "input": None, "output": "Sunny."},
        {"messages": [USER, ANSWER]},
    ),
    "input and output": ({"input": "Rome?", "output": "Sunny."}, {"messages": [USER, ANSWER]}),
    "question and answer": ({"question": "Rome?", "answer": "Sunny."}, {"messages": [USER, ANSWER]}),
    "SQuAD": (
        {"context": "It is hot.", "question": "Is it?", "answers": {"text": ["Hot.", "Yes"], "answer_start": [6]}},
        {"messages": said("It is hot.\n\nIs it?", "Hot.")},
    ),
    "summary": ({"document": "Long.", "summary": "Short."}, {"messages": said("Summarize:\n\nLong.", "Short.")}),
    "text": ({"text": "Once upon a time."}, {"text": "Once upon a time."}),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_every_shape(name: str) -> None:
    """Guards the reading of each shape: what is asked, what is answered, and nothing lost between."""
    row, example = GOOD[name]
    assert to_example(row, "rows.jsonl:1") == example


ODD = st.sampled_from([None, True, 0, 0.5, -1, 10**400, math.nan, math.inf, "0", "false", "", "[", "\ud83d", [], ["a"],
                       [["a", "b"]], {"tools": 1}, {"type": "text"}, [[[[]]]]])  # fmt: skip
KEYS = st.sampled_from(
    [*MASKS, *REASONING, "train_detail", "function_call", "tool_calls", "name", "value", "from", "x"]
)
BESIDES = st.sampled_from(["system", "tools", "chat_template_kwargs", "history", "label", "kto_tag", "id", "context"])


@given(
    shape=st.sampled_from([{"messages": [USER, ANSWER]}, {"instruction": "Rome?", "output": "Sunny."},
                           {"prompt": [USER], "completion": [ANSWER]}, {"prompt": "Rome?"}]),
    columns=st.dictionaries(BESIDES, ODD, max_size=2),
    keys=st.dictionaries(KEYS, ODD, max_size=3),
)  # fmt: skip
def test_odd_values_are_read_or_refused(shape: dict[str, Any], columns: dict[str, Any], keys: dict[str, Any]) -> None:
    """Guards against a traceback, and against a mark that reaches the template, whatever the new columns hold."""
    row = {**shape, **columns}
    for column in {"messages", "completion"} & row.keys():
        row[column] = [*row[column][:-1], {**row[column][-1], **keys}]
    try:
        example = to_example(row, "rows.jsonl:1")
        json.dumps(example, sort_keys=True, ensure_ascii=False).encode()
        assert all(message.get("train") in (None, False) for message in example["messages"])
        assert all(MASKED.isdisjoint(message) for message in example["messages"])
        assert not {"tools", "tokenize"} & example.get("chat_template_kwargs", {}).keys()
    except DataError as error:
        assert error.where == "rows.jsonl:1"
    try:
        question, answer = to_prompt(row, "rows.jsonl:1", find_question_shape(row, "rows.jsonl:1"))
        assert question["messages"] and isinstance(answer, str)
    except DataError as error:
        assert error.where == "rows.jsonl:1"


@pytest.mark.parametrize("key", MASKS)
def test_a_mark_says_whether_a_turn_is_trained(key: str) -> None:
    """Guards ms-swift's, LLaMA-Factory's, Axolotl's and OpenAI's marks: an answer marked as wrong is not trained."""
    off = [False, 0, 0.0, "0", "0.0", "false", "False", "no"]
    for value in [*off, True, 1, 1.0, "1", "true", "yes", None]:
        wrong = {**ANSWER, key: value}
        example = to_example({"messages": [USER, wrong, USER, ANSWER]}, "rows.jsonl:1")
        expected = {**ANSWER, "train": False} if any(value is known for known in off) else ANSWER
        assert example == {"messages": [USER, expected, USER, ANSWER]}, value
        with pytest.raises(DataError, match="nothing of this row is trained") if "train" in expected else not_raising():
            to_example({"messages": [USER, wrong]}, "rows.jsonl:1")
    for value in [0.5, 2, -1, 10**400, float("nan"), float("inf"), "0.5", "maybe", "", [], {"a": 1}]:
        with pytest.raises(DataError, match=f"rows.jsonl:1: a message's '{key}' is "):
            to_example({"messages": [USER, {**ANSWER, key: value}, USER, ANSWER]}, "rows.jsonl:1")


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "null": ({"input": "Rome?", "output": None}, ["the assistant's text ('output') is missing"]),
    "empty": ({"input": " \n", "output": "Sunny."}, ["the user's text ('input') is empty"]),
    "a number": ({"input": "1 + 1", "output": 2}, ["('output') is not text but 2", "quotes"]),
    "an object": ({"input": "Rome?", "output": {"a": 1}}, ["is not text but {'a': 1}"]),
    "text of null": ({"text": None}, ["'text'", "missing"]),
    "half an emoji": ({"text": "cut \ud83d"}, ["half a character"]),
    "no messages": ({"messages": []}, ["an empty conversation"]),
    "messages of null": ({"messages": None}, ["is not a list but None"]),
    "messages of prose": ({"messages": "Hello!"}, ["is not JSON: 'Hello!'"]),
    "unknown role": ({"messages": [{**USER, "role": "usr"}, ANSWER]}, ["unknown role 'usr'", "did you mean 'user'"]),
    "role of a list": ({"messages": [{"role": ["user"], "content": "a"}, ANSWER]}, ["unknown role ['user']"]),
    "no role": ({"messages": [{"content": "a"}, ANSWER]}, ["no 'role'"]),
    "a message of text": ({"messages": ["Hello"]}, ["a message has no 'role': 'Hello'"]),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, ["the assistant's text ('content') is missing"]),
    "empty answer": ({"messages": [USER, {"role": "assistant", "content": ""}]}, ["text ('content') is empty"]),
    "ends with the user": ({"messages": [USER, ANSWER, USER]}, ["ends with the user", "no answer to train"]),
    "ends with a tool": ({"messages": [USER, ANSWER, RESULT]}, ["ends with the tool"]),
    "a call without a name": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        ["a tool call has no name"],
    ),
    "arguments of prose": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": "Rome"}]}]},
        ["a tool call's arguments is not JSON", "'Rome'"],
    ),
    "a user who calls tools": ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, ["the user calls tools"]),
    "tools of prose": ({"messages": [USER, ANSWER], "tools": "weather"}, ["'tools' is not JSON"]),
    "tools of texts": ({"messages": [USER, ANSWER], "tools": ["weather"]}, ["'tools' is not a list of objects"]),
    "tools with half an emoji": ({"messages": [USER, ANSWER], "tools": [{"name": "\ud83d"}]}, ["what JSON cannot"]),
    "two system prompts": ({"messages": [SYSTEM, USER, ANSWER], "system": "Be long."}, ["two system prompts"]),
    "function_call of prose": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather()"}]},
        ["the function_call is not JSON"],
    ),
    "a picture part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        ["multimodal", "'image_url'"],
    ),
    "a picture column": ({"messages": [USER, ANSWER], "images": ["a.png"]}, ["multimodal", "'images'"]),
    "an unknown part": ({"messages": [{"role": "user", "content": [3]}, ANSWER]}, ["a content part is not text: 3"]),
    "SQuAD without an answer": ({"question": "Is it?", "answers": {"text": []}}, ["('answers') is missing"]),
    "marks that contradict": (
        {"messages": [USER, {**ANSWER, "loss": False, "weight": 1}]},
        ["mask keys contradict each other (loss: False, weight: 1)"],
    ),
    "a mark of a part": ({"messages": [USER, {**ANSWER, "train_detail": [{"train": False}]}]}, ["'train_detail'"]),
    "a question to be trained": (
        {"messages": [{**USER, "train": True}, ANSWER]},
        ["the user's turn is to be trained (train: True)", "train_on: everything"],
    ),
    "a prompt and a completion that is not trained": (
        {"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "train": 0}]},
        ["nothing of this row is trained", "excludes each"],
    ),
    "reasoning under two names": (
        {"messages": [USER, {**ANSWER, "reasoning": "South.", "thinking": "North."}]},
        ["both 'reasoning' and 'thinking'"],
    ),
    "reasoning of the user": ({"messages": [{**USER, "thinking": "Hm."}, ANSWER]}, ["the user has 'thinking'"]),
    "two contents": ({"messages": [USER, {**ANSWER, "value": "Rain."}]}, ["both 'content' and 'value'"]),
    "a history of prose": ({"query": "a", "response": "b", "history": "Hello"}, ["'history' is not JSON"]),
    "a history of triples": ({"query": "a", "response": "b", "history": [["a", "b", "c"]]}, ["not a list of pairs"]),
    "a history of messages": ({"query": "a", "response": "b", "history": [USER, ANSWER]}, ["not a list of pairs"]),
    "a history of numbers": ({"query": "a", "response": "b", "history": [["a", 3]]}, ["('history') is not text but 3"]),
    "history beside messages": (
        {"prompt": [USER], "completion": [ANSWER], "history": [["a", "b"]]},
        ["'history' beside a prompt of messages"],
    ),
    "kwargs of prose": ({"messages": [USER, ANSWER], "chat_template_kwargs": "no"}, ["'chat_template_kwargs' is not"]),
    "kwargs of a list": ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, ["is not an object but [1]"]),
    "kwargs that set the tools": (
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"tools": []}},
        ["'chat_template_kwargs' sets 'tools'", "the column 'tools'"],
    ),
    "kwargs that change the form": (
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": True}},
        ["'chat_template_kwargs' sets 'tokenize'"],
    ),
    "a tool without a name": ({"messages": [USER, ANSWER], "tools": [{"description": "now"}]}, ["with a name"]),
    "a tool of the server's": ({"messages": [USER, ANSWER], "tools": [{"type": "web", "function": {"name": "a"}}]},
                               ["a tool is not a function"]),
    "KTO, a bad answer": (
        {"prompt": "Rome?", "completion": "Snow.", "label": False},
        ["marked as bad ('label' is False)", "KTO", "columns:"],
    ),
    "KTO in numbers": ({"prompt": "Rome?", "completion": "Snow.", "label": 0}, ["marked as bad ('label' is 0)"]),
    "a mark of a content part": (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "Snow.", "train": False}]}]},
        ["a content part has 'train'", "trained whole or not at all"],
    ),
    "arguments under another name": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "weather", "parameters": {"city": "a"}}]}]},
        ["a tool call has 'parameters' and no 'arguments'"],
    ),
    "KTO of LLaMA-Factory": ({"messages": [USER, ANSWER], "kto_tag": "false"}, ["'kto_tag' is 'false'"]),
    "messages and text": ({"prompt": [USER], "completion": "Sunny."}, ["one is a list"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_say_what_is_wrong(name: str) -> None:
    """Guards against rows that would train nothing, or something else than they say."""
    row, parts = BAD[name]
    with pytest.raises(DataError) as caught:
        to_example(row, "rows.jsonl:7")
    for part in ["rows.jsonl:7: ", "help:", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        (["frage", "antwort"], "column_map: {input: frage, output: antwort}"),
        (["prompt", "response", "category"], "column_map: {completion: response}"),
        (["instuction", "output"], "column_map: {instruction: instuction}"),
        (["question", "reply"], "column_map: {answer: reply}"),
        (["prompt", "chosen", "rejected"], "column_map: {completion: chosen} (SFT on the chosen answers"),
        (["question", "response_a", "response_b"], "column_map: {input: COLUMN, output: COLUMN}"),
        (["a", "b", "c"], "column_map: {input: COLUMN, output: COLUMN}"),
    ],
)
def test_unknown_columns_come_with_a_mapping(columns: list[str], mapping: str) -> None:
    """Guards against a message that names the fault and leaves the remedy to the reader."""
    with pytest.raises(DataError) as caught:
        to_example(dict.fromkeys(columns, "text"), "rows.jsonl:1")
    message = str(caught.value)
    assert mapping in message
    assert all(repr(column) in message for column in columns)
    assert "messages" in message and "instruction + output" in message and "document + summary" in message


# A row of no known shape, and what the rows of its set must become once the printed hint is followed.
DIALOG = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny."}]
FROM = [{"from": "human", "value": "Rome?"}, {"from": "gpt", "value": "Sunny."}]
HINTED: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "lmsys": ({"conversation_id": "a", "conversation": DIALOG, "turn": 1}, [USER, ANSWER]),
    "another name for a dialog": ({"dialog": FROM}, [USER, ANSWER]),
    "a dialog and its system prompt": ({"chat": DIALOG, "system_prompt": "Be brief."}, [SYSTEM, USER, ANSWER]),
    "DPO": ({"prompt": "Rome?", "chosen": "Sunny.", "rejected": "Snow."}, [USER, ANSWER]),
    "DPO, question": ({"question": "Rome?", "chosen": "Sunny.", "rejected": "Snow."}, [USER, ANSWER]),
    "DPO, whole conversations": (
        {"prompt": "Rome?", "chosen": DIALOG, "rejected": [USER, {"role": "assistant", "content": "Snow."}]},
        [USER, ANSWER],
    ),
    "DPO, TRL's conversational form": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "Snow."}]},
        [USER, ANSWER],
    ),
    "OpenOrca": (
        {"id": "a", "system_prompt": "Be brief.", "question": "Rome?", "response": "Sunny."},
        [SYSTEM, USER, ANSWER],
    ),
    "prompt and response": ({"prompt": "Rome?", "response": "Sunny."}, [USER, ANSWER]),
    "problem and solution": ({"problem": "Rome?", "solution": "Sunny."}, [USER, ANSWER]),
    "input and target": ({"input": "Rome?", "target": "Sunny."}, [USER, ANSWER]),
    "article and highlights": (
        {"article": "Long.", "highlights": "Short.", "id": "a"},
        said("Summarize:\n\nLong.", "Short."),
    ),
    "Human and Assistant": ({"Human": "Rome?", "Assistant": "Sunny."}, [USER, ANSWER]),
    "capital letters": ({"Question": "Rome?", "Answer": "Sunny."}, [USER, ANSWER]),
    "Alpaca in capital letters": (
        {"Instruction": "Add.", "Input": "1 and 2", "Response": "3", "History": [["Hi", "Hello"]]},
        said("Hi", "Hello", "Add.\n\n1 and 2", "3"),
    ),
    "SQuAD in capital letters": (
        {"Context": "It is hot.", "Question": "Is it?", "Answer": "Hot."},
        said("It is hot.\n\nIs it?", "Hot."),
    ),
    "a name that YAML would misread": ({"Question:": "Rome?", "reply": "Sunny."}, [USER, ANSWER]),
    "the answer before the question": ({"antwort": "Sunny.", "frage": "Rome?"}, [USER, ANSWER]),
    "a slip": ({"instuction": "Rome?", "output": "Sunny."}, [USER, ANSWER]),
}


@pytest.fixture
def follow(tmp_path: Path) -> Callable[[dict[str, Any], str], list[dict[str, Any]]]:
    """The examples of a row under a recipe with the map that a message has printed."""

    def follow(row: dict[str, Any], message: str) -> list[dict[str, Any]]:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        printed = re.search(r"((?:column|role)_map): (\{.*?\})", message)
        assert printed, message
        keys = {"dataset_name": str(tmp_path / "rows.jsonl"), printed[1]: yaml.safe_load(printed[2])}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
        return mixture.load(load_recipe(str(tmp_path / "recipe.yaml"), []))[0].examples

    return follow


def refusal(row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        to_example(row, "rows.jsonl:1")
    return str(caught.value)


@pytest.mark.parametrize("name", HINTED)
def test_a_hint_that_is_followed_gives_the_right_rows(name: str, follow: Callable[..., Any]) -> None:
    """Guards against a hint that trains the rejected answer, the question, or a part of the row alone."""
    row, messages = HINTED[name]
    assert follow(row, refusal(row)) == [{"messages": messages}]


def test_every_pair_of_names_that_is_recognized_is_read_rightly(follow: Callable[..., Any]) -> None:
    """Guards the tables behind the hints: whichever two names are recognized, question and answer keep their parts."""
    for asked, answered in ((asked, answered) for asked, (_, answers) in ASKED.items() for answered in answers):
        row = {answered: "Sunny.", asked: "Rome?"}
        summary = "Summarize:\n\n" * (asked in ("article", "document"))
        try:
            example = to_example(row, "rows.jsonl:1")
        except DataError as error:
            (example,) = follow(row, str(error))
        assert example == {"messages": said(f"{summary}Rome?", "Sunny.")}, row


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Rome?", "correct": "Sunny.", "incorrect": "Snow."},
        {"conversation_a": DIALOG, "conversation_b": DIALOG, "winner": "a"},
        {"chosen": "Human: Rome? Assistant: Sunny.", "rejected": "Human: Rome? Assistant: Snow."},
        {"prompt": "Rome?", "chosen": [ANSWER], "rejected": [ANSWER]},
        {"sentence": "Sunny.", "label": "weather"},
        {"dialog": ["Rome?", "Sunny."]},
        {"prompt": DIALOG, "response": "Rain."},
        {"chat": [USER]},
        {"article": "Long.", "answer": "Short."},
        {"user": "Ann", "response": "Sunny."},
        {"source": "wiki", "solution": "Sunny."},
        {"question": "Rome?", "solution": ["Sunny."]},
        {"translation": {"de": "Hallo", "en": "Hello"}},
        {"": "a", "b": "c"},
    ],
    ids=lambda row: " + ".join(row),
)
def test_no_column_is_named_where_the_right_one_is_not_known(row: dict[str, Any]) -> None:
    """Guards against a guess: by their names alone, these columns can be read in more than one way."""
    printed = re.search(r"column_map: \{(.*?)\}", refusal(row))
    assert not printed or set(re.findall(r": (\w+)", printed[1])) == {"COLUMN"}


BESIDE: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "reasoning": (
        {"question": "Rome?", "reasoning": "South.", "answer": "Sunny."},
        [USER, {**ANSWER, "reasoning_content": "South."}], {},
    ),
    "a system prompt": ({"messages": [USER, ANSWER], "system_prompt": "Be brief."}, [SYSTEM, USER, ANSWER], {}),
    "functions": (
        {"conversations": [USER, ANSWER], "functions": [{"name": "weather"}]},
        [USER, ANSWER], {"tools": [{"type": "function", "function": {"name": "weather"}}]},
    ),
    "an input in capital letters": (
        {"instruction": "Add.", "Input": "1 and 2", "output": "3"}, said("Add.\n\n1 and 2", "3"), {},
    ),
    "a context in capital letters": (
        {"question": "Is it?", "Context": "It is hot.", "answer": "Hot."}, said("It is hot.\n\nIs it?", "Hot."), {},
    ),
    "classes": ({"text": "Rome?", "label": "Sunny."}, [USER, ANSWER], {}),
    "a summary of a text": ({"text": "Long.", "summary": "Short."}, said("Summarize:\n\nLong.", "Short."), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_a_hint_for_an_unused_column_reads_it(name: str, follow: Callable[..., Any]) -> None:
    """Guards the notes on unused columns: the map that they print reads the column as what it is."""
    row, messages, more = BESIDE[name]
    converter = Converter("rows.jsonl", None)
    converter.example("rows.jsonl:1", row)
    (remark,) = converter.remarks()
    assert follow(row, str(remark)) == [{"messages": messages, **more}]


def test_text_without_a_question_is_a_document(follow: Callable[..., Any]) -> None:
    row = {"content": "Once upon a time.", "url": "a"}
    assert follow(row, refusal(row)) == [{"text": "Once upon a time."}]


def test_every_column_that_can_be_mapped_to_is_read() -> None:
    """Guards `column_map`: a name that is accepted as a target and read by no shape would lose the column."""
    known = [
        *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "response", "context"),
        *("question", "answer", "answers", "query", "document", "summary", "text"),
        *("system", "tools", "chat_template_kwargs", "history", "reasoning_content"),
    ]
    assert sorted(COLUMNS) == sorted(known)


@pytest.mark.parametrize(
    ("name", "role"),
    [("bot", "assistant"), ("model", "assistant"), ("Customer", "user"), ("ipython", "tool"), ("context", "system")],
)
def test_a_role_that_is_known_elsewhere_comes_with_a_map(name: str, role: str, follow: Callable[..., Any]) -> None:
    """Guards the suggested `role_map`: followed, the turn has the role that the name stands for."""
    turns = [USER, ANSWER, {"role": name, "content": "A turn."}, USER, ANSWER]
    (example,) = follow({"messages": turns}, refusal({"messages": turns}))
    assert example["messages"][2]["role"] == role
    assert "did you mean 'user'? in the recipe: role_map: {usr: user}" in refusal(
        {"messages": [{**USER, "role": "usr"}]}
    )
    assert "role_map: {narrator: ROLE}, with one of system, developer, user," in refusal(
        {"messages": [{**USER, "role": "narrator"}]}
    )
