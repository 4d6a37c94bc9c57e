"""From rows to the tokens that training reads: once a node, cached by content, in several processes where it pays.

One rank of each node reads, renders and packs the rows, and writes the result as an Arrow folder
named by the content of all that it follows from; the node's other ranks open that folder, whose
pages they share. A second run on the same rows finds it there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import console, files, hardware
from stepladder.data import loss_keys, render
from stepladder.data.row_renderer import NO_END, Remarks
from stepladder.data.rows import Rows, Stream
from stepladder.errors import DataError
from stepladder.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

TRAIN, EVALUATION = "train", "evaluation"
NOTES = "notes.json"  # beside them: what was remarked of their rows, and which were left out
STREAMED = 200  # rows of a stream that are looked at before it is trained on
FILES = "files"  # in the notes: the SHA-256 of each file of the sets
# What prepared rows follow from, beside their content.
CODE = (
    *("prepare.py", "render.py", "row_renderer.py", "loss_keys.py", "remarks.yaml"),
    *("templates/chat_template.py", "templates/layout.py", "templates/thoughts.py"),
)
KEPT = 30 * 24 * 3600  # seconds for which a prepared set stays in the cache after its last use
# A further process costs about 4 s, its imports, in which one process renders 20,000 short rows.
ROWS_A_PROCESS = 20_000
_given: list[Any] = []  # rows, tokenizer and settings in a further process


def prepare_rows(
    train: Rows | Stream | None, evaluation: Rows | None, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Path:
    """The folder that holds the training and the evaluation set, made now unless the cache has it.

    A stream is not in it: see `prepare_stream`.

    Raises:
        DataError: a row that cannot be rendered or trains nothing; rows without any end of turn;
            no place to write.
        ModelError: conversations and a tokenizer without a chat template.
    """
    cached = files.cache_folder() / "prepared" / _identity(train, evaluation, tokenizer, settings)
    if cached.is_dir():
        if not (fault := _damage(cached)):
            with contextlib.suppress(OSError):
                os.utime(cached)  # in use from now on
            return cached
        console.say(f"⚠ the prepared rows in {cached} are damaged and are prepared again: {fault}")
    try:
        return _prepare(train, evaluation, tokenizer, settings, cached)
    except OSError:  # a home folder may be read-only or full on a compute node: then for this job alone
        apart = Path(tempfile.mkdtemp(prefix="stepladder-")) / cached.name
        try:
            return _prepare(train, evaluation, tokenizer, settings, apart)
        except OSError as error:
            raise DataError(
                "the prepared rows can be written nowhere",
                where=f"{cached.parent}, {apart.parent}",
                why=str(error),
                help="XDG_CACHE_HOME=/a/folder/with/space",
            ) from None


def _prepare(
    train: Rows | Stream | None,
    evaluation: Rows | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    folder: Path,
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_old(folder.parent)
    # A network's file system keeps a folder whose files are mapped: they are no longer as `_write` returns.
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent, ignore_cleanup_errors=True) as work:
        return _write(*_render_sets(train, evaluation, tokenizer, settings, Path(work)), folder)


def _render_sets(
    train: Rows | Stream | None,
    evaluation: Rows | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    work: Path,
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """The sets, which read files in the folder `work`; and their notes and skipped rows."""
    packs, eval_packs = settings.get("packing"), settings.get("eval_packing")
    sets, said = {}, {}
    for name, rows, is_packed in (
        (TRAIN, train if isinstance(train, Rows) else None, packs),
        (EVALUATION, evaluation or None, packs if eval_packs is None else eval_packs),
    ):
        if rows is None:
            continue
        dataset, remarks = render_parallel(rows, tokenizer, settings, work / name)
        if not len(dataset):
            raise render.none_left(rows.name, remarks)
        if name == TRAIN and remarks.turns and not remarks.ends and loss_keys.mode(settings) != "everything":
            raise DataError(NO_END[0], help=NO_END[1])
        sets[name] = _pack(dataset, settings, is_packed)
        notes = remarks.notes(rows.where) + (loss_keys.idle_notes(settings, remarks.thoughts) if name == TRAIN else [])
        said[name] = {"notes": notes, "skipped": remarks.skipped}
    return sets, said


def open_prepared(folder: Path) -> tuple[Dataset | None, Dataset | None]:
    """The training and the evaluation set of a prepared folder, mapped into memory rather than read."""
    from datasets import load_from_disk

    train, evaluation = (
        load_from_disk(str(part)) if (part := folder / name).is_dir() else None for name in (TRAIN, EVALUATION)
    )
    return train, evaluation


def read_notes(folder: Path, train: Rows | Stream | None, evaluation: Rows | None) -> list[str]:
    """What was remarked of the rows as they were rendered; those left out then are added to the sets' `skipped`."""
    notes: list[str] = []
    said = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    for name, rows in ((TRAIN, train), (EVALUATION, evaluation)):
        if rows and name in said:
            rows.skipped = rows.skipped + said[name]["skipped"]
            notes += [f"evaluation rows: {note}" if rows is evaluation else note for note in said[name]["notes"]]
    return notes


def longest(dataset: Dataset | IterableDataset) -> int | None:
    """Tokens of the longest sequence; None of a stream, whose rows nobody has seen."""
    return int(lengths(dataset).max()) if hasattr(dataset, "__len__") else None


def lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each row, as int32 [rows], without reading one."""
    import pyarrow.compute as pc

    table = dataset.select_columns("input_ids").with_format("arrow")[:]
    return pc.list_value_length(table.column("input_ids")).to_numpy()


def prepare_stream(stream: Stream, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> IterableDataset:
    """The training set of a stream, which each rank renders and packs as it reads."""
    return _pack(render.render_stream(stream, tokenizer, settings), settings, settings.get("packing"))


def stream_notes(stream: Stream, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[str]:
    """What is remarked of a stream's first rows; those left out later are in its `left_out`.

    Raises:
        DataError: as `render.render`, of one of these rows.
    """
    pairs = list(itertools.islice(stream, STREAMED))
    rows, remarks = Rows.from_pairs(stream.name, pairs), Remarks()
    render.render(rows, tokenizer, settings, 0, remarks)
    notes = remarks.notes(rows.where) + loss_keys.idle_notes(settings, remarks.thoughts)
    return [f"the first {len(rows):,} rows of the stream: {note}" for note in notes]


def render_parallel(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> tuple[Dataset, Remarks]:
    """As `render.render`, in `dataset_num_proc` processes, or in as many as pay; with what was remarked.

    The set reads the files that are written into `folder`.
    """
    from datasets import Dataset, concatenate_datasets

    folder.mkdir()

    cores = hardware.cores()
    processes = settings.get("dataset_num_proc") or min(cores, len(rows) // ROWS_A_PROCESS)
    if processes < 2 or sys.platform == "win32":  # where an open file cannot be passed on (FileList)
        remarks = _write_part(folder / "0.arrow", rows, tokenizer, settings)
        return Dataset.from_file(str(folder / "0.arrow")), remarks
    edges = [len(rows) * number // processes for number in range(processes + 1)]
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        # A fork would share the locks of the threads that PyTorch and the tokenizer have started.
        multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(max(1, cores // processes), rows, tokenizer, settings),
    ) as pool:
        parts = [folder / f"{number}.arrow" for number in range(processes)]
        jobs = [pool.submit(_write_share, *job) for job in zip(parts, edges, edges[1:], strict=False)]
        remarks = Remarks()
        for job, first in zip(jobs, edges, strict=False):
            remarks.join(job.result(), first)
    return concatenate_datasets([Dataset.from_file(str(part)) for part in parts]), remarks


def _pack(dataset: Dataset | IterableDataset, settings: Settings, packs: bool) -> Dataset | IterableDataset:
    """`dataset` as training reads it: shuffled where `shuffle_dataset` is set, packed by TRL where `packs` is.

    A packed row's `rows` are the rows in it, and `seq_lengths` their lengths, by which attention
    keeps them apart (`packing_strategy: wrapped` cuts rows anywhere and has none).
    """
    from trl import pack_dataset

    def shuffled(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
        return rows.shuffle(seed=settings.get("seed")) if settings.get("shuffle_dataset") else rows

    if not packs:
        return shuffled(dataset)
    # TRL packs lists of one length together: each token carries its row's number through it.
    dataset = shuffled(dataset).map(_for_each_token, batched=True)
    dataset = pack_dataset(dataset, settings.get("max_length"), settings.get("packing_strategy"))
    return shuffled(dataset.map(_for_each_sequence, batched=True))


def _for_each_token(batch: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(batch["rows"], batch["input_ids"], strict=True)
    return {"rows": [row * len(ids) for row, ids in pairs]}


def _for_each_sequence(batch: dict[str, Any]) -> dict[str, Any]:
    return {"rows": [list(dict.fromkeys(rows)) for rows in batch["rows"]]}


def _start_process(threads: int, *given: Any) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's, which would else be all cores' in each process
    console.quiet_libraries()
    _given[:] = given


def _write_share(file: Path, first: int, end: int) -> Remarks:
    rows, tokenizer, settings = _given
    return _write_part(file, rows.take(range(first, end)), tokenizer, settings, first)


def _write_part(
    file: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, first: int = 0
) -> Remarks:
    remarks = Remarks()
    with file.open("wb") as stream:
        render.write(stream, rows, tokenizer, settings, first, remarks)
    return remarks


def _identity(
    train: Rows | Stream | None, evaluation: Rows | None, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> str:
    """SHA-256 of the rows, the tokenizer, the settings and the code that the prepared sets follow from."""
    here = Path(__file__).parent
    code = [(here / name).read_text(encoding="utf-8") for name in CODE]
    keys = ("max_length", "packing", "eval_packing", "packing_strategy", "shuffle_dataset", "seed", "on_bad_row",
            "train_on_reasoning", "additional_special_tokens")  # fmt: skip
    parts = [
        [rows.fingerprint()["sha256"] if isinstance(rows, Rows) else None for rows in (train, evaluation)],
        [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, str(tokenizer.special_tokens_map)],
        [loss_keys.mode(settings), *map(settings.get, keys)],
        [code, *map(importlib.metadata.version, ("datasets", "tokenizers", "transformers", "trl"))],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write(sets: dict[str, Dataset], said: dict[str, Any], folder: Path) -> Path:
    """Save the sets beside and move them into place: whoever looks sees all of them or none."""
    part = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        for name, dataset in sets.items():
            dataset.save_to_disk(str(part / name))
        names = [file.relative_to(part).as_posix() for file in part.glob("*/*")]
        said = said | {FILES: {name: files.hash_file(part / name) for name in names}}
        (part / NOTES).write_text(json.dumps(said), encoding="utf-8")
        _flush(part)
        if folder.is_dir() and _damage(folder):
            damaged = part.with_name(f"{part.name}.damaged")
            folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        part.rename(folder)
    except OSError:
        if not folder.is_dir() or _damage(folder):  # else another job was faster, with the same content
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _clear_old(folder: Path) -> None:
    """Remove the prepared sets that no run has used for long."""
    for old in folder.iterdir():
        with contextlib.suppress(OSError):  # another job may be clearing it away too
            if old.stat().st_mtime < time.time() - KEPT:
                shutil.rmtree(old)


def _damage(folder: Path) -> str:
    """What is wrong with a prepared folder, or nothing."""
    try:
        for name, digest in json.loads((folder / NOTES).read_text(encoding="utf-8"))[FILES].items():
            if files.hash_file(folder / name) != digest:
                return f"{name} is not what was written (SHA-256)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return repr(error)
    return ""


def _flush(folder: Path) -> None:
    """Wait until all that a folder holds is on the disk: a power cut must not leave its name without its content."""
    for path in [*folder.rglob("*"), folder]:
        files.flush(path)
