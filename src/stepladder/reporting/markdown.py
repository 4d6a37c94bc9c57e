"""A comparison and a run as text to read and paste: evaluation_results.md, mini_project_report.md, the terminal."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepladder import installation
from stepladder.console import quote_for_shell
from stepladder.errors import BETTER, FAULT, GOOD, LEVEL, LOOK, WORSE, Verdict
from stepladder.model import card
from stepladder.reporting.page import duration, format_share, judge_run
from stepladder.reporting.runs import LoggedRun

EXAMPLES = 3  # questions whose answers are shown
MARK = {GOOD: "✅", LOOK: "⚠️", FAULT: "❌"}
USUAL = 0.5  # the share of answers below which a style rule is not kept
# Verdicts that are no fault, and with which nothing is recommended: they leave open whether it has learned anything.
DOUBTS = ("too short", "not evaluated", "gap", "forgot a little", "requirement not judged", "not held out",
          "foreign evaluation")  # fmt: skip
MISSING = "unknown: run.json does not say"
NOT_COMPARED = "Not compared yet: `{compare} --base {base} --tuned {folder}{data}`."


def evaluation_results(facts: dict[str, Any]) -> str:
    """The content of compare.json for a person to read and to paste."""
    sides, names = facts["sides"], [_cell(side["name"]) for side in facts["sides"]]
    lines = ["# Fine-tuning evaluation results", "", f"Command: {card.format_code(facts['command'])}", ""]
    lines += [f"{len(facts['questions'])} questions, {_rows(facts)}; {facts['made']}.", ""]
    rows = [["Criteria", f"Base: {sides[0]['name']}", *(side["name"] for side in sides[1:]), "Winner"]]
    for row in facts["metrics"]:
        cells = [_value(row, side, test) for side, test in zip(row["sides"], row["tests"], strict=True)]
        rows.append([f"{row['name']} ({_unit(row)})", *cells, row["winner"]])
    lines += [f"## Comparison{_on(facts)}", "", *_table(rows)]
    lines += ["", "In brackets the 95 % interval (bootstrap over the rows; distinct-n: jackknife over the answers). "
              "A winner is named where the paired test says that so large a difference comes by chance less than "
              f"once in {1 / LEVEL:.0f} times (permutation test, corrected for the number of "
              "rows of this table by Holm's method; behaviours among themselves, and a drop within the noise of the "
              "base's own repetitions is none). "
              "▲ better than the base, ▼ worse."]  # fmt: skip
    lines += [f"\nNote: {note}" for note in facts["notes"]]
    for found in facts["verdicts"]:
        lines += ["", f"## Verdicts on {found['side']}", ""]
        for verdict in found["verdicts"]:
            help = f" What to do: {verdict['help']}." if verdict["help"] else ""
            mark, name = MARK[verdict["severity"]], verdict["name"]
            lines.append(f"- {mark} **{name}**: {verdict['what']} {verdict['evidence']}.{help}")
    if required := facts.get("required"):
        lines += ["", "## Required", ""]
        lines += [f"- {'✔' if one['met'] else '✘'} **{_cell(one['claim'])}** of {one['side']}: {one['evidence']}"
                  for one in required]  # fmt: skip
    lines += ["", "## Sample outputs", ""]
    for number, question in enumerate(facts["questions"][:EXAMPLES]):
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
            losses = (base["loss"], side["loss"])
            before, after = ("no number" if loss is None else f"{loss:.3f}" for loss in losses)
            who = f" by {side['name']}" if len(others) > 1 else ""
            label = "loss on training rows" if facts.get("on_training_rows") else "held-out loss"
            print(f"{label}{who} ({base['tokens']:,} answer tokens): {before} before, {after} after", file=out)
    for line in conclusion(facts):
        print(line, file=out)
    for found in facts["verdicts"]:
        for verdict in found["verdicts"]:
            whose = f"{found['side']}: " if len(others) > 1 else ""
            print(f"{MARK[verdict['severity']]} {whose}{verdict['name']}: {verdict['evidence']}", file=out)
    for note in facts["notes"]:
        print(f"note: {note}", file=out)
    return out.getvalue().rstrip("\n")


def run_size(manifest: dict[str, Any]) -> str:
    """A run's size and length, from its run.json, as far as it is whole."""
    lines = []
    with contextlib.suppress(KeyError, TypeError, ValueError):
        counts = manifest["parameters"]
        lines.append(f"parameters: {counts['trainable']:,} trainable of {counts['all']:,}")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        totals = manifest["totals"]
        lines.append(f"training: {totals['steps']} steps, {totals['tokens']:,} tokens, {totals['seconds']:.0f} s")
    return "\n".join(lines)


def conclusion(facts: dict[str, Any]) -> list[str]:
    """A sentence a tuned side: what improved, what got worse."""
    lines = []
    for number, side in enumerate(facts["sides"][1:], start=1):
        changes: dict[str, list[str]] = {BETTER: [], WORSE: []}
        for row in facts["metrics"]:
            if (test := row["tests"][number]) and test["verdict"] in changes:
                before, after = (_number(row, row["sides"][n]["mean"]) for n in (0, number))
                changes[test["verdict"]].append(f"{row['name']} ({before} → {after})")
        better, worse = ("; ".join(changes[key]) or "nothing beyond chance" for key in (BETTER, WORSE))
        lines.append(f"{side['name']} improved{_on(facts)}: {better}. Worse: {worse}.")
    return lines


def _on(facts: dict[str, Any]) -> str:
    return " on training rows" if facts.get("on_training_rows") else ""


def _rows(facts: dict[str, Any]) -> str:
    if facts.get("on_training_rows"):
        return f"no held-out row: all {facts['training_rows']} rows were trained on"
    left_out = facts.get("left_out_rows")
    return f"{facts['held_out_rows']} held-out rows" + (f", {left_out} trained rows left out" if left_out else "")


def _value(row: dict[str, Any], side: dict[str, Any] | None, test: dict[str, Any] | None) -> str:
    if side is None:
        return "not measured"
    mark = {BETTER: " ▲", WORSE: " ▼"}.get(test["verdict"], "") if test else ""
    spread = f" [{_number(row, side['low'])}, {_number(row, side['high'])}]" if side.get("low") is not None else ""
    return _number(row, side["mean"]) + spread + mark


def _unit(row: dict[str, Any]) -> str:
    required = f", at least {100 * row['required']:g}%" if row.get("required") else ""
    return row["unit"] + required + (f", noise {row['noise']:.0%}" if "noise" in row else "")


def _number(row: dict[str, Any], value: float | None) -> str:
    if value is None:
        return "no number"
    return f"{value:.0%}" if row["unit"].startswith("share") else f"{value:.3f}" if value < 10 else f"{value:,.1f}"


def _table(rows: list[list[str]]) -> list[str]:
    """A Markdown table; the first row is its head."""
    head, *rest = ["| " + " | ".join(map(_cell, cells)) + " |" for cells in rows]
    return [head, "|---" * len(rows[0]) + "|", *rest]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in (text or "(nothing)").splitlines())


def mini_project_report(run: LoggedRun, domain: str) -> str:
    """The sections of the exercise, in its order; what the folder lacks is marked as missing."""
    found = _verdicts(run)
    sections = {
        f"Domain: {domain}": [],
        "Dataset": _dataset(run),
        "Training configuration": _configuration(run),
        "Results": _examples(run),
        "Evaluation": _evaluation(run),
        "Learnings": [f"{i}. {v.what} {v.evidence}." for i, v in enumerate(found, 1)],
        "Production readiness": _readiness(run, found),
    }
    parts = [f"## {title}\n\n" + "\n".join(lines) if lines else f"## {title}" for title, lines in sections.items()]
    return "\n\n".join(["# Fine-tuning mini-project report", *parts]) + "\n"


def _dataset(run: LoggedRun) -> list[str]:
    sets = [one for one in run.facts.get("datasets") or [] if isinstance(one, dict)]
    lines = [
        f"- {kind}: {one.get('rows')} examples of {one.get('name')} ({one.get('skipped', 0)} skipped)"
        for kind, one in zip(("Trained on", "Held out"), sets, strict=False)
    ]
    for finding in run.audit.get("findings") or []:
        if finding.get("severity") == "figure":  # lengths and languages are no fault; the page shows them
            continue
        lines.append(f"- {finding.get('severity')}: {finding.get('what')}")
    return lines or [MISSING]


def _configuration(run: LoggedRun) -> list[str]:
    facts, recipe = run.facts, run.facts.get("recipe") or {}
    counts, totals = facts.get("parameters") or {}, facts.get("totals") or {}
    source = facts.get("starts_from") or {}
    rows: dict[str, Any] = {"Base model": source.get("base") or recipe.get("model_name_or_path")}
    rows["Starts from"] = source.get("adapter")
    if recipe.get("use_peft") and recipe.get("peft_type", "lora") == "lora":
        rows["LoRA rank"] = recipe.get("lora_r")
    rows |= {
        "Learning rate": recipe.get("learning_rate"),
        "Epochs": None if (recipe.get("max_steps") or -1) > 0 else recipe.get("num_train_epochs"),
        "Global batch": facts.get("global_batch_size"),
        "Steps": totals.get("steps"),
        "Trained parameters": counts and f"{counts.get('trainable', 0):,} of {counts.get('all', 0):,}",
        "Training time": totals.get("seconds") and duration(totals["seconds"]),
        "Where": facts.get("strategy") and f"{facts['strategy']} × {facts.get('world_size')}, {facts.get('precision')}",
    }
    return [f"- {name}: {value}" for name, value in rows.items() if value] or [MISSING]


def _examples(run: LoggedRun) -> list[str]:
    c, lines = run.comparison, []
    for number, question in enumerate(c.get("questions", [])[:EXAMPLES]):
        lines += [f"**{' '.join(question.split())}**", ""]
        for side in c["sides"]:
            lines += [f"{side['name']}:", "", _quoted(side["answers"][number]), ""]
    return lines[:-1] or [_not_compared(run)]


def _evaluation(run: LoggedRun) -> list[str]:
    c = run.comparison
    if not c.get("metrics"):
        return [_not_compared(run)]
    note = ["Each of these rows was trained on: none was held out.", ""] if c.get("on_training_rows") else []
    head = ["figure", *(side["name"] for side in c["sides"]), "winner"]
    rows = []
    for row in c["metrics"]:
        values = [format_share(side["mean"], row["unit"]) if side else "not measured" for side in row["sides"]]
        rows.append([row["name"], *values, row["winner"]])
    return [*note, *_table([head, *rows])]


def _not_compared(run: LoggedRun) -> str:
    base = (run.facts.get("recipe") or {}).get("model_name_or_path", "BASE")
    data = "" if (run.facts.get("held_out") or {}).get("rows") else " --data HELD_OUT.jsonl"
    return NOT_COMPARED.format(
        compare=installation.command("compare"),
        base=quote_for_shell(base),
        folder=quote_for_shell(run.folder),
        data=data,
    )


def _readiness(run: LoggedRun, found: list[Verdict]) -> list[str]:
    """No with a fault, not yet with a doubt or without a comparison; a yes never goes without a person reading answers.

    What lowers the recommendation is named in it.
    """
    faults, looks = ([v for v in found if v.severity == severity] for severity in (FAULT, LOOK))
    doubts = [v for v in looks if v.name in DOUBTS] + _facts_not_judged(run)
    better = any(v.severity == GOOD and v.name.startswith("better") for v in found)
    reasons = [f"{v.name} ({v.evidence})" for v in faults + doubts]
    weak = [f"{name} in {kept:.0%} of the answers" for name, kept in _style(run) if kept < USUAL]
    if not better:
        reasons.insert(len(faults), "nothing shows that it is better than its base")
    if faults:
        lines = ["Would I deploy this? **No**: " + "; ".join(reasons) + "."]
    elif reasons:
        lines = [
            f"Would I deploy this? **Not yet**: {'better than its base, but ' * better}" + "; ".join(reasons) + "."
        ]
    else:
        lines = [
            "Would I deploy this? **To a trial with people reading along**: better than its base, and no fault found."
        ]
    lines += ["", "What would I improve?", ""]
    wishes = [f"- {v.name}: {v.help}" for v in [*faults, *looks, *_facts_not_judged(run)] if v.help]
    wishes += [f"- {rule}: more rows that show it; facts had better come from a lookup" for rule in weak]
    return lines + (wishes or ["- nothing that these figures show; read more answers than three"])


def _facts_not_judged(run: LoggedRun) -> list[Verdict]:
    """The doubt that nothing looked whether the answers are true, where a comparison has no rule for it."""
    rows = [row for row in run.comparison.get("metrics", []) if row.get("facts")]
    if not run.comparison or any(row["sides"][_side(run)] for row in rows):
        return []
    help = "--rubric with a rule that has facts: true, as data/techco_rubric.yaml; read the answers"
    what, evidence = "Nothing looks whether the answers are true.", "no rule of a rubric looks whether answers are true"
    return [Verdict(LOOK, "facts not judged", what, evidence, help)]


def _style(run: LoggedRun) -> list[tuple[str, float]]:
    """The rules of the rubric without a required share, and the share of this run's answers that keep each."""
    rows = [row for row in run.comparison.get("metrics", []) if row["unit"] == "share of answers"]
    number = _side(run)
    known = [(row["name"], row["sides"][number]) for row in rows if not row.get("required")]
    return [(name, side["mean"]) for name, side in known if side and side["mean"] is not None]


def _side(run: LoggedRun) -> int:
    """Which side of the comparison the run is: the one of its folder, or the first that was tuned."""
    sides = run.comparison.get("sides", [])
    here = [n for n, side in enumerate(sides) if n and Path(str(side["name"])).resolve() == run.folder.resolve()]
    return here[0] if here else min(1, len(sides) - 1)


def _verdicts(run: LoggedRun) -> list[Verdict]:
    """On the run's curves and answers; those on other sides of its comparison say nothing of it."""
    if not run.comparison:
        return judge_run(run)
    name = run.comparison["sides"][_side(run)]["name"]
    own = [side for side in run.comparison["verdicts"] if side.get("side") == name]
    return judge_run(replace(run, comparison={**run.comparison, "verdicts": own}))
