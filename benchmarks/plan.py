"""Predicted against measured peak memory of real training steps, on CPU; writes docs/planning.md's table.

    python benchmarks/plan.py --folder /tmp/plan

Measured is what PyTorch itself counts: the bytes of all tensors that are alive at once, at most,
from the second step of scripts/sft.py on (tests/measure_memory.py), on the rank that holds most.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import same_curve  # noqa: E402
from tiny import SMOLLM2, make_tiny  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One combination."""

    model: str
    method: str
    strategy: str = "single"
    ranks: int = 1
    micro: int = 2
    length: int = 128
    checkpointing: bool = False
    precision: str = "fp32"
    steps_a_batch: int = 1  # micro-batches of an optimizer step
    optim: str = "adamw_torch_fused"

    @property
    def name(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))

    def recipe(self, folder: Path) -> dict[str, Any]:
        model = SMOLLM2 if self.model == "smollm2" else folder / self.model
        return same_curve.recipe_keys(self.method, model, folder / "rows.jsonl") | {
            "max_length": self.length,
            "max_steps": 3,
            "eval_strategy": "no",
            "eval_dataset_name": None,
            "per_device_train_batch_size": self.micro,
            "global_batch_size": self.micro * self.ranks * self.steps_a_batch,
            "gradient_checkpointing": self.checkpointing,
            "train_sampling_strategy": "sequential",
            "train_on": "everything",  # the worst case, which a plan is for
            "bf16": self.precision == "bf16",
            "optim": self.optim,
            # torch multiplies the experts' groups on a CPU in bf16 only, and autocast does not know them
            **({"dtype": "bfloat16"} if self.model == "moe" else {}),
        }


CASES = [
    Case("tiny", "full"),
    Case("tiny", "lora", micro=4, length=256),
    Case("tiny", "qlora", micro=4, length=256),
    Case("tiny", "full", micro=4, length=256, checkpointing=True),
    Case("tiny", "full", "ddp", 2),
    Case("tiny", "lora", "ddp", 4),
    Case("tiny", "full", "zero2", 2),
    Case("tiny", "full", "zero3", 2),
    Case("gpt2", "full"),
    Case("gpt2", "full", precision="bf16"),
    Case("gpt2", "lora", micro=4, length=64),
    Case("gpt2", "lora", checkpointing=True),
    Case("gpt2", "full", "ddp", 2),
    Case("gpt2", "full", "ddp", 3, micro=1),
    Case("gpt2", "full", "zero2", 2),
    Case("gpt2", "full", "zero3", 2, micro=4),
    Case("gpt2", "full", "zero3", 4, micro=1),
    Case("gpt2", "full", "zero2", 2, steps_a_batch=2),
    Case("gpt2", "full", "zero2", 4, micro=1, steps_a_batch=2),
    Case("gpt2", "full", "zero2", 2, precision="bf16"),
    Case("gpt2", "full", "zero2", 2, steps_a_batch=2, precision="bf16"),
    Case("gpt2", "full", "zero3", 2, precision="bf16"),
    Case("gpt2", "full", "zero3", 2, steps_a_batch=2, precision="bf16"),
    Case("smollm2", "full", "zero2", 2, micro=1, length=64, steps_a_batch=2),
    Case("smollm2", "full", "zero3", 2, micro=1, length=64),
    Case("smollm2", "full", "zero3", 2, micro=1, length=64, steps_a_batch=2),
    Case("smollm2", "full", micro=1, length=256),
    Case("smollm2", "full", micro=1, length=256, checkpointing=True),
    Case("smollm2", "full", micro=1, length=64, steps_a_batch=2),
    Case("smollm2", "full", micro=1, length=256, precision="bf16"),
    Case("smollm2", "lora", micro=2, length=256),
    Case("smollm2", "lora", micro=4, length=256, checkpointing=True),
    Case("smollm2", "lora", micro=2, length=256, precision="bf16"),
    Case("smollm2", "qlora", micro=1, length=256),
    Case("smollm2", "qlora", micro=2, length=256, checkpointing=True),
    Case("smollm2", "qlora", micro=2, length=128, precision="bf16"),
    Case("smollm2", "lora", "ddp", 2, length=128),
    Case("smollm2", "full", "ddp", 2, micro=1),
    Case("smollm2", "full", "zero2", 2, micro=1),
    Case("smollm2", "lora", "zero2", 2),
    Case("smollm2", "full", "zero3", 2, micro=1, checkpointing=True),
    Case("smollm2", "lora", "zero3", 2),
    Case("tiny", "full", "fsdp", 2),
    Case("gpt2", "full", "fsdp", 2),
    Case("gpt2", "full", "fsdp", 2, steps_a_batch=2),
    Case("gpt2", "full", "fsdp", 2, steps_a_batch=2, precision="bf16"),
    Case("gpt2", "lora", "fsdp", 2, steps_a_batch=2),
    Case("gpt2", "full", "fsdp", 4, micro=1, checkpointing=True),
    Case("smollm2", "full", "fsdp", 2, micro=1),
    Case("smollm2", "lora", "fsdp", 2),
    Case("smollm2", "qlora", "fsdp", 2, precision="bf16"),
    Case("moe", "full", precision="bf16"),
    Case("moe", "lora", micro=4, precision="bf16"),
    Case("gpt2", "full", optim="adafactor"),
    Case("smollm2", "full", micro=1, length=64, steps_a_batch=2, optim="adafactor"),
    Case("smollm2", "full", micro=1, length=64, steps_a_batch=2, optim="adamw_8bit"),
    Case("smollm2", "full", micro=1, length=64, steps_a_batch=2, optim="lion_32bit"),
]


def prepare(folder: Path) -> None:
    """The models, and rows that are longer than any length here."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

    make_tiny(folder / "tiny")
    if not (folder / "gpt2").is_dir():
        tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
        tokenizer.save_pretrained(folder / "gpt2")
        config = GPT2Config(n_layer=6, n_embd=256, n_head=4, vocab_size=8192, n_positions=512)
        GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    if not (folder / "moe").is_dir():
        tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
        tokenizer.save_pretrained(folder / "moe")
        config = Qwen3MoeConfig(
            hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
            vocab_size=8192, max_position_embeddings=512,
        )  # fmt: skip
        Qwen3MoeForCausalLM(config).save_pretrained(folder / "moe")
    words = " ".join(f"word {number}" for number in range(400))
    rows = [{"input": f"Tell me {number}.", "output": words} for number in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(cases: list[Case], folder: Path) -> dict[str, int]:
    """Run the cases, a launch for all of one strategy and number of ranks: bytes by name."""
    import yaml

    def launch(case: Case) -> tuple[str, int]:
        return case.strategy, case.ranks

    found: dict[str, int] = {}
    for (strategy, ranks), group in itertools.groupby(sorted(cases, key=launch), key=launch):
        jobs, cases_here = [], list(group)
        for case in cases_here:
            recipe = folder / f"{case.name}.yaml"
            recipe.write_text(yaml.safe_dump(case.recipe(folder)))
            argv = ["--recipe", str(recipe), "--output_dir", str(folder / case.name), "--overwrite"]
            log = str(folder / f"{case.name}.log")
            jobs.append({"argv": argv, "port": same_curve.free_port(), "log": log})
        file = folder / f"{strategy}-{ranks}.json"
        same_curve.launch_many(strategy, ranks, jobs, file, script="tests/measure_memory.py")
        found |= peaks(cases_here, folder)
    return found


def peaks(cases: list[Case], folder: Path) -> dict[str, int]:
    """What the runs left: of each, the rank that held most."""
    return {
        case.name: max(json.loads((folder / f"{case.name}.log.{n}.peak").read_text()) for n in range(case.ranks))
        for case in cases
    }


def predict(case: Case, folder: Path) -> float:
    """The plan's peak of a case, from the model's config.json alone."""
    from transformers import AutoConfig

    from stepladder.planning import memory, trace
    from stepladder.recipe.recipe import Recipe
    from stepladder.training.launch.launcher import Strategy

    keys, strategy = case.recipe(folder), Strategy(case.strategy)
    recipe = Recipe(name=case.name, path=folder, values=keys, origins={})
    config = AutoConfig.from_pretrained(keys["model_name_or_path"])
    work = trace.Work(case.micro, case.length, case.precision, case.checkpointing, strategy.shards)
    traced = trace.trace_batch(recipe, config, work)
    return memory.estimate(traced, recipe, config, strategy, case.ranks, case.steps_a_batch > 1).total


def table(cases: list[Case], found: dict[str, int], folder: Path) -> tuple[str, list[float]]:
    """Markdown rows, and the error of each case in percent."""
    rows, errors = ["| model | method | strategy | batch × tokens | ckpt | precision | measured MB | plan MB | error |",
                    "| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: |"], []  # fmt: skip
    for case in cases:
        plan, real = predict(case, folder), found[case.name]
        errors.append(100 * (plan / real - 1))
        method = case.method if case.optim == Case.optim else f"{case.method}, {case.optim}"
        batch = f"{case.micro} × {case.length}" + (f", {case.steps_a_batch} per step" if case.steps_a_batch > 1 else "")
        ranks = f"{case.strategy} × {case.ranks}" if case.ranks > 1 else case.strategy
        cells = (case.model, method, ranks, batch, "on" if case.checkpointing else "off", case.precision)
        rows.append(f"| {' | '.join(cells)} | {real / 1e6:,.1f} | {plan / 1e6:,.1f} | {errors[-1]:+.2f} % |")
    return "\n".join(rows), errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs lie")
    parser.add_argument("--only", default="", help="the cases whose names hold this")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced, between its two plan-check marks")
    parser.add_argument("--measured", action="store_true", help="take the runs that lie there")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder)
    cases = [case for case in CASES if args.only in case.name]
    found = peaks(cases, args.folder) if args.measured else measure(cases, args.folder)
    rows, errors = table(cases, found, args.folder)
    sizes = [abs(error) for error in errors]
    verdict = f"{len(cases)} combinations: median error {statistics.median(sizes):.2f} %, worst {max(sizes):.2f} %"
    print(rows, verdict, sep="\n\n")
    if args.page:
        mark, text = "<!-- plan-check -->\n", args.page.read_text()
        before, _, after = text.split(mark)
        args.page.write_text(f"{before}{mark}{verdict}.\n\n{rows}\n{mark}{after}")


if __name__ == "__main__":
    main()
