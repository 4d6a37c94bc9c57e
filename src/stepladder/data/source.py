"""Where rows lie: a file, a folder, files that a recipe lists, or a data set on the hub."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder.data.json_documents import split_key, split_word
from stepladder.data.read import (
    METADATA,
    OTHER_KINDS,
    READERS,
    SAVED,
    UNPACKERS,
    dataset_rows,
    find_download,
    inner_splits,
    is_saved,
    kind,
    near_file,
    other_kind,
    printable,
    read,
    refuse_llama_factory,
    stem,
)
from stepladder.data.readers import Found
from stepladder.errors import DataError, first_line
from stepladder.files import parse_yaml, read_text
from stepladder.installation import locate, places
from stepladder.suggest import suggest

GENERIC = ("json", "csv", "parquet")  # names under which TRL's recipes list local files in `data_files`
SAMPLED_ROWS = 100  # rows looked at to learn what a set is like
CARD, CARD_BYTES = "README.md", 1 << 22  # of a hub data set
LLAMA_FACTORY = "dataset_info.json"
MAP_CACHE = "cache-*.arrow"  # what `Dataset.map` leaves beside the data that it read
DATA_KINDS = {*OTHER_KINDS, *UNPACKERS} - {".txt", ".yaml", ".yml"}
SLICE = re.compile(r"(?P<name>[^\[\]]+)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]")


def is_local(name: str) -> bool:
    """A file or folder that is there, or a name that can only be meant as one; anything else is a hub id."""
    meant = name.startswith(("/", "./", "../", "~")) or kind(Path(name)) in READERS
    return meant or os.path.exists(locate(name))


@dataclass(frozen=True)
class Source:
    """One set of rows, with the keys that an entry of TRL's `datasets` has, and our `column_map` and `role_map`.

    `where` is the place in the recipe that named it.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    columns: list[str] | None = None
    column_map: dict[str, str] | None = None
    role_map: dict[str, str] | None = None
    streaming: bool = False
    where: str = ""

    @property
    def label(self) -> str:
        """What a person calls the set: the file, the folder, or the hub id."""
        if self.path not in GENERIC:
            return self.path
        listed = self.data_files.get(self.split) if isinstance(self.data_files, dict) else self.data_files
        return ", ".join([listed] if isinstance(listed, str) else listed or []) or self.data_dir or self.path

    @property
    def local(self) -> bool:
        if self.path in GENERIC:
            return "://" not in str(self.data_files)
        return is_local(self.path)

    def rows(self) -> Iterator[Found]:
        """The rows, under the names that `columns` and `column_map` give them.

        Raises:
            DataError: a file, folder or hub data set that cannot be read.
        """
        found = self._local() if self.local else self._hub()
        return found if self.columns is None and not self.column_map else self._renamed(found)

    def _renamed(self, found: Iterator[Found]) -> Iterator[Found]:
        """Rows with the columns asked for. A row that has the new name and not the old is left as it is."""
        head, column_map = list(itertools.islice(found, SAMPLED_ROWS)), self.column_map or {}
        seen = {column for _, row in head if isinstance(row, dict) for column in row}
        for column in self.columns or []:
            if seen and column not in seen:
                raise self._error(
                    f"columns names '{column}', which is not in {self.label}",
                    suggest(column, seen) or f"among {', '.join(sorted(seen))}",
                )
        for where, row in itertools.chain(head, found):
            if isinstance(row, DataError):
                yield where, row
                continue
            if missing := [old for new, old in column_map.items() if old not in row and new not in row]:
                what = f"column_map names the column '{missing[0]}', which is not there"
                why = f"the columns are {', '.join(map(repr, row))}"
                help = suggest(missing[0], row) or "column_map: {input: COLUMN IN THE FILE, output: …}"
                yield where, DataError(what, where=where, why=why, help=help)
                continue
            kept = [name for name in (row if self.columns is None else self.columns) if name in row]
            renamed = {new: row[old] for new, old in column_map.items() if old in row}
            yield where, {name: row[name] for name in kept if name not in column_map.values()} | renamed

    def _local(self) -> Iterator[Found]:
        sliced = SLICE.fullmatch(self.split)  # as the hub's own loader reads it
        split = sliced["name"] if sliced else self.split
        files = self._files(split)
        found, again = (itertools.chain.from_iterable(read(file, split) for file in files) for _ in range(2))
        if not sliced or sliced["start"] == sliced["stop"] is None:
            return found
        total = sum(1 for _ in found)  # must be known for percentages and for counting from the end

        def bound(text: str | None) -> int | None:
            if text is None:
                return None
            return round(int(text[:-1]) / 100 * total) if text.endswith("%") else int(text)

        chosen = range(total)[bound(sliced["start"]) : bound(sliced["stop"])]
        if not chosen:
            raise self._error(f"{self.split} holds no row", "another slice", f"{self.label} has {total:,} rows")
        return itertools.islice(again, chosen.start, chosen.stop)

    def _files(self, split: str) -> list[Path]:
        root = Path() if self.path in GENERIC else locate(self.path)
        is_file = self.path not in GENERIC and (not os.path.isdir(root) or kind(root) in READERS)
        if self.name is not None and (is_file or self.data_dir or self.data_files or not _configurations(root)):
            raise self._error(f"'{self.name}' has no effect: local files have no configurations", "remove it")
        if is_file:
            if self.data_dir or self.data_files:
                raise self._error(f"data_dir and data_files have no effect, as {root} is a file", "remove them")
            return self._only_train([root], split)
        root = locate(root / (self.data_dir or ""))
        if self.data_files is not None:
            return self._listed(root, split)
        if self.path in GENERIC and not self.data_dir:
            raise self._error(f"'path: {self.path}' names a kind of file, and no file", "data_files: FILE")
        return _in_folder(root, split, self.name)

    def _listed(self, root: Path, split: str) -> list[Path]:
        """What `data_files` names: one path or pattern, several, or those of each split."""
        listed = self.data_files
        if isinstance(listed, dict):
            if split not in listed:
                raise self._error(f"data_files has no split '{split}'", f"one of {', '.join(map(str, listed))}")
            listed, split = listed[split], "train"
        paths: list[Path] = []
        for pattern in [listed] if isinstance(listed, str) else listed or []:
            path = locate(root / pattern)
            if os.path.isdir(path) and kind(path) not in READERS:
                paths += _in_folder(path, "train")
            elif os.path.exists(path) or not glob.has_magic(str(path)):
                paths.append(path)
            elif matched := sorted(glob.glob(str(path), recursive=True)):
                paths += map(Path, matched)
            else:
                raise self._error(f"no file matches '{path}'", "a pattern that does", places(path))
        return self._only_train(paths, split)

    def _only_train(self, files: list[Path], split: str) -> list[Path]:
        if split != "train" and not all(map(inner_splits, files)):
            raise self._error(
                f"{self.label} has no split '{split}'",
                "split: train; or a folder with a file for each split; or data_files: {train: FILE, test: FILE}",
            )
        return files

    def _hub(self) -> Iterator[Found]:
        import datasets

        place = f"{self.label}[{self.split}] row"
        try:
            found = datasets.load_dataset(
                find_download(self.path) or self.path,
                name=self.name,
                data_dir=self.data_dir,
                data_files=self.data_files,
                split=self.split,
                streaming=self.streaming,
            )
            yield from dataset_rows(found, place, self.where or self.path)
        except DataError:
            raise
        except Exception as error:  # the hub's errors are of a dozen classes, all of them the user's to read
            raise self._error(
                f"the data set '{self.label}' (split {self.split}) could not be loaded",
                near_file(self.path) or f"a hub id needs the network, or its cache; as a path, {places(self.path)}",
                why=first_line(error),
            ) from None

    def _error(self, what: str, help: str, why: str = "") -> DataError:
        return DataError(what, where=self.where, why=why, help=help)


def _in_folder(folder: Path, split: str, name: str | None = None) -> list[Path]:
    """The folder's data files that belong to a split, sorted by name; or a folder of `Dataset.save_to_disk`.

    Where the README of a hub data set lists the files of its configurations, those of the `name` are read, or of
    the default one. Else a file belongs to the split that its path names (`test.jsonl`,
    `data/train-00000-of-00002.parquet`), to `train` where it names none. Metadata, Python files and what is no
    data are left alone.

    Raises:
        DataError: no data files, no such split or configuration; two files that may hold the same rows; data that
            is not read beside data that is; a folder of LLaMA-Factory's.
    """
    inside = _files_in(folder)
    if Path(LLAMA_FACTORY) in inside:
        refuse_llama_factory(folder / LLAMA_FACTORY)
    if saved := _saved_splits(folder, inside):
        if split not in saved:
            raise DataError(f"the folder {folder} has no split '{split}'", help=f"one of {', '.join(saved)}")
        return [saved[split]]
    if patterns := _card_patterns(folder, name, split):
        return _match(folder, patterns)
    files = [p for p in inside if _holds_rows(p)]
    unread = [p for p in inside if kind(p) in DATA_KINDS or p.match(MAP_CACHE)]
    if not files:
        if unread and not unread[0].match(MAP_CACHE):
            raise other_kind(folder / unread[0])
        seen = ", ".join(map(printable, inside[:5])) or "nothing"
        kinds = ", ".join(suffix for suffix in READERS if suffix != ".py")
        raise DataError(f"the folder {folder} holds no data files", why=f"it holds {seen}", help=f"one of {kinds}")
    _refuse_unclear(folder, files, unread)
    by_file = {p: split_word(str(p)) or "train" for p in files}
    chosen = [p for p in files if split in (by_file[p], p.name.split(".")[0])]
    if not chosen:
        there = ", ".join(sorted(set(by_file.values())))
        raise DataError(f"the folder {folder} has no split '{split}'", why=f"its files are of {there}")
    return [folder / p for p in chosen]


def _files_in(folder: Path) -> list[Path]:
    """What lies below a folder and is not hidden, relative to it and sorted. A folder that is linked is entered once.

    Raises:
        DataError: a folder that may not be read; a link to a folder that this one lies in.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}", help="chmod u+rx FOLDER")

    root = os.path.realpath(folder)
    entered: set[str] = set()
    found: list[Path] = []
    for base, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(base)
        if real != root and os.path.commonpath([real, root]) == real:
            raise DataError(
                f"{printable(Path(base))} is a link to {real}, which holds {folder}", help="remove the link"
            )
        folders[:] = [] if real in entered else sorted(name for name in folders if not name.startswith("."))
        if real not in entered:
            found += [Path(base, name).relative_to(folder) for name in names if not name.startswith(".")]
        entered.add(real)
    return sorted(found)


def _holds_rows(path: Path) -> bool:
    return kind(path) in READERS and kind(path) != ".py" and path.name not in METADATA and not path.match(MAP_CACHE)


def _refuse_unclear(folder: Path, files: list[Path], unread: list[Path]) -> None:
    """Raise DataError where a folder's rows would be read in part, or twice."""
    help = f'name the files that are meant: datasets: [{{path: {folder}, data_files: "{printable(files[0])}"}}]'
    if unread:
        raise DataError(
            f"the folder {folder} holds {printable(unread[0])}, which would not be read, beside {printable(files[0])}",
            help=help,
        )
    for first, second in itertools.pairwise(sorted(files, key=lambda p: (stem(p), p))):
        if stem(first) == stem(second):
            raise DataError(
                f"the folder {folder} holds {printable(first)} and {printable(second)}",
                why="one name and two kinds of file: their rows may be the same, and would be read twice",
                help=help,
            )


def _saved_splits(folder: Path, inside: list[Path]) -> dict[str, Path]:
    """The folders that `save_to_disk` wrote, by split: this one, or those in it; empty where there is none.

    Raises:
        DataError: other data files lie beside them.
    """
    saved = {"train": folder}
    if not is_saved(folder):
        saved = {name: folder / name for name in sorted({p.parts[0] for p in inside}) if is_saved(folder / name)}
    if saved:
        apart = (p for p in inside if not is_saved(folder / p.parent) or (kind(p) != ".arrow" and p.name not in SAVED))
        if others := [p for p in apart if _holds_rows(p)]:
            raise DataError(
                f"the folder {folder} holds {printable(others[0])}, which would not be read",
                why="a folder of save_to_disk is read by what it lists",
                help="name the file, or move it elsewhere",
            )
    return saved


def _card_patterns(folder: Path, name: str | None, split: str) -> list[str]:
    """The patterns under which a hub data set's README lists the files of a split; none where it lists no files.

    Raises:
        DataError: no such configuration or split; several configurations, of which none is the default.
    """
    configs = _configurations(folder)
    if not configs:
        return []
    names = [str(config.get("config_name", "default")) for config in configs]
    default = [config.get("default") is True for config in configs]
    chosen = name or (names[0] if len(names) == 1 else names[default.index(True)] if any(default) else "default")
    if chosen not in names:
        what = f"has no configuration '{name}'" if name else "has several configurations"
        raise DataError(
            f"the data set {folder} {what}",
            where=str(folder / CARD),
            why=f"its README lists {', '.join(names)}",
            help=f"dataset_config: {names[0]}, or name: {names[0]} in an entry of datasets",
        )
    config = configs[names.index(chosen)]
    parts = config["data_files"]
    by_split: dict[str, list[str]] = {}
    for part in parts if isinstance(parts, list) else [parts]:
        listed = part if isinstance(part, dict) else {"path": part}
        files = listed.get("path")
        files = files if isinstance(files, list) else [files]
        by_split.setdefault(str(listed.get("split", "train")), []).extend(map(str, files))
    if split not in by_split:
        raise DataError(
            f"the data set {folder} has no split '{split}'",
            where=str(folder / CARD),
            help=f"one of {', '.join(by_split)}",
        )
    return [os.path.join(str(config.get("data_dir") or ""), pattern) for pattern in by_split[split]]


def _configurations(folder: Path) -> list[dict[str, Any]]:
    """The configurations with files that the front matter of a hub data set's README lists.

    Raises:
        DataError: a README that cannot be read, or whose front matter is not valid YAML.
    """
    card = folder / CARD
    try:
        text = read_text(card, CARD_BYTES, errors="replace") if card.is_file() else ""
    except ValueError as error:
        raise DataError(f"it cannot be read: {error}", where=str(card), help="chmod u+r FILE") from None
    front = re.match(r"---[ \t]*\r?\n(.*?)\n---", text, re.DOTALL)
    if not front or "configs:" not in front[1]:
        return []
    try:
        found = parse_yaml(front[1])
    except ValueError:
        help = f'datasets: [{{path: {folder}, data_files: "*.jsonl"}}]'
        raise DataError("its front matter is not valid YAML", where=str(card), help=help) from None
    configs = found.get("configs") if isinstance(found, dict) else None
    listed = configs if isinstance(configs, list) else []
    return [config for config in listed if isinstance(config, dict) and config.get("data_files")]


def _match(folder: Path, patterns: list[str]) -> list[Path]:
    """The files below a folder that match the patterns of a README, each once.

    Raises:
        DataError: a pattern that nothing matches.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matched = sorted(glob.glob(os.path.join(glob.escape(str(folder)), pattern), recursive=True))
        files = [path for path in map(Path, matched) if not path.is_dir() and path.name not in METADATA]
        if not files:
            why = "the pattern stands in its README"
            raise DataError(f"no file of {folder} matches '{pattern}'", why=why, help="download the data set again")
        found |= dict.fromkeys(files)
    return list(found)


def has_split(path: Path, split: str) -> bool:
    """Whether a local folder, or a JSON file of several splits, holds rows of this one."""
    path = locate(path)
    if os.path.isfile(path):
        return split_key(inner_splits(path), split) is not None
    try:
        return os.path.isdir(path) and bool(_in_folder(path, split))
    except DataError:  # raised when the training rows are read
        return False
