"""The rows that a recipe asks for: sets mixed, general knowledge added, a part held out; and the record of that part.

Everything is decided by the rows and the seed: no world size, process or order of arrival changes it.
held_out.json in a run folder says which rows a run was trained on and which it held out, known by their content.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder import files, installation, run
from stepladder.data import formats
from stepladder.data.conversation import ROLES
from stepladder.data.rows import Rows, Stream, collect, head_notes, row_key
from stepladder.data.source import Source, has_split, is_local
from stepladder.errors import DataError
from stepladder.settings import Settings
from stepladder.suggest import suggest

GENERAL = Path("data/general.jsonl")
HELD_OUT = "held_out.json"
MOST_TRAINED = 100_000  # trained rows whose keys held_out.json holds, in 1.5 MB; of more, their data is read again
MOST_HELD_OUT = 10_000  # held-out rows whose keys and places it holds: the first of them


@dataclass
class Entry:
    """A set and how much of it is taken: all, or what one of the three keys says.

    `fraction` and `weight` are shares of the mixture; `rows` is a number of this set's rows, below 1 a share of them.
    """

    source: Source
    fraction: float | None = None
    weight: float | None = None
    rows: float | None = None


def load(settings: Settings) -> tuple[Rows | Stream, Rows | None]:
    """The training rows and, where the recipe evaluates, the evaluation rows.

    Training rows come as a Stream where the recipe streams; evaluation rows are always held.

    Raises:
        DataError: a file, row or column that cannot be used; shares that cannot be had; no data named.
    """
    sets = entries(settings)
    block, key = _evaluation_set(settings)
    skips = settings.get("on_bad_row") == "skip"
    evaluation = collect(_source(block, "", settings, key), skips) if block else None
    held_out = settings.get("test_split_size")
    if not evaluation and not held_out and settings.get("eval_strategy") != "no":
        raise DataError(
            f"eval_strategy is '{settings.get('eval_strategy')}' and there is nothing to evaluate on",
            where=settings.where("eval_strategy"),
            help='eval_dataset_name: FILE, or test_split_size: 0.1, or eval_strategy: "no"',
        )
    if is_streamed(settings):
        train = make_stream(settings)
        train.notes += [note for source in train.sources for note in head_notes(source)]
        return train, evaluation
    parts = [collect(entry.source, skips) for entry in sets]
    parts = _take_shares(parts, sets, settings)
    if held_out:
        parts, apart = _split(parts, held_out, settings)
        evaluation = Rows.join(apart)
    if share := settings.get("mix_general"):
        parts.append(_general(sum(map(len, parts)), share, settings))
    return Rows.join(parts), evaluation


def load_stream(settings: Settings) -> tuple[Stream | None, None]:
    """What a rank has that reads no rows itself: a stream, which each rank reads as it trains."""
    return make_stream(settings) if is_streamed(settings) else None, None


def is_streamed(settings: Settings) -> bool:
    return bool(settings.get("streaming") or settings.get("dataset_streaming"))


def make_stream(settings: Settings) -> Stream:
    """The training rows of a recipe with `streaming` or `dataset_streaming`, read when they are needed.

    Raises:
        DataError: a key that needs to know how many rows there are.
    """
    sets = entries(settings)
    for key, instead in (
        ("test_split_size", "eval_dataset_name: FILE"),
        ("mix_general", f"a set of its own: path: {GENERAL}, with a weight"),
    ):
        if settings.get(key):
            raise _uncountable(key, settings.where(key), instead)
    for number, entry in enumerate(sets):
        if entry.fraction is not None:
            raise _uncountable("fraction", settings.where(f"datasets[{number}].fraction"), "weight")
        if entry.rows is not None and entry.rows < 1:
            raise _uncountable("a share in rows", settings.where(f"datasets[{number}].rows"), "rows: a number")
    return Stream(
        name=" + ".join(entry.source.label for entry in sets),
        sources=[entry.source for entry in sets],
        counts=[None if entry.rows is None else int(entry.rows) for entry in sets],
        weights=_shares(sets, "weight", settings),
        seed=settings.get("seed"),
        skip_bad_rows=settings.get("on_bad_row") == "skip",
    )


def _uncountable(key: str, where: str, instead: str) -> DataError:
    why = "how many rows a stream has is not known before its end"
    return DataError(f"{key} does not go with streaming", where=where, why=why, help=instead)


def from_name(name: str, config: str | None = None, split: str = "train") -> Rows:
    """The rows of one file, folder or hub data set."""
    return collect(Source(name, config, split))


def entries(settings: Settings) -> list[Entry]:
    """What the recipe trains on: `datasets`, or the one set of `dataset_name`.

    Raises:
        DataError: no set is named; a `column_map` with a name that no shape has; a `role_map` to an unknown role.
    """
    if blocks := settings.get("datasets"):
        return [
            Entry(_source(block, f"datasets[{n}].", settings), *map(block.get, ("fraction", "weight", "rows")))
            for n, block in enumerate(blocks)
        ]
    name = settings.get("dataset_name")
    if not name:
        raise DataError(
            "the recipe names no data",
            where=settings.where("dataset_name"),
            help="dataset_name: data/techco.jsonl, or datasets: …",
        )
    block = {"path": name, "name": settings.get("dataset_config"), "split": settings.get("dataset_train_split")}
    return [Entry(_source(block, "", settings, "dataset_name"))]


def _source(block: dict[str, Any], place: str, settings: Settings, named_by: str = "path") -> Source:
    """A set from the keys of an entry of `datasets`; the recipe's own maps hold where it has none.

    `place` is what stands before its keys in the recipe (`datasets[0].`), `named_by` the key that names the set.
    """
    column_map = block.get("column_map") or settings.get("column_map")
    if (text := settings.get("dataset_text_field")) != "text":
        column_map = {"text": text, **(column_map or {})}
    for column in column_map or {}:
        if column not in formats.COLUMNS:
            raise DataError(
                f"column_map maps to '{column}', which no shape has",
                where=settings.where(f"{place}column_map" if block.get("column_map") else "column_map"),
                why=f"known: {'; '.join(map(str, formats.SHAPES))}",
                help=suggest(column, formats.COLUMNS) or "column_map: {input: COLUMN IN THE FILE, output: …}",
            )
    role_map = block.get("role_map") or settings.get("role_map")
    for role in (role_map or {}).values():
        if role not in ROLES:
            raise DataError(
                f"role_map maps to '{role}', which is no role",
                where=settings.where(f"{place}role_map" if block.get("role_map") else "role_map"),
                why=f"known: {', '.join(ROLES)}",
                help=suggest(str(role), ROLES) or "role_map: {NAME IN THE FILE: assistant}",
            )
    return Source(
        path=block["path"],
        name=block.get("name"),
        split=block.get("split") or "train",
        data_dir=block.get("data_dir"),
        data_files=block.get("data_files"),
        columns=block.get("columns"),
        column_map=column_map,
        streaming=is_streamed(settings),
        where=settings.where(place + named_by),
        role_map=role_map,
    )


def sources(settings: Settings) -> list[Source]:
    """All sets that a recipe reads, of its evaluation too."""
    block, key = _evaluation_set(settings)
    return [entry.source for entry in entries(settings)] + ([_source(block, "", settings, key)] if block else [])


def name_held_out(settings: Settings) -> str:
    """What the evaluation rows are, without reading them: a set, or `test_split_size`; empty where there are none."""
    if settings.get("test_split_size"):
        return f"test_split_size: {settings.get('test_split_size'):g}"
    block, _ = _evaluation_set(settings)
    return str(block.get("path", ""))


def _evaluation_set(settings: Settings) -> tuple[dict[str, Any], str]:
    """`eval_dataset_name`, or the test split of the hub data set or folder that is trained on; and the key it is by."""
    split = settings.get("dataset_test_split")
    if name := settings.get("eval_dataset_name"):
        if is_local(name) and not has_split(Path(name), split):
            split = "train"  # a file has no other
        block, key = {"path": name, "split": split}, "eval_dataset_name"
    else:
        name, key = settings.get("dataset_name"), "dataset_name"
        if settings.get("datasets") or settings.get("test_split_size") or settings.get("eval_strategy") == "no":
            return {}, key
        if not name or (is_local(name) and not has_split(Path(name), split)):
            return {}, key
        block = {"path": name, "name": settings.get("dataset_config"), "split": split}
    return block, key


def _shares(sets: list[Entry], key: str, settings: Settings) -> list[float] | None:
    """`fraction` or `weight` of all sets, or None where none has it.

    Raises:
        DataError: some have it and some not, or it stands beside the other key or `rows`.
    """
    shares = [getattr(entry, key) for entry in sets]
    if all(share is None for share in shares):
        return None
    for number, (entry, share) in enumerate(zip(sets, shares, strict=True)):
        if share is None:
            raise DataError(
                f"'{key}' is missing for {entry.source.label}",
                where=settings.where(f"datasets[{number}].path"),
                why="other sets have it, and a share is one of a whole",
                help=f"{key}: … for all sets or for none",
            )
        for other in {"fraction", "weight", "rows"} - {key}:
            if getattr(entry, other) is not None:
                where = settings.where(f"datasets[{number}].{other}")
                raise DataError(f"'{other}' beside '{key}'", where=where, help="one of them for all sets")
    return shares


def _take_shares(parts: list[Rows], sets: list[Entry], settings: Settings) -> list[Rows]:
    """What the shares and counts leave of each set. No row is taken twice: the scarcest set limits the others.

    By `fraction` these are a set's first rows, as TRL documents it; by `weight` and `rows` they are drawn.
    """
    counts = [_count(entry.rows, len(part)) for part, entry in zip(parts, sets, strict=True)]
    fractions, weights = _shares(sets, "fraction", settings), _shares(sets, "weight", settings)
    if shares := fractions or weights:
        total = min(len(part) * sum(shares) / share for part, share in zip(parts, shares, strict=True))
        counts = [round(share / sum(shares) * total) for share in shares]
    taken = []
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if not 0 < count <= len(part):
            raise DataError(
                f"{count:,} rows of {part.name}, which has {len(part):,}",
                where=settings.where(f"datasets[{number}].rows"),
                help=f"from 1 to {len(part)}; none is repeated",
            )
        if count < len(part):
            part.notes.append(f"{count:,} of the {len(part):,} rows of {part.name} are taken")
            part = part.take(range(count) if fractions else _draw(len(part), count, settings, str(number)))
        taken.append(part)
    return taken


def _count(rows: float | None, total: int) -> int:
    """All rows, a number of them, or a share of them (below 1)."""
    if rows is None:
        return total
    return round(total * rows) if rows < 1 else int(rows)


def _draw(total: int, count: int, settings: Settings, purpose: str) -> list[int]:
    """Positions drawn by the recipe's seed, in their order; another `purpose` draws others."""
    return sorted(random.Random(f"{settings.get('seed')}:{purpose}").sample(range(total), count))


def _split(parts: list[Rows], size: float, settings: Settings) -> tuple[list[Rows], list[Rows]]:
    """Hold out a share (below 1) or number of all rows, drawn by the seed."""
    total = sum(map(len, parts))
    count = _count(size, total)
    if not 0 < count < total:
        raise DataError(
            f"test_split_size {size} of {total} rows leaves one side empty",
            where=settings.where("test_split_size"),
            help="a share between 0 and 1, or a number of rows",
        )
    held_out = set(_draw(total, count, settings, "test"))
    train, apart, begin = [], [], 0
    for part in parts:
        train.append(part.take(i for i in range(len(part)) if begin + i not in held_out))
        apart.append(part.take(i for i in range(len(part)) if begin + i in held_out))
        begin += len(part)
    return train, apart


def _general(rows: int, share: float, settings: Settings) -> Rows:
    """So many general-knowledge rows that they are `share` of the whole, none of them twice."""
    where = settings.where("mix_general")
    general = collect(Source(str(GENERAL), where=where))
    count = round(share / (1 - share) * rows)
    if not 0 < count <= len(general):
        largest = math.floor(1000 * len(general) / (rows + len(general))) / 1000
        raise DataError(
            f"mix_general {share} of {rows:,} rows needs {count:,} general rows, and {GENERAL} has {len(general):,}",
            where=where,
            why="none is repeated",
            help=f"mix_general: {largest} at most, or more rows in {GENERAL}",
        )
    return general.take(_draw(len(general), count, settings, "general"))


@dataclass(frozen=True)
class HeldOut:
    """What held_out.json holds: keys and places of the held-out rows, and the keys of all trained rows.

    `rows` are all that were held out, more than `held_out` where they are very many. `trained` is None where
    the file does not hold the keys: a stream, or too many rows. `foreign` names the evaluation set where it came
    with other training data.
    """

    name: str
    rows: int
    held_out: list[str]
    where: list[str]
    foreign: str
    trained: set[str] | None


def write_held_out(record: run.Run, train: Rows | Stream | None, evaluation: Rows | None, foreign: str) -> list[str]:
    """Write held_out.json and, in run.json, how many rows were held out; called by each rank, done by the writer.

    A run that is resumed with other training rows (`--allow_change`) was trained on both: the keys are added.

    Args:
        foreign: the evaluation set, where it came with other training data (`Recipe.foreign_evaluation`).

    Returns:
        What a person should know: evaluation rows that are trained on too, a file that cannot be written.
    """
    if not record.is_writer:
        return []
    is_needed = isinstance(train, Rows) and (evaluation or len(train) <= MOST_TRAINED)  # 20 s of a million rows
    held_out = [row_key(example) for example in evaluation.examples] if evaluation else []
    both, known = _compare_keys(train, set(held_out)) if isinstance(train, Rows) and is_needed else (None, None)
    count = None if both is None else sum(key in both for key in held_out)
    if record.manifest["resumed"] and known is not None:
        before = read_held_out(record.folder)
        known = known | before.trained if before and before.trained is not None else None
    content = {
        "name": evaluation.name if evaluation else "",
        "rows": len(held_out),
        "held_out": held_out[:MOST_HELD_OUT],
        "where": evaluation.where[:MOST_HELD_OUT] if evaluation else [],
        "foreign": foreign,
        "trained": None if known is None else sorted(known),
    }
    record.update(held_out={"rows": len(held_out), "trained_on": count, "foreign": foreign})
    notes, check, compare = [], installation.command("check"), installation.command("compare")
    if held_out and count is None:
        notes.append(f"whether evaluation rows are trained on too is not known of a stream; {compare} looks for them")
    if count:
        notes.append(
            f"⚠ {count:,} of the {len(held_out):,} evaluation rows are trained on too: what is measured on them is "
            f"not held out; {check} --audit names them"
        )
    try:
        files.write_atomic(record.folder / HELD_OUT, json.dumps(content) + "\n")
    except OSError as error:
        notes.append(f"⚠ {HELD_OUT} cannot be written ({error.strerror}): {compare} will read the data again instead")
    return notes


def _compare_keys(train: Rows, held_out: set[str]) -> tuple[set[str], set[str] | None]:
    """The keys of held-out rows that are trained on too, and those of all trained rows unless they are very many."""
    known: set[str] | None = set()
    both = set()
    for key in map(row_key, train.examples):
        if key in held_out:
            both.add(key)
        if known is not None:
            known.add(key)
            known = known if len(known) <= MOST_TRAINED else None
    return both, known


def read_held_out(folder: Path) -> HeldOut | None:
    """The record of a run folder; None where it is missing or damaged."""
    try:
        found: dict[str, Any] = files.read_object(folder / HELD_OUT)
        kept = HeldOut(**{name: found[name] for name in HeldOut.__dataclass_fields__ if name != "trained"},
                    trained=None if found["trained"] is None else {*found["trained"]})  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return None
    named = isinstance(kept.name, str) and isinstance(kept.foreign, str)
    lists = (kept.held_out, kept.where, list(kept.trained or ()))
    texts = all(isinstance(part, list) and all(isinstance(one, str) for one in part) for part in lists)
    fits = isinstance(kept.rows, int) and len(kept.held_out) == len(kept.where) and bool(kept.rows) == bool(kept.where)
    return kept if named and texts and fits else None
