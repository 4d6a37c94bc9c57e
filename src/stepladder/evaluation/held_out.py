"""The rows that a comparison may call held out: those that no side, nor what it was made of, was trained on."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from stepladder.data import mixture, row_keys
from stepladder.data.formats import Example
from stepladder.data.row_keys import Kept
from stepladder.data.rows import Rows
from stepladder.data.stream import Stream
from stepladder.errors import DataError, RecipeError
from stepladder.evaluation import questions
from stepladder.evaluation.questions import Question
from stepladder.files import read_object
from stepladder.manifest import RECIPE
from stepladder.model.merge import weights
from stepladder.recipe import load as recipe_load
from stepladder.recipe.recipe import Recipe

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

    def of(self, source: str) -> list[Path]:
        """The run folders that trained a model: its own, that of a checkpoint, or those of what was merged."""
        folder = Path(source)
        try:
            merged = read_object(folder / weights.MARK).get("adapters")
        except ValueError:
            return _run_of(folder)
        adapters = merged if isinstance(merged, list) else []
        return [run for adapter in adapters if isinstance(adapter, str) for run in _run_of(Path(adapter))]

    def base_of(self, source: str) -> str | None:
        """The model that a run began from; None where that is not known."""
        recipes = [recipe for folder in self.of(source) if (recipe := self._recipe(folder))]
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
            found |= {folder.resolve(): folder for folder in self.of(name)}
            open_ += [base] if (base := self.base_of(name)) else []
        return list(found.values())

    def trained(self, source: str) -> set[str]:
        """The keys of all rows that are behind a model, as far as they are known."""
        found: set[str] = set()
        for folder in self.lineage(source):
            kept = row_keys.read(folder)
            if kept and kept.trained is not None:
                found |= kept.trained
            elif (rows := self.rows(folder)[0]) is not None:
                found |= row_keys.keys(rows.examples)
        return found

    def training_rows(self, source: str) -> Rows | None:
        """The rows that a model's own run was trained on, read again by its recipe; None where that cannot be."""
        parts = []
        for folder in self.of(source):
            rows, kept = self.rows(folder)[0], row_keys.read(folder)
            if rows is not None and kept and kept.trained is not None:
                same = [i for i, example in enumerate(rows.examples) if row_keys.key(example) in kept.trained]
                if other := len(rows) - len(same):
                    self.notes.append(
                        f"the data of {folder} has changed: {other:,} of its {len(rows):,} rows were not trained on"
                    )
                rows = rows.take(same)
            parts += [rows] if rows else []
        if len(parts) < 2:
            return parts[0] if parts else None
        examples = [example for rows in parts for example in rows.examples]
        return Rows(
            " + ".join(rows.name for rows in parts), examples, [where for rows in parts for where in rows.where]
        )

    def held_out(self, source: str) -> Rows:
        """The rows that a model's run held out, found again by their content.

        Raises:
            DataError: it held none out, or they are no longer where its recipe reads them.
        """
        folder = self.of(source)[0]
        kept = row_keys.read(folder)
        if kept and not kept.rows:
            raise DataError(f"{folder} held out no rows", help=f"{OTHER_ROWS}, or train with --test_split_size 0.1")
        train, evaluation = self.rows(folder)
        if fault := self._faults.get(folder):
            raise DataError(f"the rows that {folder} held out cannot be read again", why=fault, help=OTHER_ROWS)
        if kept is None:
            if not evaluation:
                raise DataError(f"{folder} does not say which rows it held out", help=OTHER_ROWS)
            self.notes.append(f"{folder} keeps no {row_keys.FILE}: its evaluation rows are read again by its recipe")
            return evaluation
        if kept.foreign:
            self.notes.append(
                f"{folder} was evaluated on {kept.foreign}, which came with other training data than its own"
            )
        return self._found(folder, kept, [rows for rows in (evaluation, train) if rows])

    def _found(self, folder: Path, kept: Kept, parts: list[Rows]) -> Rows:
        wanted = set(kept.held_out)
        there: dict[str, tuple[Example, str]] = {}
        for rows in parts:
            for example, where in zip(rows.examples, rows.where, strict=True):
                if (key := row_keys.key(example)) in wanted:
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
        if folder not in self._rows:
            self._rows[folder] = self._read(folder)
        return self._rows[folder]

    def _read(self, folder: Path) -> tuple[Rows | None, Rows | None]:
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


def _run_of(folder: Path) -> list[Path]:
    if (folder / RECIPE).is_file():
        return [folder]
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name) and (folder.parent / RECIPE).is_file()
    return [folder.parent] if is_checkpoint else []


def apart(rows: Rows, trained: dict[str, set[str]], notes: list[str]) -> tuple[Rows, bool]:
    """The rows that no side was trained on; where there is none, all of them, and True: they are training rows.

    Args:
        trained: the keys of the rows behind each side, by its name.
        notes: how many rows were trained on, by side, is added to it.
    """
    keys = [row_keys.key(example) for example in rows.examples]
    known: set[str] = set().union(*trained.values())
    free = [i for i, key in enumerate(keys) if key not in known]
    for name, own in trained.items():
        if count := sum(key in own for key in keys):
            notes.append(
                f"{count:,} of the {len(rows):,} rows of {rows.name} were trained on by {name}" + LEFT_OUT[not free]
            )
    return (rows.take(free), False) if free else (rows, True)


def once(rows: Rows, notes: list[str]) -> Rows:
    """Each row once: copies are not independent, and a test that counts them calls chance a difference."""
    first = _firsts(rows.examples)
    if copies := len(rows) - len(first):
        notes.append(
            f"{copies:,} of the {len(rows):,} rows of {rows.name} are copies of another one: they are left out"
        )
        return rows.take(first)
    return rows


def prompts_once(asked: list[Question], notes: list[str]) -> list[Question]:
    """Each prompt once, as `once`."""
    first = _firsts([_with_answer(question) for question in asked])
    if copies := len(asked) - len(first):
        notes.append(f"{copies} of {len(asked)} prompts are copies of another one: they are left out")
    return [asked[i] for i in first]


def _firsts(examples: list[Example]) -> list[int]:
    """Where each row stands first, by all that it gives to the model, blanks apart."""
    found: dict[str, int] = {}
    for i, example in enumerate(examples):
        found.setdefault(row_keys.normal_text(example), i)
    return list(found.values())


def prompts_apart(asked: list[Question], trained: dict[str, set[str]], notes: list[str]) -> list[Question]:
    """The prompts that no side was trained on with their reference answers.

    Raises:
        DataError: none is left.
    """
    known: set[str] = set().union(*trained.values())
    free = [question for question in asked if not question.reference or _answered(question) not in known]
    if not free:
        raise DataError("each prompt was trained on, with its answer", help="other prompts")
    if count := len(asked) - len(free):
        notes.append(f"{count} of {len(asked)} prompts were trained on, with their answers: they are left out")
    return free


def _answered(question: Question) -> str:
    return row_keys.key(_with_answer(question))


def _with_answer(question: Question) -> Example:
    answer = {"role": "assistant", "content": question.reference}
    return question.example | {"messages": [*question.messages, answer]}


def asked_before(asked: list[Question], training: dict[str, Rows]) -> list[str]:
    """Notes on questions that stand in the training rows of a side, with whichever answer."""
    mine = [row_keys.key(question.example) for question in asked]
    notes = []
    for name, rows in training.items():
        known = {row_keys.key(question.example) for question in questions.of_rows(rows)}
        if count := sum(key in known for key in mine):
            notes.append(f"{count} of {len(asked)} questions were asked in the training of {name} too")
    return notes
