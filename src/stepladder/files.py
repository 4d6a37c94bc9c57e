"""Files: read without waiting and within limits, or refused; written atomically.

They are named by a person, a model's folder or an earlier run. Every function that reads raises ValueError with the
reason, and the caller's message names the place and what helps.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.resources
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from stepladder import installation
from stepladder.errors import RunError

if TYPE_CHECKING:
    from filelock import BaseFileLock

TEXT_BYTES = 1 << 20  # of a template, a rubric, a model card: the largest in use have a tenth of it
YAML_BYTES = 1 << 17  # PyYAML reads 0.1 to 0.6 MB a second
JSON_BYTES = 1 << 26
LINE_BYTES = 1 << 20  # of a line of a log that grows with the run
DEPTH = 50  # levels of blocks and lists
NODES = 200_000  # of a YAML file, its aliases (*name) written out
PART_SUFFIX = ".part"  # ends the name of a file that is being written
NAME_BYTES, PATH_BYTES = 255, 4095  # what Linux' file systems take

LOADED = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")  # what the libraries open in a model's folder
OBJECTS = {
    *("config.json", "generation_config.json", "adapter_config.json", "merge.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json"),
}


class Excess(yaml.MarkedYAMLError):
    """YAML that is nested too deeply, contains itself, or whose aliases multiply to more than memory holds."""


class _Loader(yaml.SafeLoader):
    """PyYAML's composer calls itself for each level, and would end in a RecursionError."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.levels += 1
        if self.levels > DEPTH + 2:  # the document, and a value
            mark = self.peek_event().start_mark
            raise Excess(problem=f"nested more than {DEPTH} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def read_text(path: str | Path, most: int = TEXT_BYTES, encoding: str = "utf-8-sig", errors: str = "strict") -> str:
    """The text of an ordinary file, or of what a link leads to.

    Args:
        most: bytes that it may hold.

    Raises:
        ValueError: it is missing, a folder, a pipe or a device, may not be read, holds more, or is not of `encoding`.
    """
    try:
        with open_file(path) as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise ValueError(_reason(path, error)) from None
    except MemoryError:
        raise ValueError("it is larger than the memory") from None
    if len(content) > most:
        raise ValueError(f"it holds more than {most:,} bytes")
    try:
        return content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: byte {error.start:,} is {content[error.start]:#04x}") from None


def open_file(path: str | Path) -> BinaryIO:
    """Open an ordinary file, or what a link leads to, to read bytes.

    Raises:
        OSError: it is missing, or may not be read.
        ValueError: it is a folder, a pipe or a device.
    """
    # Without O_NONBLOCK a pipe would be waited for until somebody writes into it.
    # On Windows O_BINARY keeps line ends as they are; the other two flags it does not have.
    flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    handle = os.open(path, os.O_RDONLY | sum(flags))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise ValueError(f"it is a {'folder' if stat.S_ISDIR(mode) else 'pipe, socket or device'}, and no file")
    return open(handle, "rb")


def read_lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream with their ends, one at a time, whatever the file's size.

    Of a line of more than `LINE_BYTES` only a few bytes are kept, which are no JSON.
    """
    while line := stream.readline(LINE_BYTES):
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            line = b"too long: " + line[:10]
            while (rest := stream.readline(LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            line += rest[-1:]
        yield line


def _reason(path: str | Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return f"it is a link to {os.readlink(path)!r}, which is not there"
    return error.strerror or str(error)


def read_json(path: str | Path, most: int = JSON_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, most))


def read_object(path: str | Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: as `read_json`, or it is another kind of value.
    """
    if not isinstance(found := read_json(path, most), dict):
        raise ValueError("it holds no JSON object")
    return found


_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))


def parse_json(text: str) -> Any:
    """Any JSON value; an integer of more than 18 digits is a float, since arithmetic on it could overflow.

    Raises:
        ValueError: it is no JSON, or nested more than `DEPTH` levels deep.
    """
    try:
        found = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("{") + text.count("[") <= DEPTH:
        return found
    level = [found] if isinstance(found, dict | list) else []
    for _ in range(DEPTH):
        items = [part.values() if isinstance(part, dict) else part for part in level]
        level = [item for part in items for item in part if isinstance(item, dict | list)]
    if level:
        raise ValueError("it is nested too deeply")
    return found


@functools.cache
def read_table(name: str) -> Any:
    """The value of a YAML file of the package, such as recipe/keys.yaml; libyaml reads it where it is installed.

    Its texts name commands as `stepladder check`, and are spelled as the current folder needs them.
    """
    text = importlib.resources.files("stepladder").joinpath(name).read_text(encoding="utf-8")
    return _localized(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def _localized(value: Any) -> Any:
    """A value with `installation.localize` applied to each text in it."""
    if isinstance(value, dict):
        return {key: _localized(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_localized(item) for item in value]
    return installation.localize(value) if isinstance(value, str) else value


def compose(text: str) -> yaml.Node | None:
    """YAML as nodes, which know their line and column; the value of each alias is the node that it stands for.

    Raises:
        yaml.YAMLError: it is no YAML; an `Excess` where memory or time would not suffice to use it.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (ValueError, OverflowError) as error:  # such as a number in an escape that is no character
        raise yaml.YAMLError(str(error)) from None
    if node is not None:
        _measure(node, set(), {})
    return node


def _measure(node: yaml.Node, above: set[int], known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The number of nodes with all aliases expanded, and the number of levels."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 0
    if id(node) in above:
        raise Excess(problem="a block contains itself", problem_mark=node.start_mark)
    if id(node) not in known:
        above.add(id(node))
        inside = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes = [_measure(part, above, known) for part in inside]
        above.remove(id(node))
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
    size, levels = known[id(node)]
    if levels > DEPTH:
        raise Excess(problem=f"nested more than {DEPTH} levels deep", problem_mark=node.start_mark)
    if size > NODES:
        said = f"more than {NODES:,} values, with its aliases (*) written out"
        raise Excess(problem=said, problem_mark=node.start_mark)
    return size, levels


def parse_yaml(text: str) -> Any:
    """The value in a YAML text, by PyYAML's safe loader.

    Raises:
        ValueError: it is no YAML, or as `compose`.
    """
    try:
        node = compose(text)
        return None if node is None else yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{getattr(error, 'problem', None) or error}{place}") from None


def name_fault(name: str) -> str:
    """Why no file can have this name; empty where one can."""
    if "\0" in name:
        return "it holds a NUL character"
    if any(len(os.fsencode(part)) > NAME_BYTES for part in name.split("/")):
        return f"a name in it is longer than the {NAME_BYTES} bytes that a file system takes"
    if sys.platform == "win32" and (bad := set('<>:"|?*') & set(os.path.splitdrive(name)[1])):
        return f"Windows allows no {min(bad)} in a name"
    return f"it is longer than {PATH_BYTES:,} bytes" if len(os.fsencode(name)) > PATH_BYTES else ""


def check_model_folder(folder: Path) -> None:
    """Check the files of a model before a library opens them, which would wait for a pipe forever.

    Raises:
        ValueError: one is neither an ordinary file nor a link to one, may not be read, or should hold one JSON object
            (`OBJECTS`) and does not.
    """
    # The weights first: a folder that another user has copied is named by them.
    loaded = [file for file in folder.iterdir() if file.suffix in LOADED]
    for file in sorted(loaded, key=lambda file: (file.suffix != ".safetensors", file)):
        try:
            mode = file.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError("it is a pipe, socket or device, and no file")
            if file.name in OBJECTS:
                read_object(file)
            elif file.suffix == ".jinja":
                read_text(file)
        except OSError as error:
            raise ValueError(f"{file} cannot be used: {_reason(file, error)}") from None
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {error}") from None
        if not os.access(file, os.R_OK):  # safetensors itself would say that there is no such file
            raise ValueError(f"{file} may not be read by you: chmod a+r {file}")


def cache_folder() -> Path:
    """The root of Stepladder's cache, under XDG_CACHE_HOME or ~/.cache; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepladder"


def remove(path: Path) -> None:
    """Remove a file or a folder; of a link the link, not what it leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def lock_file(file: Path, wait: bool = False) -> BaseFileLock:
    """Create and lock a file; the lock ends with its release (it is a context) or with this process.

    Args:
        wait: until another process has released it.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be written, or is a link, which is not followed.
    """
    import filelock  # a twentieth of a second, which a typo in a recipe need not wait for

    # Its fallback for file systems without locks is a file that a killed process leaves behind.
    lock = filelock.FileLock(file, timeout=-1 if wait else 0, mode=0o666, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(file)) from None
    return lock


def make_folder(folder: Path) -> None:
    """Make a folder, and check that files can be written into it.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RunError(f"{folder} cannot be written", why=error.strerror or str(error), help="another place") from None


def write_atomic(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write a file atomically: a reader, after a power cut too, sees the old content or the new one.

    Args:
        content: text, bytes, or parts that are written one by one, as they come.
    """
    content = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}{PART_SUFFIX}")
    try:
        part.unlink(missing_ok=True)  # a link is not written through
        with part.open("wb") as out:
            out.writelines([content] if isinstance(content, bytes) else content)
            out.flush()
            os.fsync(out.fileno())  # else the rename may reach the disk before the content
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()  # on a full disk it takes what room there is
        raise


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if sys.platform == "win32" and path.is_dir():  # NTFS keeps the list of names in its journal
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)  # Windows flushes what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_at(handle: int, count: int, position: int) -> bytes:
    """Bytes of an open file from a position on; on Windows this moves the file's own position."""
    if sys.platform != "win32":
        return os.pread(handle, count, position)
    os.lseek(handle, position, os.SEEK_SET)
    return os.read(handle, count)


def write_at(handle: int, content: bytes, position: int) -> int:
    """Write at a position of an open file, and return how many bytes were taken."""
    if sys.platform != "win32":
        return os.pwrite(handle, content, position)
    os.lseek(handle, position, os.SEEK_SET)
    return os.write(handle, content)


def append_atomic(path: Path, content: bytes) -> None:
    """Append all of the content or nothing: a full disk takes a part of it first."""
    with path.open("ab", buffering=0) as out:
        end = out.tell()
        if out.write(content) < len(content):
            out.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
