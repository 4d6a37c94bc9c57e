"""Lists whose items lie in a file: a million rows take 8 MB of memory, whatever they hold."""

from __future__ import annotations

import contextlib
import functools
import itertools
import marshal
import operator
import os
import struct
import sys
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar, overload

from stepladder import files
from stepladder.errors import RunError

T = TypeVar("T")
LENGTH = struct.Struct("<Q")  # stands before each item: its bytes
READ = 1 << 16  # bytes that are read at once
WRITTEN = 1 << 20  # bytes that are written at once: a list that holds less makes no file
SIZE = 1 << 44  # of a file at most: the positions of the next one follow


class _File:
    """A file without a name, which is gone with the last list that reads it. Lists that live at a time share one."""

    def __init__(self, file: IO[bytes] | None = None):
        self.file, self.end, self.tail = file, os.fstat(file.fileno()).st_size if file else 0, bytearray()

    def append(self, item: Any) -> int:
        """Write an item and return its position."""
        position, content = self.end + len(self.tail), marshal.dumps(item)
        self.tail += LENGTH.pack(len(content))
        self.tail += content
        if len(self.tail) >= WRITTEN:
            self.flush()
        return position

    def flush(self) -> int:
        """Write what is still held, and return the file's descriptor.

        Raises:
            RunError: it cannot be written.
        """
        content = bytes(self.tail)
        try:
            self.file = self.file or _open()
            try:
                _write(self.file, content, self.end)
            except OSError:
                self._move()
                _write(self.file, content, self.end)
        except OSError as error:
            raise RunError(
                "the rows can be written nowhere as they are read",
                where=f"{files.cache_folder()}, {tempfile.gettempdir()}",
                why=str(error),
                help="XDG_CACHE_HOME=/a/folder/with/space",
            ) from None
        self.end, self.tail = self.end + len(content), bytearray()
        return self.file.fileno()

    def _move(self) -> None:
        """Go on in the folder for temporary files, where the disk of the cache is full."""
        assert self.file
        if os.fstat(self.file.fileno()).st_dev == os.stat(tempfile.gettempdir()).st_dev:
            return  # as full
        elsewhere = _open_elsewhere()
        for position in range(0, self.end, WRITTEN):
            _write(elsewhere, files.read_at(self.file.fileno(), min(WRITTEN, self.end - position), position), position)
        self.file = elsewhere  # who reads the other one keeps it

    def __reduce__(self) -> Any:
        if sys.platform == "win32":
            raise RunError("rows cannot be passed to another process on native Windows", help="WSL 2")
        from multiprocessing import reduction

        # Once for all lists: a process is not started with a file twice.
        return _reopen, (reduction.DupFd(self.flush()),)

    def read(self, position: int, least: int) -> bytes:
        """The bytes from a position on: `least` of them or more."""
        if self.file is None or position >= self.end:
            begin = position - self.end
            return bytes(self.tail[begin : begin + max(least, READ)])
        found = bytearray()  # one call reads no more than 2 GiB
        while len(found) < least and (
            part := files.read_at(self.file.fileno(), max(least - len(found), READ), position)
        ):
            found += part
            position += len(part)
        return bytes(found)


_newest: weakref.ref[_File] | None = None


def _open() -> IO[bytes]:
    """A file on the disk of the cache, since /tmp may lie in memory; a home may be read-only."""
    with contextlib.suppress(OSError):
        files.cache_folder().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=files.cache_folder(), buffering=0)
    return _open_elsewhere()


def _open_elsewhere() -> IO[bytes]:
    return tempfile.TemporaryFile(buffering=0)


def _write(file: IO[bytes], content: bytes, position: int) -> None:
    """Write at a position, so that what is written again after a fault takes the place of what was."""
    while content:
        written = files.write_at(file.fileno(), content, position)
        content, position = content[written:], position + written


class FileList(Sequence[T]):
    """Values as JSON has them, in a file without a name: 8 bytes of memory each. What is taken of it shares the file.

    A process that is spawned with it reads the same file.
    """

    def __init__(self, items: Iterable[T] = ()):
        global _newest
        newest = _newest() if _newest else None
        self._files, self._places = [newest or _File()], array("Q")
        _newest = weakref.ref(self._files[0])
        for item in items:
            self.append(item)

    @classmethod
    def _make(cls, owners: list[_File], places: array[int]) -> FileList[T]:
        made = cls()
        made._files, made._places = owners, places
        return made

    def append(self, item: T) -> None:
        """Raises RunError where the disk is full: no fault of the row, which `on_bad_row: skip` would leave out."""
        self._places.append(self._files[0].append(item))

    def take(self, positions: Iterable[int]) -> FileList[T]:
        """The items at these positions."""
        return self._make(self._files, array("Q", map(self._places.__getitem__, positions)))

    def __add__(self, other: FileList[T]) -> FileList[T]:
        if self._files == other._files:
            return self._make(self._files, self._places + other._places)
        shift = len(self._files) * SIZE
        return self._make(
            self._files + other._files, self._places + array("Q", (place + shift for place in other._places))
        )

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        return list(self._read(self._places[at])) if isinstance(at, slice) else next(self._read([self._places[at]]))

    def __iter__(self) -> Iterator[T]:
        return self._read(self._places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(lambda a, b: a == b, self, other))

    def _read(self, places: Iterable[int]) -> Iterator[T]:
        last, start, held = -1, 0, b""
        for place in places:
            number, position = divmod(place, SIZE)
            at = position - start
            if number != last or not 0 <= at <= len(held) - LENGTH.size:
                last, start, at, held = number, position, 0, self._files[number].read(position, LENGTH.size)
            size = LENGTH.size + LENGTH.unpack_from(held, at)[0]
            if at + size > len(held):
                start, at, held = position, 0, self._files[number].read(position, size)
            yield marshal.loads(memoryview(held)[at + LENGTH.size : at + size])


def _reopen(handle: Any) -> _File:
    return _File(os.fdopen(handle.detach(), "rb", buffering=0))


def take(items: Sequence[T], positions: Iterable[int]) -> Sequence[T]:
    """The items at these positions, in a file where the others are."""
    return items.take(positions) if isinstance(items, FileList) else [items[at] for at in positions]


def join(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """All items, part after part; in files where all of them are, and a part that is no file is empty."""
    filed = [part for part in parts if isinstance(part, FileList)]
    if filed and len(filed) == sum(isinstance(part, FileList) or len(part) > 0 for part in parts):
        return functools.reduce(operator.add, filed)
    return list(itertools.chain.from_iterable(parts))
