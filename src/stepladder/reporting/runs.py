"""A run folder, read or followed as it is written: complete, cut short or damaged. What is wrong is named."""

from __future__ import annotations

import contextlib
import os
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from stepladder.errors import FAULT, GOOD, LOOK, LaunchError, RunError, Verdict
from stepladder.files import open_file, read_lines, read_object
from stepladder.manifest import (
    LARGEST,
    MANIFEST,
    METRICS,
    NUMBER,
    parse_row,
    read_manifest,
    read_metrics,
    status,
    stop_reason,
)
from stepladder.reporting.series import Curve

POLL = 1.0  # seconds
FOLLOW_ON = {"preempted": ": started again it goes on from its checkpoint, and the same --watch follows it on"}
FOLLOWED_BYTES = 1 << 20  # of what was logged before --watch begins: about 2,000 steps
DAMAGED_LINES = 10  # that a remark names
QUIET = 600  # seconds without a line after which a note is printed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST


def _has_numbers(value: dict[str, Any], *keys: str) -> bool:
    return all(value.get(key) is None or _is_number(value[key]) for key in keys)


def _are_texts(value: dict[str, Any]) -> bool:
    return all(isinstance(text, str) for text in value.values())


def _are_totals(value: Any) -> bool:
    peaks = value.get("peak_memory_bytes", [0])
    rest = _has_numbers(value, "steps", "tokens", "seconds", "tokens_per_second")
    return isinstance(peaks, list) and all(map(_is_number, peaks)) and rest


def _are_held_out_rows(value: Any) -> bool:
    trained_on = value.get("trained_on", "")
    counts = type(value.get("rows")) is int and (trained_on is None or type(trained_on) is int)  # None: of a stream
    return len(value) == 3 and counts and isinstance(value.get("foreign"), str)


def _is_early_stop(value: Any) -> bool:
    keys = ("step", "of_steps", "evaluations", "best_step", "best", "threshold")
    needed = all(value.get(key) is not None for key in ("step", "of_steps", "evaluations", "threshold"))
    return needed and {*keys} <= value.keys() and _has_numbers(value, *keys) and isinstance(value.get("metric"), str)


# What the page looks into; a damaged or foreign manifest may hold anything.
FACTS: dict[str, tuple[type, Callable[[Any], bool]]] = {
    "recipe": (dict, lambda value: isinstance(value.get("max_steps") or 0, int)),
    "packages": (dict, bool),
    "starts_from": (dict, lambda value: isinstance(value.get("base"), str)),
    "parameters": (dict, lambda value: all(map(_is_number, value.values()))),
    "totals": (dict, _are_totals),
    "final": (dict, lambda value: all(v is None or isinstance(v, int | float) for v in value.values())),
    "plan": (dict, lambda value: _has_numbers(value, "peak_memory_bytes", "tokens_per_second")),
    "held_out": (dict, _are_held_out_rows),
    "inputs": (dict, lambda value: all(isinstance(part, dict) and _are_texts(part) for part in value.values())),
    "stopped_early": (dict, _is_early_stop),
    "datasets": (list, lambda value: all(isinstance(item, dict) for item in value)),
}
# The metrics that the page draws; of the others nothing is kept.
DRAWN = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes")


@dataclass
class LoggedRun:
    """What a run folder holds; `remarks` says what it lacks and what in it cannot be read.

    `facts` is run.json; `curves` are the metrics of metrics.jsonl that the page draws (`DRAWN`) and `last_step` its
    last step, None if it has none; `comparison` is compare.json, `audit` is audit.json, of the form that
    `check.py --audit --json` prints.
    """

    folder: Path
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    last_step: int | None = None
    comparison: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def curve(self, key: str) -> Curve:
        """A metric over the steps; empty where it was not logged."""
        return self.curves.get(key, Curve())


def check_folder(folder: Path) -> None:
    """Raise RunError where neither run.json nor metrics.jsonl lies."""
    if not any((folder / name).is_file() for name in (MANIFEST, METRICS)):
        raise RunError(
            f"{folder} {'is no run folder' if folder.exists() else 'does not exist'}",
            why=f"a run folder holds {MANIFEST} and {METRICS}",
            help="give the output_dir of a training run, such as runs/lora",
        )


def read(folder: Path) -> LoggedRun:
    """Read a run folder.

    Raises:
        RunError: neither run.json nor metrics.jsonl lies there.
    """
    check_folder(folder)
    run = LoggedRun(folder, folder.resolve().name)
    run.facts = _read_json(run, MANIFEST, needed=True)
    for key, (kind, fits) in FACTS.items():
        if (value := run.facts.get(key)) and not (isinstance(value, kind) and fits(value)):
            run.remarks.append(f"{MANIFEST} holds {key} in another form than training writes it: left out")
            del run.facts[key]
    run.comparison = _read_json(run, "compare.json")
    if run.comparison and not (_has_answers(run.comparison) and _has_figures(run.comparison)):
        run.remarks.append("compare.json does not hold what a comparison writes and is left out")
        run.comparison = {}
    run.audit = _read_json(run, "audit.json")
    if run.audit and not _has_findings(run.audit):
        run.remarks.append("audit.json does not hold what an audit writes and is left out")
        run.audit = {}
    _read_metrics(run)
    state = run.facts.get("status")
    if state == "running":
        run.remarks.append("run.json says `running`: the run goes on, or it was ended before it could say so")
    elif state == "failed":
        run.remarks.append(f"the run failed: {run.facts.get('error', 'without a reason in run.json')}")
    return run


def read_all(folders: list[Path]) -> list[LoggedRun]:
    """Several runs, in the order given, with names that tell them apart.

    Raises:
        RunError: a folder is no run's, or is given twice.
    """
    runs = [read(folder) for folder in folders]
    places = [run.folder.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise RunError(f"{run.folder} is given twice", help="name each run once")
        if sum(other.name == place.name for other in places) > 1:
            run.name = str(run.folder)
    return runs


def _has_answers(comparison: dict[str, Any]) -> bool:
    """Whether each side has an answer to each question, as text."""
    try:
        names = [side["name"] for side in comparison["sides"]]
        texts = [comparison["questions"], comparison["references"], *(side["answers"] for side in comparison["sides"])]
        rest = [*names, *comparison.get("notes", []), comparison.get("command", "")]
    except (KeyError, TypeError):
        return False
    rows = texts[0]
    if not all(names) or not all(isinstance(text, str) for text in rest):
        return False
    return all(isinstance(t, list) and len(t) == len(rows) and all(isinstance(x, str) for x in t) for t in texts)


def _has_figures(comparison: dict[str, Any]) -> bool:
    """Whether each row of figures has a mean a side, and each verdict is one."""
    count = len(comparison["sides"])
    try:
        shown = [side for row in comparison["metrics"] for side in row["sides"] if side]
        means = [side["mean"] for side in shown] + [side.get(key) for side in shown for key in ("low", "high")]
        texts = [row[key] for row in comparison["metrics"] for key in ("name", "unit", "winner")]
        verdicts = [Verdict(**verdict) for found in comparison["verdicts"] for verdict in found["verdicts"]]
        whole = all(len(row["sides"]) == count == len(row["tests"]) for row in comparison["metrics"])
        required = comparison.get("required", [])
        texts += [one[key] for one in required for key in ("side", "claim", "evidence")]
        whole = whole and isinstance(required, list) and all(isinstance(one["met"], bool) for one in required)
        whole = whole and all((side.get("low") is None) == (side.get("high") is None) for side in shown)
    except (KeyError, TypeError, AttributeError):
        return False
    known = all(verdict.severity in (GOOD, LOOK, FAULT) for verdict in verdicts)
    texts += [text for v in verdicts for text in (v.name, v.what, v.evidence, v.help)]
    numbers = all(mean is None or isinstance(mean, int | float) for mean in means)
    return whole and known and numbers and all(isinstance(text, str) for text in texts)


def _has_findings(audit: dict[str, Any]) -> bool:
    found = audit.get("findings")
    return isinstance(found, list) and all(
        isinstance(one, dict) and isinstance(one.get("figures", {}), dict) and isinstance(one.get("where", []), list)
        for one in found
    )


def _read_json(run: LoggedRun, name: str, needed: bool = False) -> dict[str, Any]:
    path = run.folder / name
    if not os.path.lexists(path):
        run.remarks += [f"{name} is missing"] * needed
        return {}
    try:
        return read_object(path)
    except ValueError as error:
        run.remarks.append(f"{name} cannot be read and is left out: {error}")
        return {}


def _read_metrics(run: LoggedRun) -> None:
    """Read the curves line by line: a run of a million steps has half a gigabyte of metrics."""
    if not os.path.lexists(run.folder / METRICS):
        run.remarks.append(f"{METRICS} is missing: there are no curves")
        return
    logged = {key: (array("q"), array("d")) for key in DRAWN}
    damaged: list[str] = []
    last_step = None
    try:
        for number, (line, row) in enumerate(read_metrics(run.folder), start=1):
            if row:
                step = row["step"]
                last_step = step if last_step is None else max(step, last_step)
                for key, (steps, values) in logged.items():
                    if isinstance(value := row.get(key), NUMBER):
                        steps.append(step)
                        values.append(value)
            elif not line.endswith(b"\n"):
                run.remarks.append(f"{METRICS} line {number} is cut short and left out: it was being written")
            elif line.strip() and len(damaged) <= DAMAGED_LINES:
                damaged.append(str(number) if len(damaged) < DAMAGED_LINES else "…")
    except LaunchError as error:
        run.remarks.append(f"{error.what}, so there are no curves")
        return
    if damaged:
        run.remarks.append(f"{METRICS} is damaged at line {', '.join(damaged)}: left out")
    if last_step is None:
        run.remarks.append(f"{METRICS} holds no metrics yet")
    run.last_step, run.curves = last_step, {key: Curve(*columns) for key, columns in logged.items()}
    memory = run.curve("peak_memory_bytes")
    run.curves["peak_memory_gib"] = Curve(memory.steps, memory.values / 2**30)


def side_by_side(logged: list[LoggedRun]) -> list[str]:
    """The runs as lines of a table: what each trained, took and reached."""
    rows: list[tuple[str, ...]] = [("run", "trained", "steps", "seconds", "tokens/s", "GiB", "loss", "held-out loss")]
    for run in logged:
        totals, final = run.facts.get("totals") or {}, run.facts.get("final") or {}
        counts, peaks = run.facts.get("parameters") or {}, totals.get("peak_memory_bytes") or []
        cells = (
            (counts.get("trainable"), "{:,}"),
            (totals.get("steps"), "{:,}"),
            (totals.get("seconds"), "{:,.0f}"),
            (totals.get("tokens_per_second"), "{:,.0f}"),
            (max(peaks) / 2**30 if peaks else None, "{:.2f}"),
            (final.get("loss"), "{:.4f}"),
            (final.get("eval_loss"), "{:.4f}"),
        )
        rows.append((run.name, *("–" if value is None else form.format(value) for value, form in cells)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def follow(folder: Path) -> Iterator[str]:
    """Lines to print, one a logged step, until run.json says that the run has ended.

    Of a file that is there already, only the end is shown (`FOLLOWED_BYTES`). An incomplete last line of metrics.jsonl
    is read when it is complete, and a damaged line is reported. If the file is rewritten (the run was resumed, and
    rewound to its checkpoint), it is followed from its end, too.
    """
    at, number, inode, last, heard, quiet = 0, 0, 0, (-1, False), time.monotonic(), False
    while True:
        state = status(folder)  # before the reading: what comes last is read too
        with (
            contextlib.suppress(OSError, ValueError),
            open_file(folder / METRICS) as file,
        ):  # not there yet, or a share's hiccup
            facts = os.fstat(file.fileno())
            if rewound := at > 0 and (facts.st_size < at or facts.st_ino != inode):
                at, number = 0, 0
                yield "  the run was resumed from a checkpoint"
            if at == 0:
                inode = facts.st_ino
                at, number = _find_end(file, facts.st_size)
                if number and not rewound:
                    yield f"  earlier lines of {METRICS} are left out: {number:,}"
            file.seek(at)
            for line in read_lines(file):
                if not line.endswith(b"\n"):
                    break
                at, number = file.tell(), number + 1
                if not (row := parse_row(line)):
                    yield f"  {METRICS} line {number} is damaged: left out"
                elif (place := (row["step"], "eval_loss" in row)) > last:
                    yield format_step(row)
                    last, heard, quiet = place, time.monotonic(), False
        if state not in ("running", "unreadable"):
            yield f"the run is {state}{FOLLOW_ON.get(state, '')}{_early_stop(folder)}"
            return
        with contextlib.suppress(OSError):  # a share's hiccup
            if not folder.exists():
                yield f"{folder} was removed"
                return
        if not quiet and time.monotonic() - heard > QUIET:
            yield f"  nothing for {QUIET // 60} minutes: the run may have been killed before it could say so"
            quiet = True
        time.sleep(POLL)


def _early_stop(folder: Path) -> str:
    with contextlib.suppress(ValueError):
        if stopped := read_manifest(folder).get("stopped_early"):
            return f": it {stop_reason(stopped)}"
    return ""


def _find_end(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the lines begin that are in a file's last `FOLLOWED_BYTES`, and how many are before them."""
    at = number = 0
    while at < size - FOLLOWED_BYTES and (block := file.readline(FOLLOWED_BYTES)):
        at, number = at + len(block), number + block.endswith(b"\n")
    return at, number


def format_step(row: dict[str, Any]) -> str:
    """One logged step, as the run itself shows it."""
    parts = [f"  step {row['step']:>5} "]
    for key, form in (("eval_loss", "held-out loss {:.4f}"), ("loss", "loss {:.4f}"), ("learning_rate", "lr {:.2g}"),
                      ("tokens_per_second", "{:,.0f} tok/s")):  # fmt: skip
        if isinstance(row.get(key), int | float):
            parts.append(form.format(row[key]))
    return "  ".join(parts)
