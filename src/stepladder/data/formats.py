"""The shapes that rows come in, all turned into one: a list of messages, or plain text.

A shape is recognized by its columns. Each function below takes a row of one shape.
"""

from __future__ import annotations

from typing import Any

from stepladder.errors import DataError

Message = dict[str, Any]
Example = dict[str, Any]  # {"messages": [...]} to be rendered by a chat template, or {"text": "..."}


def pair(question: Any, answer: Any) -> Example:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def from_messages(row: dict[str, Any]) -> Example:
    return {"messages": row["messages"]}


def from_prompt_completion(row: dict[str, Any]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        return {"messages": prompt + completion}
    return pair(prompt, completion)


def from_alpaca(row: dict[str, Any]) -> Example:
    question = row["instruction"]
    return pair(f"{question}\n\n{row['input']}" if row.get("input") else question, row["output"])


def from_input_output(row: dict[str, Any]) -> Example:
    return pair(row["input"], row["output"])


def from_question_answer(row: dict[str, Any]) -> Example:
    return pair(row["question"], row["answer"])


def from_text(row: dict[str, Any]) -> Example:
    return {"text": row["text"]}


# Columns that a shape needs, in the order in which they are looked for.
SHAPES = [
    ({"messages"}, from_messages),
    ({"prompt", "completion"}, from_prompt_completion),
    ({"instruction", "output"}, from_alpaca),
    ({"input", "output"}, from_input_output),
    ({"question", "answer"}, from_question_answer),
    ({"text"}, from_text),
]


def to_example(row: dict[str, Any], where: str) -> Example:
    """Turn a row into messages or text.

    Raises:
        DataError: no known shape has these columns, or a text is missing or not text.
    """
    for columns, convert in SHAPES:
        if columns <= row.keys():
            example = convert(row)
            _check(example, where)
            return example
    known = "; ".join(" + ".join(sorted(columns)) for columns, _ in SHAPES)
    raise DataError(
        f"columns {', '.join(map(repr, row))} are of no known shape",
        where=where,
        why=f"known: {known}",
        way_out="rename the columns",
    )


def _check(example: Example, where: str) -> None:
    if "text" in example:
        if not isinstance(example["text"], str) or not example["text"].strip():
            raise DataError("'text' is empty or not text", where=where, way_out="remove the row or fill it in")
        return
    messages = example["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError("an empty conversation", where=where, way_out="remove the row or fill it in")
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise DataError("a message has no 'role'", where=where, way_out='{"role": "user", "content": "…"}')
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise DataError(
                f"the {message['role']}'s text is {'missing' if content is None else 'empty or not text'}",
                where=where,
                why=f"found {content!r}",
                way_out="remove the row or fill it in",
            )
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            "no assistant turn, so nothing to train", where=where, way_out="remove the row or add an answer"
        )
