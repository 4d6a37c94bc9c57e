"""The rows that no side of a comparison, nor what it was made of, was trained on; and the loss of a model on rows."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder.data import mixture
from stepladder.data.file_list import join
from stepladder.data.formats import Example
from stepladder.data.mixture import HeldOut
from stepladder.data.render import IGNORED, render
from stepladder.data.rows import Rows, Stream, normal_text, row_key, row_keys
from stepladder.errors import DataError, RecipeError
from stepladder.evaluation.generation import parallel_map
from stepladder.evaluation.questions import Question, extract_questions
from stepladder.files import read_object
from stepladder.manifest import RECIPE
from stepladder.model.start import MERGE
from stepladder.recipe import load as recipe_load
from stepladder.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_STREAMED = 50_000  # rows of a stream that are read again to know them
OTHER_ROWS = "--data FILE with rows that it was not trained on"
LEFT_OUT = (": they are left out", ", and none is left: all figures are of training rows, and say nothing of others")


class Runs:
    """The runs behind the sides of a comparison. Each is read once; what cannot be read is added to `notes`."""

    def __init__(self, notes: list[str]):
        self.notes = notes
        self._recipes: dict[Path, Recipe | None] = {}
        self._faults: dict[Path, str] = {}  # why a run's data or recipe cannot be read
        self._rows: dict[Path, tuple[Rows | None, Rows | None]] = {}

    def run_folders(self, source: str) -> list[Path]:
        """The run folders that trained a model: its own, that of a checkpoint, or those of what was merged."""
        folders = [Path(source)]
        with contextlib.suppress(ValueError):
            merged = read_object(folders[0] / MERGE).get("adapters")
            folders = [Path(name) for name in merged if isinstance(name, str)] if isinstance(merged, list) else []
        found = []
        for folder in folders:
            if not (folder / RECIPE).is_file() and re.fullmatch(r"checkpoint-\d+", folder.name):
                folder = folder.parent
            found += [folder] if (folder / RECIPE).is_file() else []
        return found

    def base_of(self, source: str) -> str | None:
        """The model that a run began from; None where that is not known."""
        recipes = [recipe for folder in self.run_folders(source) if (recipe := self._recipe(folder))]
        return str(recipes[0].get("model_name_or_path")) if recipes else None

    def lineage(self, source: str) -> list[Path]:
        """The runs behind a model, and behind the model that each of them began from."""
        found: dict[Path, Path] = {}
        open_, seen = [source], set()
        while open_:
            name = open_.pop()
            if name in seen:
                continue
            seen.add(name)
            found |= {folder.resolve(): folder for folder in self.run_folders(name)}
            open_ += [base] if (base := self.base_of(name)) else []
        return list(found.values())

    def trained_keys(self, source: str) -> set[str]:
        """The keys of all rows that are behind a model, as far as they are known."""
        found: set[str] = set()
        for folder in self.lineage(source):
            kept = mixture.read_held_out(folder)
            if kept and kept.trained is not None:
                found |= kept.trained
            elif (rows := self.rows(folder)[0]) is not None:
                found |= row_keys(rows.examples)
        return found

    def training_rows(self, source: str) -> Rows | None:
        """The rows that a model's own run was trained on, read again by its recipe; None where that cannot be."""
        parts = []
        for folder in self.run_folders(source):
            rows, kept = self.rows(folder)[0], mixture.read_held_out(folder)
            if rows is not None and kept and kept.trained is not None:
                same = [i for i, example in enumerate(rows.examples) if row_key(example) in kept.trained]
                if other := len(rows) - len(same):
                    self.notes.append(
                        f"the data of {folder} has changed: {other:,} of its {len(rows):,} rows were not trained on"
                    )
                rows = rows.take(same)
            parts += [rows] if rows else []
        if len(parts) < 2:
            return parts[0] if parts else None
        return Rows(
            " + ".join(rows.name for rows in parts),
            join([rows.examples for rows in parts]),
            join([rows.where for rows in parts]),
        )

    def held_out(self, source: str) -> Rows:
        """The rows that a model's run held out, found again by their content.

        Raises:
            DataError: it held none out, or they are no longer where its recipe reads them.
        """
        folder = self.run_folders(source)[0]
        kept = mixture.read_held_out(folder)
        if kept and not kept.rows:
            raise DataError(f"{folder} held out no rows", help=f"{OTHER_ROWS}, or train with --test_split_size 0.1")
        train, evaluation = self.rows(folder)
        if fault := self._faults.get(folder):
            raise DataError(f"the rows that {folder} held out cannot be read again", why=fault, help=OTHER_ROWS)
        if kept is None:
            if not evaluation:
                raise DataError(f"{folder} does not say which rows it held out", help=OTHER_ROWS)
            self.notes.append(f"{folder} keeps no {mixture.HELD_OUT}: its evaluation rows are read again by its recipe")
            return evaluation
        if kept.foreign:
            self.notes.append(
                f"{folder} was evaluated on {kept.foreign}, which came with other training data than its own"
            )
        return self._found(folder, kept, [rows for rows in (evaluation, train) if rows])

    def _found(self, folder: Path, kept: HeldOut, parts: list[Rows]) -> Rows:
        wanted = set(kept.held_out)
        there: dict[str, tuple[Example, str]] = {}
        for rows in parts:
            for example, where in zip(rows.examples, rows.where, strict=True):
                if (key := row_key(example)) in wanted:
                    there.setdefault(key, (example, where))
        pairs = [there[key] for key in kept.held_out if key in there]
        if not pairs:
            why = f"{kept.name} has other rows now; the first that was held out stood at {kept.where[0]}"
            raise DataError(f"the rows that {folder} held out are gone", why=why, help=OTHER_ROWS)
        if missing := len(kept.held_out) - len(pairs):
            self.notes.append(f"{missing:,} of the {len(kept.held_out):,} rows that {folder} held out are gone")
        if kept.rows > len(kept.held_out):
            self.notes.append(f"of the {kept.rows:,} rows that {folder} held out, the first {len(pairs):,} are used")
        return Rows(kept.name, [example for example, _ in pairs], [where for _, where in pairs])

    def rows(self, folder: Path) -> tuple[Rows | None, Rows | None]:
        """What a run trains and evaluates on, by its recipe today; None where it cannot be read, with a note."""
        if folder in self._rows:
            return self._rows[folder]
        self._rows[folder] = None, None
        recipe = self._recipe(folder)
        if recipe is None:
            return None, None
        try:
            train, evaluation = mixture.load(recipe)
            if isinstance(train, Stream):
                pairs = list(islice(train.read(0), MOST_STREAMED))
                if len(pairs) == MOST_STREAMED:
                    self.notes.append(f"of the stream that {folder} was trained on, {MOST_STREAMED:,} rows are known")
                train = Rows(train.name, [example for example, _ in pairs], [where for _, where in pairs])
        except (DataError, RecipeError) as error:
            self._fails(folder, "data", error)
            return None, None
        self._rows[folder] = train, evaluation
        return train, evaluation

    def _recipe(self, folder: Path) -> Recipe | None:
        if folder not in self._recipes:
            try:
                self._recipes[folder] = recipe_load.load(str(folder / RECIPE), [])
            except RecipeError as error:
                self._fails(folder, "recipe", error)
                self._recipes[folder] = None
        return self._recipes[folder]

    def _fails(self, folder: Path, part: str, error: DataError | RecipeError) -> None:
        self._faults[folder] = error.what
        self.notes.append(f"the {part} of {folder} cannot be read again: {error.what}")


def leave_out_trained(rows: Rows, trained: dict[str, set[str]], notes: list[str]) -> tuple[Rows, bool]:
    """The rows that no side was trained on; where there is none, all of them, and True: they are training rows.

    Args:
        trained: the keys of the rows behind each side, by its name.
        notes: how many rows were trained on, by side, is added to it.
    """
    keys = [row_key(example) for example in rows.examples]
    known: set[str] = set().union(*trained.values())
    free = [i for i, key in enumerate(keys) if key not in known]
    for name, own in trained.items():
        if count := sum(key in own for key in keys):
            notes.append(
                f"{count:,} of the {len(rows):,} rows of {rows.name} were trained on by {name}" + LEFT_OUT[not free]
            )
    return (rows.take(free), False) if free else (rows, True)


def leave_out_copies(rows: Rows, notes: list[str]) -> Rows:
    """Each row once: copies are not independent, and a test that counts them calls chance a difference."""
    first = _firsts(rows.examples)
    if copies := len(rows) - len(first):
        notes.append(
            f"{copies:,} of the {len(rows):,} rows of {rows.name} are copies of another one: they are left out"
        )
        return rows.take(first)
    return rows


def leave_out_copied_prompts(asked: list[Question], notes: list[str]) -> list[Question]:
    """Each prompt once, as `leave_out_copies`."""
    first = _firsts([_with_answer(question) for question in asked])
    if copies := len(asked) - len(first):
        notes.append(f"{copies} of {len(asked)} prompts are copies of another one: they are left out")
    return [asked[i] for i in first]


def _firsts(examples: Iterable[Example]) -> list[int]:
    """Where each row stands first, by all that it gives to the model, blanks apart."""
    found: dict[str, int] = {}
    for i, example in enumerate(examples):
        found.setdefault(normal_text(example), i)
    return list(found.values())


def leave_out_trained_prompts(asked: list[Question], trained: dict[str, set[str]], notes: list[str]) -> list[Question]:
    """The prompts that no side was trained on with their reference answers.

    Raises:
        DataError: none is left.
    """
    known: set[str] = set().union(*trained.values())
    free = [question for question in asked if not question.reference or row_key(_with_answer(question)) not in known]
    if not free:
        raise DataError("each prompt was trained on, with its answer", help="other prompts")
    if count := len(asked) - len(free):
        notes.append(f"{count} of {len(asked)} prompts were trained on, with their answers: they are left out")
    return free


def _with_answer(question: Question) -> Example:
    answer = {"role": "assistant", "content": question.reference}
    return question.example | {"messages": [*question.messages, answer]}


def note_asked_questions(asked: list[Question], training: dict[str, Rows]) -> list[str]:
    """Notes on questions that stand in the training rows of a side, with whichever answer."""
    mine = [row_key(question.example) for question in asked]
    notes = []
    for name, rows in training.items():
        known = {row_key(question.example) for question in extract_questions(rows)}
        if count := sum(key in known for key in mine):
            notes.append(f"{count} of {len(asked)} questions were asked in the training of {name} too")
    return notes


class RowLoss(NamedTuple):
    """The negative log-likelihood of a row's trained tokens (nats, summed), and how many they are."""

    nats: float
    tokens: int


def measure_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, batch_size: int = 8
) -> list[RowLoss]:
    """The loss of each row, in their order; the ranks share them out.

    Raises:
        ModelError: conversations and a tokenizer without a chat template.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    items = render(rows, tokenizer).remove_columns("rows").to_list()
    # Rows of like length together: less padding. Their order is restored at the end.
    order = sorted(range(len(items)), key=lambda i: len(items[i]["input_ids"]))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters

    def batch_of(numbers: list[int]) -> list[RowLoss]:
        def padded(column: str, value: int) -> torch.Tensor:
            cells = [torch.tensor(items[i][column]) for i in numbers]
            return pad_sequence(cells, batch_first=True, padding_value=value).to(model.device)

        # Without a mask: what a token sees lies before it, and the padding behind.
        ids, labels = padded("input_ids", tokenizer.pad_token_id), padded("labels", IGNORED)[:, 1:]
        # The prompts' scores are not asked for: with 150,000 words they would take most of the memory.
        trained = (labels != IGNORED).any(0).tolist()
        labels = labels[:, trained.index(True) if any(trained) else 0 :]
        scored = {"logits_to_keep": labels.shape[1] + 1} if keeps else {}
        with torch.inference_mode():
            logits = model(ids, **scored).logits
        found = []
        # Counted from the end: before the first token there may be virtual ones.
        for row, targets in zip(logits[:, -1 - labels.shape[1] : -1], labels, strict=True):
            own = targets != IGNORED
            nats = torch.nn.functional.cross_entropy(row[own].float(), targets[own], reduction="sum")
            found.append(RowLoss(nats.item(), int(own.sum())))
        return found

    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    losses = dict(zip(order, (loss for batch in parallel_map(batches, batch_of) for loss in batch), strict=True))
    return [losses[i] for i in range(len(items))]


def mean_loss(losses: list[RowLoss], base: list[RowLoss] | None = None) -> float:
    """Nats per token: every token counts once, whatever its row's length.

    Args:
        base: the losses of another model on the same rows, by whose tokens is divided: two models with
            tokenizers of their own cut the same text into different numbers of tokens.
    """
    return sum(loss.nats for loss in losses) / sum(loss.tokens for loss in base or losses)
