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

from stepladder.data.read import kind, near_file, read
from stepladder.data.readers import READERS, Found, without_nulls
from stepladder.errors import DataError
from stepladder.suggest import suggest

GENERIC = ("json", "csv", "parquet")  # names under which TRL's recipes list local files in `data_files`
HEAD = 100  # rows looked at to learn what a set is like
# What a split's files are called in a folder, as the hub's own loader has it.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}
SLICE = re.compile(r"(?P<name>[^\[\]]+)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]")


def is_local(name: str) -> bool:
    """A file or folder that is there, or a name that can only be meant as one; anything else is a hub id."""
    return (
        os.path.exists(os.path.expanduser(name))
        or name.startswith(("/", "./", "../", "~"))
        or kind(Path(name)) in READERS
    )


@dataclass(frozen=True)
class Source:
    """One set of rows, with the keys that an entry of TRL's `datasets` has, and our `column_map`.

    `where` is the place in the recipe that named it.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    columns: list[str] | None = None
    column_map: dict[str, str] | None = None
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
        if self.columns is None and not self.column_map:
            return found
        return self._renamed(found)

    def _renamed(self, found: Iterator[Found]) -> Iterator[Found]:
        """Rows with the columns asked for. A row that has the new name and not the old is left as it is."""
        head = list(itertools.islice(found, HEAD))
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
            missing = [old for new, old in (self.column_map or {}).items() if old not in row and new not in row]
            if missing:
                yield (
                    where,
                    DataError(
                        f"column_map names the column '{missing[0]}', which is not there",
                        where=where,
                        why=f"the columns are {', '.join(map(repr, row))}",
                        way_out=suggest(missing[0], row) or "column_map: {input: COLUMN IN THE FILE, output: …}",
                    ),
                )
                continue
            kept = row if self.columns is None else {name: row[name] for name in self.columns if name in row}
            renamed = {new: row[old] for new, old in (self.column_map or {}).items() if old in row}
            taken = set((self.column_map or {}).values())
            yield where, {**{name: value for name, value in kept.items() if name not in taken}, **renamed}

    def _local(self) -> Iterator[Found]:
        split, start, stop = self._slice()
        files = self._files(split)
        found = itertools.chain.from_iterable(read(file) for file in files)
        if start is None and stop is None:
            return found
        rows = list(found)  # how many there are must be known for percentages and for counting from the end

        def bound(text: str | None) -> int | None:
            if text is None:
                return None
            return round(int(text[:-1]) / 100 * len(rows)) if text.endswith("%") else int(text)

        return iter(rows[bound(start) : bound(stop)])

    def _slice(self) -> tuple[str, str | None, str | None]:
        """`train[:10%]` as the hub's own loader reads it: the split's name and its bounds."""
        if match := SLICE.fullmatch(self.split):
            return match["name"], match["start"], match["stop"]
        return self.split, None, None

    def _files(self, split: str) -> list[Path]:
        root = Path(self.path).expanduser()
        if self.name is not None:
            raise self._error(f"'{self.name}' has no effect: local files have no configurations", "remove it")
        if self.path in GENERIC:
            root = Path()
        elif not root.is_dir() or kind(root) in READERS:
            if self.data_dir or self.data_files:
                raise self._error(f"data_dir and data_files have no effect, as {root} is a file", "remove them")
            return self._only_train([root], split)
        root /= self.data_dir or ""
        if self.data_files is not None:
            return self._listed(root, split)
        if self.path in GENERIC and not self.data_dir:
            raise self._error(f"'path: {self.path}' names a kind of file, and no file", "data_files: FILE")
        return _in_folder(root, split)

    def _listed(self, root: Path, split: str) -> list[Path]:
        """What `data_files` names: one path or pattern, several, or those of each split."""
        listed = self.data_files
        if isinstance(listed, dict):
            if split not in listed:
                raise self._error(f"data_files has no split '{split}'", f"one of {', '.join(map(str, listed))}")
            listed, split = listed[split], "train"
        paths: list[Path] = []
        for pattern in [listed] if isinstance(listed, str) else listed or []:
            path = root / os.path.expanduser(pattern)
            if path.is_dir() and kind(path) not in READERS:
                paths += _in_folder(path, "train")
            elif os.path.exists(path) or not glob.has_magic(str(path)):
                paths.append(path)
            elif matched := sorted(glob.glob(str(path), recursive=True)):
                paths += map(Path, matched)
            else:
                raise self._error(f"no file matches '{path}'", "paths are relative to the folder you start from")
        return self._only_train(paths, split)

    def _only_train(self, files: list[Path], split: str) -> list[Path]:
        if split != "train":
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
                self.path,
                name=self.name,
                data_dir=self.data_dir,
                data_files=self.data_files,
                split=self.split,
                streaming=self.streaming,
            )
            # Looked for before the first row is read, which would decode a thousand pictures.
            if media := re.search(r"'(\w+)': \w*\(?(Image|Audio|Video)\(", str(found.features)):
                raise DataError(f"multimodal: the column '{media[1]}' holds {media[2]}s", where=self.where or self.path)
            number = 0
            for batch in found.iter(batch_size=1000):
                for values in zip(*batch.values(), strict=True):
                    number += 1
                    yield f"{place} {number}", without_nulls(dict(zip(batch, values, strict=True)))
        except DataError:
            raise
        except Exception as error:  # the hub's errors are of a dozen classes, all of them the user's to read
            siblings = [str(p) for p in Path(self.path).parent.iterdir()] if Path(self.path).parent.is_dir() else []
            raise self._error(
                f"the data set '{self.label}' (split {self.split}) could not be loaded",
                near_file(self.path, siblings) or "a hub id needs the network, or its cache; a local path must exist",
                why=(str(error).splitlines() or [type(error).__name__])[0],
            ) from None

    def _error(self, what: str, way_out: str, why: str = "") -> DataError:
        return DataError(what, where=self.where, why=why, way_out=way_out)


def _in_folder(folder: Path, split: str) -> list[Path]:
    """The folder's data files that belong to a split, sorted by name.

    A file belongs to the split that its path names (`test.jsonl`, `data/train-00000-of-00002.parquet`),
    to `train` where it names none. Other kinds of files are left alone, Python files too.
    """
    inside = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    files = sorted(p for p in inside if kind(p) in READERS and kind(p) != ".py" and not str(p).startswith("."))
    if not files:
        seen = ", ".join(sorted(map(str, inside))[:5]) or "nothing"
        kinds = ", ".join(suffix for suffix in READERS if suffix != ".py")
        raise DataError(f"the folder {folder} holds no data files", why=f"it holds {seen}", way_out=f"one of {kinds}")
    chosen = [p for p in files if _is_of(p, split)]
    if not chosen:
        there = ", ".join(sorted({_named_split(p) for p in files}))
        raise DataError(f"the folder {folder} has no split '{split}'", why=f"its files are of {there}")
    return [folder / p for p in chosen]


def _is_of(path: Path, split: str) -> bool:
    return split in (_named_split(path), path.name.split(".")[0])


def _named_split(path: Path) -> str:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((split for word in words for split, names in SPLIT_WORDS.items() if word in names), "train")


def has_split(folder: Path, split: str) -> bool:
    """Whether a local folder holds files of this split."""
    inside = folder.expanduser().rglob("*")
    return any(_is_of(p.relative_to(folder.expanduser()), split) for p in inside if kind(p) in READERS)
