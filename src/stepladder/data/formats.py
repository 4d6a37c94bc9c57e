"""The shapes that rows come in, all turned into one: a list of messages, or plain text.

A shape is recognized by its columns. Each `from_…` function takes a row of one shape and checks
it; what it returns can be rendered without further looks at types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from stepladder.data.conversation import conversation, multimodal, put_system, text, tools_of
from stepladder.data.readers import Row, shown
from stepladder.errors import DataError
from stepladder.suggest import suggest

Example = dict[str, Any]  # {"messages": [...], maybe "tools": [...]} for a chat template, or {"text": "..."}

MEDIA_COLUMNS = frozenset({"image", "images", "audio", "audios", "video", "videos"})
ANSWERS = ("response", "answer", "output", "completion", "reply", "target")  # what an answer's column may be called


class Shape(NamedTuple):
    """A shape: the columns it needs, and how a row of it becomes an example."""

    name: str
    columns: frozenset[str]
    convert: Callable[[Row, str], Example]

    def __str__(self) -> str:
        return self.name


def from_messages(row: Row, where: str) -> Example:
    return {"messages": conversation(row["messages"], where)}


def from_conversations(row: Row, where: str) -> Example:
    return {"messages": conversation(row["conversations"], where)}


def from_prompt_completion(row: Row, where: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        example: Example = {"messages": conversation(prompt + completion, where)}
        if any(message.get("role") == "assistant" for message in prompt):
            example["prompt_messages"] = len(prompt)  # whose answers are context, not training
        return example
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError(
            "of prompt and completion, one is a list of messages and the other is not",
            where=where,
            way_out="both as text, or both as lists of messages",
        )
    return pair(prompt, "prompt", completion, "completion", where)


def from_alpaca(row: Row, where: str) -> Example:
    example = pair(row["instruction"], "instruction", row["output"], "output", where)
    if more := _optional(row, "input", where):
        example["messages"][0]["content"] += f"\n\n{more}"
    return example


def from_question_answer(row: Row, where: str) -> Example:
    answer, column = (row["answer"], "answer") if "answer" in row else (_first_answer(row["answers"]), "answers")
    example = pair(row["question"], "question", answer, column, where)
    if context := _optional(row, "context", where):
        question = example["messages"][0]
        question["content"] = f"{context}\n\n{question['content']}"
    return example


def _first_answer(answers: Any) -> Any:
    """SQuAD's `{"text": [...]}`, or a list of texts: its first; None where a question has no answer."""
    found = answers.get("text") if isinstance(answers, dict) else answers
    return (found[0] if found else None) if isinstance(found, list) else found


def from_summary(row: Row, where: str) -> Example:
    example = pair(row["document"], "document", row["summary"], "summary", where)
    example["messages"][0]["content"] = "Summarize:\n\n" + example["messages"][0]["content"]
    return example


def from_input_output(row: Row, where: str) -> Example:
    return pair(row["input"], "input", row["output"], "output", where)


def from_text(row: Row, where: str) -> Example:
    return {"text": text(row["text"], "row", "text", where)}


def _shape(columns: str, convert: Callable[[Row, str], Example]) -> Shape:
    return Shape(columns, frozenset(columns.split(" + ")), convert)


SHAPES = [  # in the order in which they are looked for
    _shape("messages", from_messages),
    _shape("conversations", from_conversations),
    _shape("prompt + completion", from_prompt_completion),
    _shape("instruction + output", from_alpaca),
    _shape("question + answer", from_question_answer),
    _shape("question + answers", from_question_answer),
    _shape("document + summary", from_summary),
    _shape("input + output", from_input_output),
    _shape("text", from_text),
]
COLUMNS = frozenset({"system", "tools", "context"}.union(*(shape.columns for shape in SHAPES)))


def shape_of(row: Row, where: str) -> Shape:
    """The shape that a row's columns show.

    Raises:
        DataError: none; the message lists what was seen, what is known, and how to map one to the other.
    """
    for shape in SHAPES:
        if shape.columns <= row.keys():
            return shape
    raise DataError(
        f"columns {', '.join(map(shown, row)) or '(none)'} are of no known shape",
        where=where,
        why=f"known: {'; '.join(map(str, SHAPES))}",
        way_out=_mapping_for(list(row)),
    )


def _mapping_for(columns: list[str]) -> str:
    """A `column_map` that would make these columns a known shape, as near as can be guessed."""
    shape = max(SHAPES, key=lambda shape: len(shape.columns.intersection(columns)))
    if not shape.columns.intersection(columns):
        shape = next(shape for shape in SHAPES if shape.convert is from_input_output)
    free = [column for column in columns if column not in shape.columns]
    missing = sorted(shape.columns.difference(columns))
    pairs: dict[str, str] = {}
    for new in missing:
        names = [c for c in free if c.lower() in ANSWERS] if new in ANSWERS else []
        names += [c for c in free if suggest(new, [c])]
        if not names and len(free) == len(missing) - len(pairs):
            names = free
        pairs[new] = names[0] if names else "COLUMN"
        free = [column for column in free if column != pairs[new]]
    return f"in the recipe: column_map: {{{', '.join(f'{new}: {old}' for new, old in pairs.items())}}}"


def to_example(row: Row, where: str, shape: Shape | None = None) -> Example:
    """Turn a row into messages or text; `shape` is the one that the set's other rows have.

    Raises:
        DataError: another shape or none; a text that is missing, empty or not text; an unknown
            role; a conversation that trains nothing; pictures, sound or video.
    """
    if not MEDIA_COLUMNS.isdisjoint(row):
        for column in MEDIA_COLUMNS.intersection(row):
            if row[column]:
                raise multimodal(f"the column '{column}'", where)
    if shape is None:
        shape = shape_of(row, where)
    elif not shape.columns <= row.keys():
        raise DataError(
            f"columns {', '.join(map(shown, row)) or '(none)'}, while the rows of this set have {shape}",
            where=where,
            way_out="give all rows of a set the same columns, or make two sets of it (datasets: …)",
        )
    example = shape.convert(row, where)
    if "messages" in example:
        if system := _optional(row, "system", where):
            put_system(system, example["messages"], where)
        if row.get("tools") and (tools := tools_of(row["tools"], where)):
            example["tools"] = tools
    return example


def pair(question: Any, asked: str, answer: Any, answered: str, where: str) -> Example:
    """A question and its answer, from the columns named `asked` and `answered`."""
    return {
        "messages": [
            {"role": "user", "content": text(question, "user", asked, where)},
            {"role": "assistant", "content": text(answer, "assistant", answered, where)},
        ]
    }


def _optional(row: Row, column: str, where: str) -> str | None:
    """The text of a column that may be absent, null or blank."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text(value, "row", column, where)
