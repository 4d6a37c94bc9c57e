"""mini_project_report.md, the workshop's last exercise, filled in from a run and its comparison with the base."""

from __future__ import annotations

from typing import Any

from stepladder.reporting.page import duration, judge, share
from stepladder.reporting.runs import LoggedRun
from stepladder.verdict import FAULT, GOOD, LOOK, Verdict

EXAMPLES = 3
USUAL = 0.5  # the share of answers below which a style rule is not kept
MISSING = "unknown: run.json does not say"
NOT_COMPARED = "Not compared yet: `python scripts/compare.py --base {base} --tuned {folder} --data HELD_OUT.jsonl`."


def markdown(run: LoggedRun, domain: str) -> str:
    """What the exercise asks for, in its order; what the folder does not hold is said to be missing."""
    found = judge(run)
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
    head = ["figure", *(side["name"] for side in c["sides"]), "winner"]
    lines = [_row(head), "|---" * len(head) + "|"]
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
    return NOT_COMPARED.format(base=base, folder=run.folder)


def _readiness(run: LoggedRun, found: list[Verdict]) -> list[str]:
    """No with a fault, not shown without a comparison; a yes never goes without a person reading answers."""
    faults, looks = ([v for v in found if v.severity == severity] for severity in (FAULT, LOOK))
    better = any(v.severity == GOOD and v.name.startswith("better") for v in found)
    weak = [f"{name} in {kept:.0%} of the answers" for name, kept in _style(run) if kept < USUAL]
    if faults:
        lines = ["Would I deploy this? **No**: " + ", ".join(v.name for v in faults) + "."]
    elif not better:
        lines = ["Would I deploy this? **Not yet**: nothing shows that it is better than its base."]
    else:
        lines = [
            "Would I deploy this? **To a trial with people reading along**: better than its base, and no fault found."
        ]
    lines += ["", "What would I improve?", ""]
    wishes = [f"- {v.name}: {v.way_out}" for v in faults + looks if v.way_out]
    wishes += [f"- {rule}: more rows that show it; facts had better come from a lookup" for rule in weak]
    return lines + (wishes or ["- nothing that these figures show; read more answers than three"])


def _style(run: LoggedRun) -> list[tuple[str, float]]:
    """The rules of the rubric, and the share of the first tuned side's answers that keep each."""
    rows = [row for row in run.comparison.get("metrics", []) if row["unit"] == "share of answers"]
    tuned = [(row["name"], side["mean"]) for row in rows for side in row["sides"][1:2] if side]
    return [(name, mean) for name, mean in tuned if mean is not None]
