"""Rows of every shape to examples, and rows of none to a message that helps."""

from __future__ import annotations

from typing import Any

import pytest

from stepladder.data.formats import to_example
from stepladder.errors import DataError

USER, ANSWER = {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
RESULT = {"role": "tool", "content": "26 °C", "name": "weather", "tool_call_id": "c1"}
SYSTEM = {"role": "system", "content": "Be brief."}


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
            "tools": [{"name": "weather"}],
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
            "tools": [{"name": "weather"}],
        },
    ),
    "conversations with role and content": ({"conversations": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
    "prompt and completion": ({"prompt": "Rome?", "completion": "Sunny."}, {"messages": [USER, ANSWER]}),
    "prompt and completion, conversational": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
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
    "messages and text": ({"prompt": [USER], "completion": "Sunny."}, ["one is a list"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_say_what_is_wrong(name: str) -> None:
    """Guards against rows that would train nothing, or something else than they say."""
    row, parts = BAD[name]
    with pytest.raises(DataError) as caught:
        to_example(row, "rows.jsonl:7")
    for part in ["rows.jsonl:7: ", "way out:", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        (["frage", "antwort"], "column_map: {input: frage, output: antwort}"),
        (["instruction", "context", "response", "category"], "column_map: {output: response}"),
        (["instuction", "output"], "column_map: {instruction: instuction}"),
        (["question", "reply"], "column_map: {answer: reply}"),
        (["prompt", "chosen", "rejected"], "column_map: {completion: COLUMN}"),
        (["a", "b", "c"], "column_map: {input: COLUMN, output: COLUMN}"),
    ],
)
def test_unknown_columns_come_with_a_mapping(columns: list[str], mapping: str) -> None:
    """Guards against a message that names the fault and leaves the way out to the reader."""
    with pytest.raises(DataError) as caught:
        to_example(dict.fromkeys(columns, "text"), "rows.jsonl:1")
    message = str(caught.value)
    assert mapping in message
    assert all(repr(column) in message for column in columns)
    assert "messages" in message and "instruction + output" in message and "document + summary" in message
