"""Which method and which strategy for a model on some GPUs, by the plan; writes the tables of docs/which_method.md.

    python benchmarks/which_method.py --page docs/which_method.md

For a recipe of `recipes/models` the plan (docs/planning.md) chooses the fastest strategy, micro-batch and
checkpointing that fit. No GPU and no weights are needed; about 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from stepladder import console, hardware
from stepladder.errors import LaunchError
from stepladder.planning import choose
from stepladder.recipe import load

MODELS = ("qwen3-0.6b", "smollm2-1.7b", "llama-3.1-8b", "llama-3.1-70b")
METHODS = ("full", "lora", "qlora")
BEGIN, END = "<!-- which-method -->\n", "<!-- /which-method -->"


@dataclass(frozen=True)
class Machine:
    """`nodes` nodes with `gpus` GPUs each, by the short name of the GPU, and `host` GiB of memory."""

    gpu: str
    gpus: int
    host: int
    nodes: int = 1

    @property
    def title(self) -> str:
        of = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{of}{self.gpus} × {hardware.device(self.gpu, None).name}, {self.host} GiB"


MACHINES = (
    Machine("4090", 1, 64),
    Machine("h100", 1, 256),
    Machine("a100-40", 4, 512),
    Machine("h100", 8, 2048),
    Machine("h100", 8, 2048, nodes=4),
)


@dataclass(frozen=True)
class Choice:
    """What the plan chooses for a recipe on a machine: a cell of the table, and the command where it fits."""

    cell: str
    command: str = ""


def choose_for(model: str, method: str, machine: Machine) -> Choice:
    name = f"models/{model}/{method}"
    if not Path(f"recipes/{name}.yaml").is_file():
        return Choice("no recipe")
    ranks = machine.gpus * machine.nodes
    recipe = load.load(name, [])
    keys = [] if (recipe.get("global_batch_size") or ranks) % ranks == 0 else ["--global_batch_size", str(ranks)]
    recipe = load.load(name, keys) if keys else recipe
    host = machine.host * choose.GIB
    plan = choose.Plan(recipe, machine.nodes, machine.gpus, hardware.device(machine.gpu, None), host=host)
    candidates = plan.candidates()
    if best := plan.best(candidates):
        checkpointing = ", ckpt" if best.checkpointing else ""
        cell = f"{best.strategy}, {best.micro}{checkpointing}: {best.memory.total / choose.GIB:.0f} GiB"
        return Choice(cell, choose.command(name, keys, plan, best)[0])
    if loaded := [one.memory.host for one in candidates if one.memory.total <= one.limit]:
        return Choice(f"✘ {min(loaded) / choose.GIB:,.0f} GiB of host memory")
    return Choice(f"✘ {min(one.memory.total for one in candidates) / choose.GIB:.0f} GiB")


def render() -> str:
    titles = [machine.title for machine in MACHINES]
    lines = [f"| model | method | {' | '.join(titles)} |", f"| --- | --- |{' --- |' * len(titles)}"]
    details = []
    for model in MODELS:
        typed = []
        for method in METHODS:
            try:
                chosen = [choose_for(model, method, machine) for machine in MACHINES]
            except LaunchError as error:
                raise SystemExit(f"{model} {method}: {error}") from None
            print(model, method, [one.cell for one in chosen], flush=True)
            if all(one.cell == "no recipe" for one in chosen):
                continue
            lines.append(f"| {model} | {method} | {' | '.join(one.cell for one in chosen)} |")
            typed += [(title, method, one.command) for title, one in zip(titles, chosen, strict=True) if one.command]
        commands = "\n".join(f"# {title}, {method}\n{command}" for title, method, command in typed)
        details.append(
            f"<details markdown><summary>{model}: what to type</summary>\n\n```sh\n{commands}\n```\n\n</details>\n"
        )
    return "\n".join(lines) + "\n\n" + "\n".join(details)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="the page whose tables are replaced")
    args = parser.parse_args()
    console.quiet_libraries()
    text = render()
    if args.page is None:
        print(text)
        return
    page = args.page.read_text(encoding="utf-8")
    found = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", page, re.DOTALL)
    if found is None:
        raise SystemExit(f"{args.page} has no {BEGIN.strip()}")
    args.page.write_text(page.replace(found[0], f"{BEGIN}\n{text}\n{END}"), encoding="utf-8")


if __name__ == "__main__":
    main()
