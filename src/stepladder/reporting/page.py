"""What a run folder holds for a person: one self-contained page on one or several runs, and its data's audit.

The page loads nothing: style, script and curves lie in the file, and its Content-Security-Policy
forbids the network and every script but its own. Text of models, data and recipes is escaped by
the template engine, curves by `_embedded`.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import functools
import hashlib
import html
import json
import math
import random
import re
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from stepladder import installation
from stepladder.console import quote_for_shell
from stepladder.data import audit
from stepladder.data.row_checks import FIGURE, Finding, Limits, check_texts
from stepladder.data.rows import Rows
from stepladder.errors import FAULT, GOOD, LOOK, RunError, Verdict
from stepladder.files import write_atomic
from stepladder.manifest import MANIFEST, RECIPE
from stepladder.reporting import curves
from stepladder.reporting.runs import LoggedRun, read, read_all
from stepladder.reporting.series import Curve, Numbers, summarize

# title, what is drawn as a line, what as points, unit, whether a logarithmic scale makes sense
CHARTS = (
    ("Loss", "loss", "eval_loss", "nats per token", True),
    ("Gradient norm", "grad_norm", "", "before clipping", True),
    ("Learning rate", "learning_rate", "", "", False),
    ("Throughput", "tokens_per_second", "", "tokens a second, all ranks", False),
    ("Peak memory", "peak_memory_gib", "", "GiB, the fullest rank", False),
)
TABLE_ROWS, MOST_ROWS = 20, 100  # of the table behind a curve: of each run, and in all with its evaluations
# Logged steps of all runs on a page together that are drawn as they are, and the fewest of one run: of a longer one
# stretches are drawn, which take three times the room each. With them the page stays below a megabyte.
MOST_STEPS, LEAST_STEPS = 6000, 600
ENVIRONMENT = ("strategy", "world_size", "devices", "precision", "global_batch_size", "micro_batch_size",
               "gradient_accumulation_steps", "seed", "recipe_hash", "git_commit", "started", "ended")  # fmt: skip
AUDITED_ROWS = 10_000  # rows that are looked at: seconds; check.py --audit looks at all of them
ANY_LENGTH = Limits(0, 0)  # what was trained on is not called too short afterwards
AKIN = 0.5  # shared words of two answers (difflib's ratio) below which marking each difference says nothing
ALWAYS_DIFFER = {"output_dir", "started", "ended"}  # between any two runs, and of no effect


def write_page(folder: Path) -> None:
    """Write report.html and loss.png into a run folder, from what lies there."""
    run = read(folder)
    save(folder / "report.html", render_page([run]))
    curves.draw_loss(folder / "loss.png", run.curve("loss"), run.curve("eval_loss"), curves.step_marks(run.facts))


def write_audit(folder: Path, train: Any, evaluation: Any) -> None:
    """Write audit.json: what the trained and evaluated rows are like as text, where they are in memory (no stream)."""
    if not isinstance(train, Rows):
        return
    held_out = _sample(evaluation) if isinstance(evaluation, Rows) else None
    findings = check_texts(_sample(train), ANY_LENGTH, held_out)
    if len(train) > AUDITED_ROWS:
        looked = {"rows looked at": AUDITED_ROWS, "of": len(train)}
        findings.insert(0, Finding(FIGURE, "sampled", "a sample drawn by chance", figures=looked))
    found = audit.as_json(audit.Audit(train.name, train, held_out, findings), [])
    write_atomic(folder / "audit.json", json.dumps(found, ensure_ascii=False) + "\n")


def _sample(rows: Rows) -> Rows:
    if len(rows) <= AUDITED_ROWS:
        return rows
    return rows.take(sorted(random.Random(42).sample(range(len(rows)), AUDITED_ROWS)))


def save(path: Path, text: str) -> None:
    """Write the page whole or not at all.

    Raises:
        RunError: the place cannot be written.
    """
    try:
        write_atomic(path, text)
    except (OSError, ValueError) as error:  # a ValueError where the path has no name: -o "$UNSET"
        why = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{path} cannot be written", why=why, help="another -o") from None


def render_comparison(folder: Path, tuned: list[Path], comparison: dict[str, Any]) -> str:
    """The page of compare.py: of the runs that it compared, where they are runs, and what it found."""
    found = read_all([side for side in dict.fromkeys(tuned) if (side / MANIFEST).is_file()])
    logged = found or [LoggedRun(folder, folder.resolve().name)]
    logged[0].comparison = comparison
    return render_page(logged)


def judge_run(run: LoggedRun) -> list[Verdict]:
    """What the run's curves say and what compare.py found; the worst come first."""
    held_out, evaluation = run.facts.get("held_out") or {}, run.curve("eval_loss")
    if held_out and held_out["rows"] == held_out["trained_on"]:
        evaluation = Curve()  # it says nothing that the training loss does not
    loss, norm = run.curve("loss"), run.curve("grad_norm")
    found = curves.judge_curves(loss, evaluation, norm, run.facts.get("result_step")) if _is_run(run) else []
    found += curves.judge_early_stop(stopped) if (stopped := run.facts.get("stopped_early")) else []
    found += curves.judge_evaluation_rows(**held_out) if held_out else []
    compared = run.comparison.get("verdicts", [])
    for side in compared:
        of = f"{side['side']}: " if len(compared) > 1 else ""
        found += [Verdict(**{**verdict, "what": of + verdict["what"]}) for verdict in side["verdicts"]]
    return sorted(found, key=lambda verdict: (FAULT, LOOK, GOOD).index(verdict.severity))


def render_page(
    runs: list[LoggedRun], differences: list[dict[str, Any]] | None = None, choice: Verdict | None = None
) -> str:
    """The whole page as HTML.

    Args:
        differences: of each later run's curves from the first's, in columns for a table.
        choice: which of several runs is the best.
    """
    parts = resources.files(__package__)
    script, style = ((parts / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    most = max(LEAST_STEPS, MOST_STEPS // len(runs))
    return _template().render(
        title=" · ".join(run.name for run in runs),
        runs=runs,
        summary=[(label, values, False) for label, values, _ in _side_by_side([_summary(run) for run in runs])],
        verdicts=[judge_run(run) for run in runs],
        choice=choice,
        charts=[chart for names in CHARTS if (chart := _chart(runs, *names))],
        differences=differences or [],
        figures=[(run, run.comparison["metrics"]) for run in runs if run.comparison.get("metrics")],
        answers=[(run, answers) for run in runs if (answers := _marked_answers(run))],
        recipe=_side_by_side([run.facts.get("recipe") or {} for run in runs]),
        environment=_side_by_side([_environment(run) for run in runs]),
        predicted=[(run, rows) for run in runs if (rows := _predicted(run))],
        commands=[command for run in runs for command in _commands(run)],
        made=time.strftime("%Y-%m-%d %H:%M"),
        command=installation.command("report"),
        script=script,
        style=style,
        hashes={"script": _hash(script), "style": _hash(style)},
        data=_data(runs),
        long=[(run.name, count, most // 3) for run in runs if (count := len(run.curve("loss"))) > most],
        embedded=_embedded([_drawn_curves(run, most) for run in runs]),
    )


@functools.cache
def _template() -> Any:
    import jinja2

    engine = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    engine.filters |= {"number": format_number, "value": format_value, "share": format_share}
    return engine.from_string((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))


def format_number(value: Any, digits: int = 4) -> str:
    """A figure with so many significant digits, and commas in large ones."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if float(value).is_integer() or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def format_share(value: float | None, unit: str) -> str:
    """A figure of a comparison: a share in per cent, anything else in four digits."""
    if value is None:
        return "no number"
    return f"{value:.0%}" if unit.startswith("share") else format_number(value)


def format_value(value: Any) -> str:
    """A value of a recipe or manifest as YAML's flow style would have it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(value: Any) -> str:
    """JSON for a script element: without `<` nothing in it can end the element."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _drawn_curves(run: LoggedRun, most: int) -> dict[str, Any]:
    """The columns of the logged steps and of the evaluations, in seven digits; null where there is no number.

    Of more than `most` steps each column holds the means of a third as many stretches, and `<metric>_low` and
    `<metric>_high` their lowest and highest values.
    """

    def columns(keys: list[str], needed: str) -> dict[str, list[float | None]]:
        steps = run.curve(needed).steps
        found: dict[str, list[float | None]] = {}
        for key in keys:
            curve = Curve(steps, run.curve(key).at(steps))
            stretches = summarize(curve, most if len(steps) <= most else most // 3)
            found |= {"step": stretches.steps.tolist(), key: _digits(stretches.means)}
            if len(steps) > most:
                found |= {f"{key}_low": _digits(stretches.lows), f"{key}_high": _digits(stretches.highs)}
        return found

    lines = [line for _, line, *_ in CHARTS]
    points, marks = columns(["eval_loss"], "eval_loss"), curves.step_marks(run.facts)
    return {"name": run.name, "line": columns(lines, "loss"), "points": points, "marks": marks}


def _digits(values: Numbers) -> list[float | None]:
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]


def _chart(runs: list[LoggedRun], title: str, line: str, points: str, unit: str, log: bool) -> dict[str, Any] | None:
    """A chart's names, its course in words, and the table behind it; None without a value to show."""
    columns = [(run.name, run.curve(line)) for run in runs]
    columns += [(f"{run.name}, held out", run.curve(points)) for run in runs if points]
    columns = [(name, curve) for name, curve in columns if len(curve.finite())]
    if not columns:
        return None
    kept = np.empty(0, np.int64)
    for name, curve in columns:  # evaluations are few: each keeps its row
        most = MOST_ROWS if name.endswith("held out") else TABLE_ROWS
        kept = np.union1d(kept, np.append(curve.steps[:: math.ceil(len(curve) / most)], curve.steps[-1]))
    kept = kept[:: math.ceil(len(kept) / MOST_ROWS)]
    cells = zip(*(_logged_values(curve, kept) for _, curve in columns), strict=True)
    return {
        "title": title, "line": line, "points": points, "unit": unit, "log": log,
        "words": [(name, _in_words(curve)) for name, curve in columns],
        "head": [name for name, _ in columns],
        "rows": list(zip(kept.tolist(), cells, strict=True)),
    }  # fmt: skip


def _logged_values(curve: Curve, steps: Numbers) -> list[float | None]:
    """The values at these steps; None where the curve has none."""
    there = np.isin(steps, curve.steps, assume_unique=True)
    return [value if is_there else None for value, is_there in zip(curve.at(steps).tolist(), there, strict=True)]


def _in_words(curve: Curve) -> str:
    good = curve.finite()
    low, high = good.values.argmin(), good.values.argmax()
    start, end, lowest, highest = (
        (format_number(float(good.values[place])), good.steps[place]) for place in (0, -1, low, high)
    )
    words = f"{start[0]} at step {start[1]}, {end[0]} at step {end[1]}"
    if len(good) > 2:
        words += f"; lowest {lowest[0]} at {lowest[1]}, highest {highest[0]} at {highest[1]}"
    return words + f"; {len(curve) - len(good)} values that are no number" * (len(good) < len(curve))


def _is_run(run: LoggedRun) -> bool:
    return bool(run.facts) or run.last_step is not None


def _marked_answers(run: LoggedRun) -> list[tuple[str, list[Any], str]]:
    """Each question with the sides' answers, their differences marked, and the reference."""
    c = run.comparison
    sides = zip(*(side["answers"] for side in c["sides"]), strict=True) if c else ()
    return [
        (question, _marked(texts), reference)
        for question, texts, reference in zip(c.get("questions", ()), sides, c.get("references", ()), strict=True)
    ]


def _marked(texts: tuple[str, ...]) -> list[Any]:
    """Each text with what sets it apart from the first (the first: from the second) marked, where the two are akin."""
    from markupsafe import Markup

    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in texts]
    found = []
    for i, mine in enumerate(words):
        other, tag = (words[min(1, len(words) - 1)], "del") if i == 0 else (words[0], "ins")
        match = difflib.SequenceMatcher(None, mine, other)
        changes = match.get_opcodes() if match.ratio() >= AKIN else [("equal", 0, len(mine), 0, 0)]
        out = ""
        for kind, a, b, _, _ in changes:
            text = html.escape("".join(mine[a:b]))
            out += text if kind == "equal" or not text.strip() else f"<{tag}>{text}</{tag}>"
        found.append(Markup(out))
    return found


def _summary(run: LoggedRun) -> dict[str, str]:
    """The figures that a person looks for first, as far as run.json has them; none of what is no run."""
    f = run.facts
    if not _is_run(run):
        return {}
    totals, counts = f.get("totals") or {}, f.get("parameters") or {}
    found: dict[str, str] = {"Status": str(f.get("status", "unknown"))}
    for label, key in (("Loss", "loss"), ("Held-out loss", "eval_loss")):
        if len(curve := run.curve(key).finite()):
            found[label] = f"{curve.values[0]:.4f} → {curve.values[-1]:.4f}"
    found["Steps"] = f"{run.last_step or 0:,}"
    if stopped := f.get("stopped_early"):
        found["Steps"] += f" of {stopped['of_steps']:,}, stopped early"
    for label, make in (
        ("Tokens", lambda: f"{totals['tokens']:,}"),
        ("Time in steps", lambda: duration(totals["seconds"])),
        ("Tokens a second", lambda: format_number(totals["tokens_per_second"])),
        ("Peak memory a rank", lambda: gib(max(totals["peak_memory_bytes"]))),
        ("Trainable parameters", lambda: f"{counts['trainable']:,} of {counts['all']:,}"),
        ("Trained share", lambda: f"{counts['trainable'] / counts['all']:.2%}"),
        ("Strategy", lambda: f"{f['strategy']} × {f['world_size']}, {f['precision']}"),
    ):
        with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            found[label] = make()
    return found


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _predicted(run: LoggedRun) -> list[tuple[str, str, str]]:
    """Peak memory and speed as the plan had them, beside the measured ones."""
    plan, totals = run.facts.get("plan") or {}, run.facts.get("totals") or {}
    rows = []
    for label, key, words in (
        ("peak memory a rank", "peak_memory_bytes", gib),
        ("tokens a second", "tokens_per_second", format_number),
    ):
        sides = [max(v, default=None) if isinstance(v, list) else v for v in (plan.get(key), totals.get(key))]
        if sides[0]:
            rows.append((label, *(words(side) if side else "not measured" for side in sides)))
    return rows  # type: ignore[return-value]


def _environment(run: LoggedRun) -> dict[str, Any]:
    facts = {key.replace("_", " "): run.facts[key] for key in ENVIRONMENT if run.facts.get(key) is not None}
    return facts | (run.facts.get("packages") or {})


def _data(runs: list[LoggedRun]) -> list[tuple[str, list[Any], list[Any]]]:
    """Data sets and audit findings, with the names of the runs that share them."""
    shared: dict[str, tuple[list[str], list[Any], list[Any]]] = {}
    for run in runs:
        sets, findings = run.facts.get("datasets") or [], run.audit.get("findings") or []
        names, *_ = shared.setdefault(json.dumps([sets, findings]), ([], sets, findings))
        names.append(run.name)
    return [(", ".join(names), sets, findings) for names, sets, findings in shared.values() if sets or findings]


def _side_by_side(sides: list[dict[str, Any]]) -> list[tuple[str, list[Any], bool]]:
    """Each key with every run's value, and whether they differ."""
    keys = list(dict.fromkeys(key for side in sides for key in side))
    rows = [(key, [side.get(key) for side in sides]) for key in keys]
    return [(key, row, key not in ALWAYS_DIFFER and any(v != row[0] for v in row)) for key, row in rows]


def _commands(run: LoggedRun) -> Iterator[str]:
    """What runs it again: its resolved recipe, under the same strategy and on as many ranks; and its comparison."""
    strategy, ranks = run.facts.get("strategy", "single"), run.facts.get("world_size", 1)
    again = f"--recipe {quote_for_shell(run.folder / RECIPE)} --output_dir runs/again"
    if strategy != "single":
        yield f"{installation.launch_command(strategy, ranks)} {again}"
    elif _is_run(run):
        yield f"{installation.command('sft')} {again}"
    if command := run.comparison.get("command"):
        yield str(command)
