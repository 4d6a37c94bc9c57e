"""evaluation_results.md: a comparison as the workshop's table, filled in, with sample answers and a conclusion."""

from __future__ import annotations

import contextlib
from typing import Any

from stepladder.evaluation.compare import BETTER, WORSE
from stepladder.evaluation.metrics import LEVEL

SAMPLES = 3
MARK = {"good": "✅", "look": "⚠️", "fault": "❌"}


def markdown(facts: dict[str, Any]) -> str:
    """The content of compare.json for a person to read and to paste."""
    sides, names = facts["sides"], [_cell(side["name"]) for side in facts["sides"]]
    lines = ["# Fine-tuning evaluation results", "", f"Command: `{facts['command']}`", ""]
    lines += [f"{len(facts['questions'])} questions, {_rows(facts)}; {facts['made']}.", ""]
    lines += [f"## Comparison{_on(facts)}", "", "| Criteria | Base: " + " | ".join(names) + " | Winner |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    for row in facts["metrics"]:
        cells = [_value(row, side, test) for side, test in zip(row["sides"], row["tests"], strict=True)]
        lines.append(f"| {_cell(row['name'])} ({_unit(row)}) | " + " | ".join(cells) + f" | {_cell(row['winner'])} |")
    lines += ["", "In brackets the 95 % interval (bootstrap over the rows; distinct-n: jackknife over the answers). "
              "A winner is named where the paired test says that so large a difference comes by chance less than "
              f"once in {1 / LEVEL:.0f} times (permutation test, corrected for the number of "
              "rows of this table by Holm's method; behaviours among themselves, and a drop within the noise of the "
              "base's own repetitions is none). "
              "▲ better than the base, ▼ worse."]  # fmt: skip
    lines += [f"\nNote: {note}" for note in facts["notes"]]
    for found in facts["verdicts"]:
        lines += ["", f"## Verdicts on {found['side']}", ""]
        lines += [verdict_line(verdict) for verdict in found["verdicts"]]
    if required := facts.get("required"):
        lines += ["", "## Required", ""]
        lines += [f"- {'✔' if one['met'] else '✘'} **{_cell(one['claim'])}** of {one['side']}: {one['evidence']}"
                  for one in required]  # fmt: skip
    lines += ["", "## Sample outputs", ""]
    for number, question in enumerate(facts["questions"][:SAMPLES]):
        lines += ["**Prompt**:", "", _quoted(question), ""]
        for name, side in zip(names, sides, strict=True):
            lines += [f"**{name}**:", "", _quoted(side["answers"][number]), ""]
    return "\n".join([*lines, "## Conclusion", "", *conclusion(facts), ""])


def for_terminal(facts: dict[str, Any], show: int, widest: int = 100) -> str:
    """The first answers in columns, the losses, the verdicts and what differs.

    Args:
        widest: columns of the table, where the terminal has as many.
    """
    import io

    from rich.table import Table

    from stepladder.screen import Screen

    sides = facts["sides"]
    width = min(Screen(plain=widest).width, widest)
    table = Table(show_lines=True, width=width, title_justify="left")
    for side in sides:
        table.add_column(side["name"], ratio=1, overflow="fold")
    for number, question in enumerate(facts["questions"][:show]):
        table.add_row(*[f"Q: {question}" if i == 0 else "" for i in range(len(sides))], style="bold")
        table.add_row(*[side["answers"][number] for side in sides])
    out = io.StringIO()
    if table.row_count:
        Screen(file=out, width=width, color_system=None).print(table)
        print(file=out)
    base, *others = sides
    for side in others:
        if "loss" in base and "loss" in side:
            tokens, before, after = base["tokens"], base["loss"], side["loss"]
            who = f" by {side['name']}" if len(others) > 1 else ""
            told = f"{_nats(before)} before, {_nats(after)} after"
            label = "loss on training rows" if facts.get("on_training_rows") else "held-out loss"
            print(f"{label}{who} ({tokens:,} answer tokens): {told}", file=out)
    for line in conclusion(facts):
        print(line, file=out)
    for found in facts["verdicts"]:
        for verdict in found["verdicts"]:
            whose = f"{found['side']}: " if len(others) > 1 else ""
            print(f"{MARK[verdict['severity']]} {whose}{verdict['name']}: {verdict['evidence']}", file=out)
    for note in facts["notes"]:
        print(f"note: {note}", file=out)
    return out.getvalue().rstrip("\n")


def of_run(manifest: dict[str, Any]) -> str:
    """A run's size and length, from its run.json, as far as it is whole."""
    lines = []
    with contextlib.suppress(KeyError, TypeError, ValueError):
        counts = manifest["parameters"]
        lines.append(f"parameters: {counts['trainable']:,} trainable of {counts['all']:,}")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        totals = manifest["totals"]
        lines.append(f"training: {totals['steps']} steps, {totals['tokens']:,} tokens, {totals['seconds']:.0f} s")
    return "\n".join(lines)


def verdict_line(verdict: dict[str, Any]) -> str:
    help = f" What to do: {verdict['help']}." if verdict["help"] else ""
    return f"- {MARK[verdict['severity']]} **{verdict['name']}**: {verdict['what']} {verdict['evidence']}.{help}"


def conclusion(facts: dict[str, Any]) -> list[str]:
    """A sentence a tuned side: what improved, what got worse."""
    lines = []
    for number, side in enumerate(facts["sides"][1:], start=1):
        told: dict[str, list[str]] = {BETTER: [], WORSE: []}
        for row in facts["metrics"]:
            if (test := row["tests"][number]) and test["verdict"] in told:
                told[test["verdict"]].append(f"{row['name']} ({_moved(row, number)})")
        better, worse = ("; ".join(told[key]) or "nothing beyond chance" for key in (BETTER, WORSE))
        lines.append(f"{side['name']} improved{_on(facts)}: {better}. Worse: {worse}.")
    return lines


def _on(facts: dict[str, Any]) -> str:
    return " on training rows" if facts.get("on_training_rows") else ""


def _rows(facts: dict[str, Any]) -> str:
    if facts.get("on_training_rows"):
        return f"no held-out row: all {facts['training_rows']} rows were trained on"
    left_out = facts.get("left_out_rows")
    return f"{facts['held_out_rows']} held-out rows" + (f", {left_out} trained rows left out" if left_out else "")


def _moved(row: dict[str, Any], number: int) -> str:
    before, after = row["sides"][0], row["sides"][number]
    return f"{_number(row, before['mean'])} → {_number(row, after['mean'])}"


def _value(row: dict[str, Any], side: dict[str, Any] | None, test: dict[str, Any] | None) -> str:
    if side is None:
        return "not measured"
    mark = {BETTER: " ▲", WORSE: " ▼"}.get(test["verdict"], "") if test else ""
    spread = f" [{_number(row, side['low'])}, {_number(row, side['high'])}]" if side.get("low") is not None else ""
    return _number(row, side["mean"]) + spread + mark


def _unit(row: dict[str, Any]) -> str:
    required = f", at least {100 * row['required']:g}%" if row.get("required") else ""
    return row["unit"] + required + (f", noise {row['noise']:.0%}" if "noise" in row else "")


def _nats(value: float | None) -> str:
    return "no number" if value is None else f"{value:.3f}"


def _number(row: dict[str, Any], value: float | None) -> str:
    if value is None:
        return "no number"
    return f"{value:.0%}" if row["unit"].startswith("share") else f"{value:.3f}" if value < 10 else f"{value:,.1f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in (text or "(nothing)").splitlines())
