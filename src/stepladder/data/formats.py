"""The shapes that rows come in, all turned into one: a list of messages, or plain text.

A shape is recognized by its columns. An example is checked: it can be rendered without further looks at types.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from stepladder.data.conversation import (
    Message,
    RoleMap,
    conversation,
    multimodal,
    plain,
    put_system,
    text,
    tools_of,
)
from stepladder.data.readers import Row, parse_nested, quote
from stepladder.errors import DataError, locate_errors

# {"messages": [...], maybe "tools", "chat_template_kwargs", "prompt_messages"} for a chat template, or {"text": "..."}
Example = dict[str, Any]

MEDIA_COLUMNS = frozenset({"image", "images", "audio", "audios", "video", "videos"})
BAD = ("false", "0", "0.0")  # KTO's mark of a bad answer, as text
BESIDE_MESSAGES = ("tools", "chat_template_kwargs")  # what a chat template is given beside the messages
FOR_TEMPLATE = frozenset({"system", *BESIDE_MESSAGES})
FOR_ANSWER = FOR_TEMPLATE | {"history", "reasoning_content"}
# What a row's chat_template_kwargs may not set: the arguments that decide what is rendered, and in which form.
RESERVED = frozenset({
    *("conversation", "conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
})  # fmt: skip


class Shape(NamedTuple):
    """A shape: the columns `asked` and `answer` that it needs, and those that are read where a row has them.

    `answer` is empty where one column holds all. The texts of the columns `before` and `after` become part of the
    question; `used` are all columns that are read.
    """

    name: str
    asked: str
    answer: str
    columns: frozenset[str]
    used: frozenset[str]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def _shape(name: str, before: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> Shape:
    columns = name.split(" + ")
    asked, answer = columns if len(columns) == 2 else (name, "")
    beside = FOR_ANSWER if answer else FOR_TEMPLATE if name != "text" else frozenset[str]()
    return Shape(name, asked, answer, frozenset(columns), beside.union(columns, before, after), before, after)


SHAPES = [  # in the order in which they are looked for
    _shape("messages"),
    _shape("conversations"),
    _shape("prompt + completion"),
    _shape("instruction + output", after=("input", "context")),
    _shape("instruction + response", after=("input", "context")),
    _shape("question + answer", before=("context",)),
    _shape("question + answers", before=("context",)),
    _shape("query + response"),
    _shape("document + summary"),
    _shape("input + output"),
    _shape("text"),
]
COLUMNS = frozenset().union(*(shape.used for shape in SHAPES))


def _convert(row: Row, shape: Shape, role_map: RoleMap | None) -> Example:
    """What the columns of a row's shape hold, as an example."""
    if shape.name == "text":
        return _document(row)
    if not shape.answer:
        return {"messages": conversation(row[shape.asked], role_map)}
    question, answer = row[shape.asked], row[shape.answer]
    if shape.asked == "prompt" and (isinstance(question, list) or isinstance(answer, list)):
        return _prompt_completion(row, role_map)
    if shape.answer == "answers":  # the first of several; a question may have none
        answer = next(iter(listed_answers(answer)), None)
    example = pair(question, shape.asked, answer, shape.answer)
    before = ["Summarize:"] if shape.asked == "document" else [_optional(row, column) for column in shape.before]
    texts = [*before, example["messages"][0]["content"], *(_optional(row, column) for column in shape.after)]
    example["messages"][0]["content"] = "\n\n".join(filter(None, texts))
    return example


def _prompt_completion(row: Row, role_map: RoleMap | None) -> Example:
    """TRL's conversational form of prompt and completion: two lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise DataError(
            "of prompt and completion, one is a list of messages and the other is not",
            help="both as text, or both as lists of messages",
        )
    for column in ("history", "reasoning_content"):
        if is_filled(row.get(column)):
            raise DataError(f"'{column}' beside a prompt of messages", help="put it into them")
    example: Example = {"messages": conversation(prompt + completion, role_map)}
    if any(message["role"] == "assistant" for message in example["messages"][: len(prompt)]):
        example["prompt_messages"] = len(prompt)  # whose answers are context, not training
    return example


def listed_answers(answers: Any) -> list[Any]:
    """All answers of SQuAD's `{"text": [...]}`, of a list of texts, or the value as the one answer."""
    found = answers.get("text") if isinstance(answers, dict) else answers
    return found if isinstance(found, list) else [found]


def _document(row: Row) -> Example:
    """A document. Chat logs have one turn per row, which would train what the customers say."""
    if speaker := next((name for name in ("role", "speaker", "from", "author") if is_filled(row.get(name))), None):
        raise DataError(
            f"the row is one turn of a conversation ('{speaker}': {quote(row[speaker])})",
            why="its text would be trained as a document, whoever says it",
            help='a row per conversation: {"messages": [{"role": "user", "content": "…"}, …]}; '
            "or documents without that column (columns: [text] of datasets)",
        )
    return {"text": text(row["text"], "row", "text")}


def to_example(row: Row, where: str, shape: Shape, role_map: RoleMap | None = None) -> Example:
    """Turn a row into messages or text; `shape` is the one that the set's other rows have.

    Raises:
        DataError: another shape; a text that is missing, empty or not text; an unknown
            role; a conversation that trains nothing; an answer marked as bad (KTO); pictures, sound or video.
    """
    with locate_errors(where):
        if not shape.columns <= row.keys():
            raise DataError(
                f"columns {', '.join(map(quote, row)) or '(none)'}, while the rows of this set have {shape}",
                help="give all rows of a set the same columns, or make two sets of it (datasets: …)",
            )
        if column := bad_answer(row, shape):
            raise DataError(
                f"the row's answer is marked as bad ('{column}' is {quote(row[column])})",
                why="rows of KTO: such an answer is one that the model should not give",
                help=f"remove the row; where '{column}' means something else, leave it out (columns: of datasets)",
            )
        example = _read(row, shape, role_map)
        if "messages" in example:
            _check_answers(example["messages"], example.get("prompt_messages", 0))
        return example


def to_prompt(row: Row, where: str, shape: Shape) -> tuple[Example, str]:
    """What a row asks, as training rows of its shape are read, and its answer, empty where it has none.

    Args:
        shape: as `columns.find_question_shape` finds it.

    Raises:
        DataError: as `to_example`, but for the answer; a row that asks nothing.
    """
    with locate_errors(where):
        if shape.name == "text":
            return {"messages": [{"role": "user", "content": text(row["text"], "user", "text")}]}, ""
        is_answered = not shape.answer or is_filled(row.get(shape.answer))
        if not is_answered:
            filler: Any = "?"
            if isinstance(row.get("prompt"), list):
                filler = [{"role": "assistant", "content": "?"}]
            row = {**row, shape.answer: filler}
        question, answer = split_answer(_read(row, shape, None))
        if not question["messages"]:
            raise DataError("this row holds no prompt", help="a user's turn before the answer")
        return question, "" if not is_answered or bad_answer(row, shape) else answer


def split_answer(example: Example) -> tuple[Example, str]:
    """A conversation without its last turn where that is the assistant's, and that turn's text.

    The marks of what is trained are left out: they are nothing to a model that is asked.
    """
    turns = [{key: value for key, value in turn.items() if key != "train"} for turn in example["messages"]]
    answer = str(turns.pop()["content"]) if turns[-1]["role"] == "assistant" else ""
    return {"messages": turns, **{key: example[key] for key in BESIDE_MESSAGES if key in example}}, answer


def unused_columns(row: Row, shape: Shape) -> list[str]:
    """The columns of a row that hold something and are not read."""
    rest = [column for column in row if column not in shape.used]
    return [column for column in rest if is_filled(row[column]) and not _is_verdict(row[column], column, shape)]


def is_filled(value: Any) -> bool:
    """Whether a column holds something: false and 0 are something, an empty text or list is not."""
    return bool(value) or isinstance(value, int | float)


def bad_answer(row: Row, shape: Shape) -> str | None:
    """The column by which a row of KTO's says that its answer is a bad one."""
    for column in ("label", "kto_tag"):
        if column in row and _is_verdict(row[column], column, shape) and str(row[column]).strip().lower() in BAD:
            return column
    return None


def _is_verdict(value: Any, column: str, shape: Shape) -> bool:
    """Whether a column says if the answer is a good one: `label` (TRL, ms-swift) or `kto_tag` (LLaMA-Factory).

    Numbers do so beside prompt and completion alone: elsewhere they may be classes.
    """
    if column not in ("label", "kto_tag"):
        return False
    if column == "label":
        fits = shape.name in ("messages", "conversations", "prompt + completion", "query + response")
    else:
        fits = shape.name != "text"
    numbers = ("0", "1", "0.0", "1.0") if shape.name == "prompt + completion" else ()
    if not fits or not isinstance(value, bool | int | float | str) or (isinstance(value, int) and abs(value) > 1):
        return False
    return str(value).strip().lower() in ("true", "false", *numbers)


def _read(row: Row, shape: Shape, role_map: RoleMap | None) -> Example:
    """The example of a row, with what stands in the columns beside its conversation."""
    if not MEDIA_COLUMNS.isdisjoint(row):
        for column in MEDIA_COLUMNS.intersection(row):
            if row[column]:
                raise multimodal(f"the column '{column}'")
    example = _convert(row, shape, role_map)
    if "messages" not in example:
        return example
    messages = example["messages"]
    if "history" in shape.used:
        if is_filled(row.get("history")):
            messages[:0] = _history(row["history"])
        if reasoning := _optional(row, "reasoning_content"):
            messages[-1]["reasoning_content"] = reasoning
    if system := _optional(row, "system"):
        put_system(system, messages)
        if "prompt_messages" in example:
            example["prompt_messages"] += 1
    if row.get("tools") and (tools := tools_of(row["tools"])):
        example["tools"] = tools
    if is_filled(row.get("chat_template_kwargs")) and (kwargs := _kwargs(row["chat_template_kwargs"])):
        example["chat_template_kwargs"] = kwargs
    return example


def _check_answers(messages: list[Message], first: int) -> None:
    """Refuse a conversation without an answer at its end, or whose answers from `first` on are all excluded."""
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the conversation ends with the {messages[-1]['role']}, so there is no answer to train",
            help="remove its last turn or add an answer",
        )
    if all(turn["role"] != "assistant" or turn.get("train") is False for turn in messages[first:]):
        raise DataError(
            "nothing of this row is trained",
            why="the data excludes each of its assistant turns (train: false, loss: false, weight: 0, …)",
            help="remove the row",
        )


def _history(value: Any) -> list[Message]:
    """The turns before the question, from pairs of a question and its answer (LLaMA-Factory, ms-swift)."""
    pairs = parse_nested(value, "'history'")
    if not isinstance(pairs, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in pairs):
        raise DataError(f"'history' is not a list of pairs but {quote(value)}", help='[["question", "answer"], …]')
    return [turn for asked, answer in pairs for turn in pair(asked, "history", answer, "history")["messages"]]


def _kwargs(value: Any) -> dict[str, Any]:
    """The values that a row gives to the chat template, such as `{"enable_thinking": false}`."""
    name = "'chat_template_kwargs'"
    kwargs = parse_nested(value, name)
    if not isinstance(kwargs, dict):
        raise DataError(f"{name} is not an object but {quote(value)}", help='{"enable_thinking": false}')
    plain(kwargs, name)
    if taken := sorted(RESERVED.intersection(kwargs)):
        raise DataError(
            f"{name} sets '{taken[0]}'",
            why="training itself sets it; these values are the chat template's own",
            help="put the tools into the column 'tools'" if taken[0] == "tools" else f"remove '{taken[0]}'",
        )
    return {key: item for key, item in kwargs.items() if item is not None}


def pair(question: Any, asked: str, answer: Any, answered: str) -> Example:
    """A question and its answer, from the columns named `asked` and `answered`."""
    return {
        "messages": [
            {"role": "user", "content": text(question, "user", asked)},
            {"role": "assistant", "content": text(answer, "assistant", answered)},
        ]
    }


def _optional(row: Row, column: str) -> str | None:
    """The text of a column that may be absent, null or blank."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text(value, "row", column)
