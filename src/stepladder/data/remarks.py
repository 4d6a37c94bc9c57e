"""What a person should know of rows that can be used: in the same words before training and in an audit."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepladder.errors import DataError

# What is remarked of `{rows}` (a count and a share); `{detail}` is the token or the key that it is about.
TEXTS = {
    "dropped_thoughts": (
        "{rows}: the chat template drops the reasoning of earlier turns, so it is not trained",
        "a row for each turn trains them all",
    ),
    "special_tokens": (
        "{rows} hold special tokens as text, {detail} first: the model reads them as the tokens themselves",
        "write them otherwise, unless they are meant",
    ),
    "foreign_end": (
        "{rows} have an answer that ends in {detail} as text, before the end of turn that the template writes",
        "remove it from the answers",
    ),
    "unopened": (
        "{rows} answer without {detail}, with which the template's generation prompt ends: the model is asked after "
        "what it is not trained after",
        "answers with reasoning (reasoning_content), or a template whose prompt opens no thought",
    ),
    "unasked": (
        "{rows} are trained to begin an answer with {detail}: no generation prompt of the chat template writes it",
        "{{% if add_generation_prompt %}} in the template",
    ),
    "trimmed": (
        "{rows} have an answer that begins or ends with white space, which the chat template strips",
        "another chat_template where the white space matters (code)",
    ),
    "half_thought": (
        "{rows} have an answer with </think> and no <think> before it: what stands before it is read as a thought",
        "right where the generation prompt opens the thought; else write the tag otherwise",
    ),
    "outside_blocks": (
        "{rows} have an answer of which the template's {{% generation %}} blocks leave out a part",
        "mark the whole turn in the template, unless the part is meant not to be trained",
    ),
    "changed_by_tokenizer": (
        "{rows} are changed by the tokenizer, which does not know or does not keep some of their characters",
        "another model, or other rows",
    ),
    "rendered_text": (
        "{rows} of plain text hold a rendered chat ({detail}): its questions are trained too",
        "messages, or prompt and completion, of which the answers alone are trained",
    ),
    "turn_without_end": (
        "{rows} have a turn that the chat template closes by no special token: the model does not learn to end it",
        "a chat_template that closes every turn",
    ),
    "unread_key": ("message keys that the chat template does not read: {detail} ({rows})", "they change nothing"),
    "unread_argument": (
        "chat_template_kwargs that the chat template does not read: {detail} ({rows})",
        "they change nothing",
    ),
    "no_beginning": (
        "{rows} begin without {detail}, which the tokenizer puts before every text: the chat template writes none",
        "right where the model was trained so; llama.cpp and Ollama add it by themselves",
    ),
    "parted": (
        "{rows} have an answer whose first characters the tokenizer would join with the prompt's last: they are "
        "tokenized apart, as the model is asked",
        "remove white space at the beginning of answers, unless the template puts it there",
    ),
    "joined": (
        "{rows} have an answer whose first token also holds the prompt's last characters: the model is trained after "
        "other tokens than it is asked after",
        "a template whose generation prompt ends in a special token or a line break",
    ),
}

# Of a set none of whose turns trains its end within max_length: what is wrong, and what helps.
NO_END = (
    "the end-of-turn token is trained in no turn, so the model would not learn to stop",
    "raise max_length where it cuts every answer; else use a chat template that ends the answer",
)


def share_of_rows(places: list[str], total: int) -> str:
    return f"{len(places):,} of {total:,} rows ({len(places) / total:.1%})"


@dataclass
class Remarks:
    """Rows by what is remarked of them, and the rows that were left out (`file:line: what`).

    `turns` are trained, and `ends` of them train their end of turn within `max_length`.
    """

    rows: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    turns: int = 0
    ends: int = 0

    def add(self, kind: str, where: str, detail: str = "") -> None:
        """Remark a row once under each kind; the detail of the first stands for most kinds."""
        own = kind in ("unread_key", "unread_argument", "unopened")
        key = (kind, detail) if own else next((k for k in self.rows if k[0] == kind), (kind, detail))
        places = self.rows.setdefault(key, [])
        if not places or places[-1] != where:
            places.append(where)

    def skip(self, error: DataError) -> None:
        self.skipped.append(f"{error.where}: {error.what}")

    def join(self, other: Remarks) -> None:
        """Add what was remarked of the rows that follow."""
        for (kind, detail), places in other.rows.items():
            for where in places:
                self.add(kind, where, detail)
        self.skipped += other.skipped
        self.turns, self.ends = self.turns + other.turns, self.ends + other.ends

    def texts(self, total: int) -> list[tuple[str, str, str, list[str]]]:
        """Kind, what is remarked, what helps and the rows, of a set of so many rows."""
        found = []
        for (kind, detail), places in self.rows.items():
            text, help = TEXTS[kind]
            what = text.format(rows=share_of_rows(places, total), detail=repr(detail))
            found.append((kind, what, help.format(), places))
        return found

    def notes(self, total: int) -> list[str]:
        """What a run prints at its start: each remark with the first row that it concerns."""
        notes = [f"{text}, the first at {places[0]}: {help}" for _, text, help, places in self.texts(total)]
        if self.skipped:
            notes.append(f"{len(self.skipped):,} rows are skipped, the first at {self.skipped[0]}")
        return notes
