"""mini_project_report.md, the workshop's last exercise, filled in from a run and its comparison with the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from stepladder.console import quoted
from stepladder.errors import FAULT, GOOD, LOOK, Verdict
from stepladder.reporting.page import duration, judge, share
from stepladder.reporting.runs import LoggedRun

EXAMPLES = 3
USUAL = 0.5  # the share of answers below which a style rule is not kept
# Verdicts that are no fault, and with which nothing is recommended: they leave open whether it has learned anything.
DOUBTS = ("too short", "not evaluated", "gap", "forgot a little", "requirement not judged", "not held out",
          "foreign evaluation")  # fmt: skip
MISSING = "unknown: run.json does not say"
NOT_COMPARED = "Not compared yet: `python scripts/compare.py --base {base} --tuned {folder}{data}`."


def markdown(run: LoggedRun, domain: str) -> str:
    """What the exercise asks for, in its order; what the folder does not hold is said to be missing."""
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
    lines = [*note, _row(head), "|---" * len(head) + "|"]
    for row in c["metrics"]:
        values = [share(side["mean"], row["unit"]) if side else "not measured" for side in row["sides"]]
        lines.append(_row([row["name"], *values, row["winner"]]))
    return lines


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in (text or "(nothing)").splitlines())


def _not_compared(run: LoggedRun) -> str:
    base = (run.facts.get("recipe") or {}).get("model_name_or_path", "BASE")
    data = "" if (run.facts.get("held_out") or {}).get("rows") else " --data HELD_OUT.jsonl"
    return NOT_COMPARED.format(base=quoted(base), folder=quoted(run.folder), data=data)


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
        return judge(run)
    name = run.comparison["sides"][_side(run)]["name"]
    own = [side for side in run.comparison["verdicts"] if side.get("side") == name]
    return judge(replace(run, comparison={**run.comparison, "verdicts": own}))
