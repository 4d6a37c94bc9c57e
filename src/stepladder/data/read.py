"""One local file, packed or not, or one folder of `datasets.save_to_disk`, to its rows."""

from __future__ import annotations

import contextlib
import difflib
import gzip
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepladder import files, installation
from stepladder.console import quote_for_shell
from stepladder.data.json_documents import is_split_object, json_rows, split_word
from stepladder.data.readers import (
    JSON_FORM,
    Found,
    arrow_rows,
    csv_rows,
    parquet_rows,
    python_rows,
    without_nulls,
)
from stepladder.errors import DataError, first_line
from stepladder.files import name_fault, read_json

READERS: dict[str, Callable[[Any, str], Iterator[Found]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".ndjson": json_rows,
    ".jsonlines": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".feather": arrow_rows,
    ".py": python_rows,
}
COMPRESSED = (".gz", ".zst")
LFS_POINTER = b"version https://git-lfs"
# What files of these kinds begin with.
MAGIC = {b"\x1f\x8b\x08": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet", b"PK\3\4": ".zip"}
LISTED = 5  # sets of LLaMA-Factory that a message lists
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # of `datasets` and of LLaMA-Factory
SAVED = ("state.json", "dataset_info.json")  # stand in each folder that `Dataset.save_to_disk` writes
# What a message calls the files of other kinds, and the Python that makes JSONL of FILE, or unpacks it.
OTHER_KINDS = {
    suffix: (kind["name"], kind["code"])
    for kind in files.read_table("data/other_kinds.yaml")
    for suffix in kind["suffixes"]
}
UNPACKERS = {".bz2": "bunzip2 -k", ".xz": "unxz -k"}  # which leave a file alone that is there already


def read(path: Path, split: str = "train") -> Iterator[Found]:
    """The rows of one local file, or of one folder of `Dataset.save_to_disk`, in their order.

    Args:
        split: which rows are read of a JSON file that holds several splits.

    Raises:
        DataError: no such file, an unknown kind, a file that cannot be read to its end, or no row at all.
    """
    name = printable(path)
    _require_file(path, name)
    if path.is_dir():
        yield from _saved_rows(path, name)
        return
    reader = READERS.get(kind(path))
    if reader is None or (reader in (parquet_rows, arrow_rows) and path.suffix.lower() in COMPRESSED):
        raise other_kind(path)
    refuse_metadata(path)
    where = ""
    try:
        refuse_other_content(path)
        if path.stat().st_size:
            with _open(path) as stream:
                found = json_rows(stream, name, split) if reader is json_rows else reader(stream, name)
                for where, row in found:
                    yield where, row
    except PermissionError:
        raise DataError("the file may not be read", where=name, help=f"chmod u+r {quote_for_shell(path)}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"the file cannot be read to its end: {error}",
            where=where or name,
            why="this is the last row before the fault" if where else "",
            help="it is damaged or cut short: copy, download or pack it again",
        ) from None
    if not where:
        raise DataError(f"{name} holds no rows", help=JSON_FORM)


def printable(path: Path) -> str:
    """A path as messages show it: control characters, and bytes that are not UTF-8, by their numbers."""
    text = str(path)
    return text if text.isprintable() else repr(text)[1:-1]


def _require_file(path: Path, name: str) -> None:
    """Raise DataError unless there is a file, or a folder of `save_to_disk`: a named pipe would wait for ever."""
    if fault := name_fault(str(path)):
        raise DataError(f"{name[:60]}… cannot be read: {fault}", help="name a file that can")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(
                f"{name} is a link to {os.readlink(path)!r}, which is not there",
                help="a download that was cut short leaves such links: download the data set again",
            ) from None
        help = near_file(str(path)) or "check the path"
        raise DataError(f"there is no data file {name}", why=installation.places(path), help=help) from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}", help="name a file that can") from None
    if stat.S_ISDIR(mode):
        if (path / "dataset_dict.json").is_file():
            raise DataError(f"{name} holds several splits", help=f"name one of them: {name}/train")
        if not is_saved(path):
            raise DataError(f"{name} is a folder, though it has a file's name", help="name the file in it")
    elif not stat.S_ISREG(mode):
        copy = f"cat {quote_for_shell(path)} > rows{kind(path) or '.jsonl'}"
        raise DataError(
            f"{name} is a pipe, socket or device, and no file",
            why="data is read more than once",
            help=copy if stat.S_ISFIFO(mode) else "name a file",  # a device may never end
        )


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return all(os.path.isfile(folder / name) for name in SAVED)


def kind(path: Path) -> str:
    """The suffix that says how a file is read: `.jsonl` for `rows.jsonl.gz`."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def stem(path: Path) -> Path:
    """A path without the suffixes that say how it is read: `train` for `train.jsonl.gz`."""
    name = path.name
    for suffix in (*COMPRESSED, kind(path)):
        name = name[: len(name) - len(suffix)] if suffix and name.lower().endswith(suffix) else name
    return path.with_name(name)


def other_kind(path: Path) -> DataError:
    """The error for a file that is not read: what it is, and the command that turns it into one that is."""
    suffix = kind(path)
    what, code = OTHER_KINDS.get(suffix, ("", ""))
    if path.is_file() and _looks_like_json(path):
        what, help = "its content looks like JSON", f"mv {quote_for_shell(path)} {quote_for_shell(f'{path}.jsonl')}"
    elif code:
        # Beside the file and under a new name.
        code = code.replace("FILE", json.dumps(str(path))).replace("OUT", json.dumps(f"{path}.jsonl"))
        help = f"python -c {quote_for_shell(code)}"
    elif suffix in UNPACKERS:
        help = f"{UNPACKERS[suffix]} {quote_for_shell(path)}"
    else:
        help = f"one of {', '.join(READERS)}; all but .parquet, .arrow and .feather may end in .gz or .zst too"
    return DataError(f"{printable(path)}: files of the kind '{path.suffix}' are not read", why=what, help=help)


def _looks_like_json(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return bool(re.match(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"', stream.read(1000)))
    except OSError:
        return False


def refuse_other_content(path: Path) -> None:
    """Raise DataError where a file is not what its name says, by its first bytes."""
    with path.open("rb") as stream:
        head = stream.read(len(LFS_POINTER)).lower()
    name, suffix = printable(path), path.suffix.lower()
    if head == LFS_POINTER:
        raise DataError(
            f"{name} is a pointer of git-lfs, and no data",
            why="the data set was cloned without git-lfs, which fetches the files",
            help=f"git -C {quote_for_shell(path.parent)} lfs pull",
        )
    if head.startswith((b"<!doctype html", b"<html")):
        help = "download the file itself: on the hub its address holds /resolve/, not /blob/"
        raise DataError(f"{name} is a web page, and no data", help=help)
    for magic, right in MAGIC.items():
        if head.startswith(magic.lower()) and suffix != right:
            help = f"mv {quote_for_shell(path)} {quote_for_shell(f'{path}{right}')}"
            raise DataError(f"{name} is a {right} file by its content", help=help)


def refuse_metadata(path: Path) -> None:
    """Raise DataError for a file that tells of a data set and holds none of its rows."""
    if path.name in METADATA:
        refuse_llama_factory(path)
        raise DataError(
            f"{printable(path)} describes a data set and holds no rows",
            help=f"name the folder: {printable(path.parent)}",
        )


def refuse_llama_factory(path: Path) -> None:
    """Raise DataError where a `dataset_info.json` is LLaMA-Factory's: the files beside it are sets of their own.

    Raises:
        DataError: also where the file is not JSON or may not be read.
    """
    try:
        listed = read_json(path)
    except ValueError as error:
        help = "mend it; or remove it, if the files beside it are one set"
        raise DataError(f"it cannot be read: {error}", where=printable(path), help=help) from None
    places = {"file_name", "hf_hub_url", "ms_hub_url", "script_url", "om_hub_url"}
    entries = listed.items() if isinstance(listed, dict) else ()
    sets = {name: entry for name, entry in entries if isinstance(entry, dict) and places & entry.keys()}
    if not sets:
        return
    known = {name: recipe_lines for name, entry in sets.items() if (recipe_lines := _recipe_lines(path.parent, entry))}
    present = sorted(known, key=lambda name: not (path.parent / str(sets[name].get("file_name"))).exists())
    shown = [f"{name}:\n  " + "\n  ".join(known[name]) for name in present[:LISTED]]
    more = f"\n… and {len(known) - LISTED} more, by the same pattern" if len(known) > LISTED else ""
    why = f"its dataset_info.json lists {len(sets)} set{'s' * (len(sets) > 1)}"
    if unusable := len(sets) - len(known):
        why += f"; {unusable} of them cannot be read: preference pairs, loading scripts, or messages under other keys"
    raise DataError(
        f"{printable(path.parent)} is a data folder of LLaMA-Factory",
        why=why,
        help="in the recipe, one of them:\n" + "\n".join(shown) + more if shown else JSON_FORM,
    )


def _recipe_lines(folder: Path, entry: dict[str, Any]) -> list[str]:
    """The lines of a recipe that read a set of LLaMA-Factory's; none for one that holds no answers to learn."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if entry.get("ranking") or not isinstance(columns, dict) or not isinstance(tags, dict):
        return []
    if tags.get("role_tag", "from") not in ("role", "from") or tags.get("content_tag", "value") not in (
        "content",
        "value",
    ):
        return []
    if entry.get("file_name"):
        lines = [f"dataset_name: {_yaml_scalar(folder / str(entry['file_name']))}"]
    elif entry.get("hf_hub_url"):
        lines = [f"dataset_name: {_yaml_scalar(entry['hf_hub_url'])}"]
    else:
        return []
    for key, theirs in (("dataset_config", "subset"), ("dataset_train_split", "split")):
        lines += [f"{key}: {_yaml_scalar(entry[theirs])}"] if entry.get(theirs) else []
    if renamed := _column_map(entry, columns):
        lines.append(f"column_map: {{{', '.join(f'{new}: {_yaml_scalar(old)}' for new, old in renamed.items())}}}")
    roles = {tags.get(f"{role}_tag"): role for role in ("user", "assistant", "system")}
    if odd := {
        tag: role for tag, role in roles.items() if tag and tag not in ("user", "human", "assistant", "gpt", role)
    }:
        lines.append(f"role_map: {{{', '.join(f'{_yaml_scalar(tag)}: {role}' for tag, role in odd.items())}}}")
    return lines


def _yaml_scalar(value: object) -> str:
    """A text as a value in YAML."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z/][\w./-]*", text) else json.dumps(text, ensure_ascii=False)


def _column_map(entry: dict[str, Any], columns: dict[str, str]) -> dict[str, str]:
    """Our name of a column: theirs, where the two differ. Their names for a pair are not those of the files."""
    same: tuple[str, ...] = ()
    if entry.get("formatting", "alpaca") != "alpaca":
        ours = {"messages": "messages", "system": "system", "tools": "tools"}
        columns, same = {"messages": "conversations", **columns}, ("messages", "conversations")
    elif set(columns) == {"prompt"}:  # plain text, for pre-training
        ours = {"prompt": "text"}
    else:
        ours = {"prompt": "instruction", "query": "input", "response": "output"}
        ours |= {"system": "system", "history": "history"}
    return {new: columns[their] for their, new in ours.items() if columns.get(their) not in (None, new, *same)}


def inner_splits(path: Path) -> list[str]:
    """The splits of a JSON file that is one object of them, `{"train": […], "test": […]}`; none for any other file."""
    if READERS.get(kind(path)) is not json_rows or not os.path.isfile(path):
        return []
    try:
        with _open(path) as stream:
            # Few files pass this look at their beginning, so that hardly any is read twice.
            key = re.match(rb'(?:\xef\xbb\xbf)?\s*\{\s*"([\w-]+)"\s*:\s*\[', stream.peek(1000))
            if not key or not split_word(key[1].decode(errors="replace")):
                return []
            value = json.loads(stream.read())
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):  # named when the file is read
        return []
    return list(value) if isinstance(value, dict) and is_split_object(value) else []


def _saved_rows(folder: Path, name: str) -> Iterator[Found]:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""
    import datasets

    try:
        for file in folder.glob("*.arrow"):
            refuse_other_content(file)
        found = datasets.load_from_disk(str(folder))
        found = found.with_format(None, columns=found.format["columns"])
    except DataError:
        raise
    except Exception as error:  # of its state, of Arrow, of the file system: all the user's to read
        raise DataError(
            f"the folder of save_to_disk cannot be loaded: {first_line(error)}",
            where=name,
            help="copy it again, or write it again with save_to_disk",
        ) from None
    if not len(found):
        raise DataError(f"{name} holds no rows", help="another split, or write it again with save_to_disk")
    yield from dataset_rows(found, f"{name}: row", name)


def find_download(name: str) -> str | None:
    """The folder of a hub data set that `hf download` or stage.py has fetched; None where the hub can be asked.

    `datasets` does not look there: without the hub it knows only what it has once read itself.
    """
    from huggingface_hub import constants, errors, get_cached_repo_tree, snapshot_download

    with contextlib.suppress(errors.CachedRepoTreeNotFoundError):  # a part of it, fetched by `datasets` itself
        if constants.HF_HUB_OFFLINE and get_cached_repo_tree(name, repo_type="dataset"):
            return str(snapshot_download(name, repo_type="dataset", local_files_only=True))
    return None


def dataset_rows(found: Any, place: str, where: str) -> Iterator[Found]:
    """The rows of a set that `datasets` loaded, each with its place: `place` and its number.

    Raises:
        DataError: a column holds pictures, sound or video.
    """
    # Looked for before the first row is read, which would decode a thousand pictures.
    if media := re.search(r"'(\w+)': \w*\(?(Image|Audio|Video)\(", str(found.features)):
        raise DataError(f"multimodal: the column '{media[1]}' holds {media[2]}s", where=where)
    number = 0
    for batch in found.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{place} {number}", without_nulls(dict(zip(batch, values, strict=True)))


def _open(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow  # datasets needs it anyway, and it notices a stream that ends early

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def near_file(name: str) -> str:
    """As `suggest` for keys, among the files of one folder: a suffix that is left out counts little."""
    siblings = installation.list_siblings(Path(name))
    near = difflib.get_close_matches(name, siblings, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""
