"""Predicted against measured peak memory on a CUDA GPU, with random weights; writes docs/planning.md's second table.

    python benchmarks/plan_gpu.py --folder /tmp/plan-gpu
    python benchmarks/plan_gpu.py --folder /tmp/plan-gpu --rehearse    # a tiny model, on any machine: does it run?

Each case trains three steps by scripts/sft.py. Measured are PyTorch's `max_memory_allocated` and
`max_memory_reserved` (run.json); predicted is the plan that the same run.json holds. Nothing is downloaded: the
shapes come with the planner, the tokenizer from tests/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from same_curve import one_gpu  # noqa: E402
from tiny import make_tiny, whole  # noqa: E402

MARK = "<!-- plan-gpu -->\n"
METHODS = {
    "full": [],
    "lora": ["--use_peft", "true", "--lora_r", "16", "--lora_target_modules", "all-linear"],
    "qlora": ["--use_peft", "true", "--lora_r", "16", "--lora_target_modules", "all-linear", "--load_in_4bit", "true"],
}


@dataclass(frozen=True)
class Case:
    """A shape of planning/shapes.yaml, and how it is trained."""

    model: str
    method: str
    micro: int
    length: int
    checkpointing: bool
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        kept = "on" if self.checkpointing else "off"
        return f"{self.model.split('/')[-1]}-{self.method}-{self.micro}-{self.length}-{kept}-{self.dtype}"


ROWS = 80
TINY = "tiny"
REHEARSAL = [Case(TINY, method, 2, 64, False) for method in METHODS]
ONE, EIGHT, SMALL = "HuggingFaceTB/SmolLM2-1.7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-0.6B"
CASES = [
    Case(SMALL, "full", 4, 2048, False),
    Case(SMALL, "full", 4, 2048, True, "float32"),
    Case(SMALL, "lora", 8, 2048, False),
    Case(ONE, "full", 1, 2048, False, "float32"),
    Case(ONE, "full", 4, 2048, True),
    Case(ONE, "lora", 4, 2048, False),
    Case(ONE, "lora", 1, 8192, True),
    Case(ONE, "qlora", 4, 2048, True),
    Case(EIGHT, "lora", 1, 2048, False),
    Case(EIGHT, "lora", 4, 2048, True),
    Case(EIGHT, "lora", 1, 8192, True),
    Case(EIGHT, "qlora", 1, 2048, False),
    Case(EIGHT, "qlora", 4, 2048, True),
    Case(EIGHT, "full", 1, 2048, True),
]


def make_model(name: str, folder: Path) -> Path:
    """A folder with random weights of a shape; the tokenizer knows few words, which changes no shape."""
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if name == TINY:
        return make_tiny(folder / TINY)

    def make(made: Path) -> None:
        shapes = yaml.safe_load((ROOT / "src/stepladder/planning/shapes.yaml").read_text())
        AutoTokenizer.from_pretrained(make_tiny(folder / TINY)).save_pretrained(made)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes[name]), dtype=torch.bfloat16)
        model.save_pretrained(made)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what is measured next may need all of the GPU

    return whole(folder / name.split("/")[-1], make)


def write_rows(case: Case, folder: Path) -> None:
    """Rows of so many tokens as the case has, as Stepladder reads them and as TRL does, to a word: none is cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_model(case.model, folder))

    def turns(number: int, words: int) -> list[dict[str, str]]:
        question, answer = f"Tell me {number}.", " ".join(["word"] * words)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def tokens(number: int, words: int) -> int:
        return len(tokenizer.apply_chat_template(turns(number, words), return_dict=False))

    (folder / "trl").mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w") as here, (folder / "trl/train.jsonl").open("w") as there:
        for number in range(ROWS):
            one, two = tokens(number, 1), tokens(number, 2)
            question, answer = turns(number, 1 + (case.length - one) // (two - one))
            here.write(json.dumps({"input": question["content"], "output": answer["content"]}) + "\n")
            there.write(json.dumps({"prompt": [question], "completion": [answer]}) + "\n")


def measure(case: Case, folder: Path) -> dict:
    """Train three steps; what run.json says."""
    run = folder / case.name
    write_rows(case, folder)
    words = ["--recipe", "sft", "--model_name_or_path", str(make_model(case.model, folder)), *METHODS[case.method]]
    words += ["--dtype", case.dtype] if case.method != "qlora" else ["--dtype", "null"]
    words += ["--bf16", "true", "--dataset_name", str(folder / "rows.jsonl"), "--eval_dataset_name", "null"]
    words += ["--max_length", str(case.length), "--per_device_train_batch_size", str(case.micro)]
    words += ["--global_batch_size", str(case.micro), "--gradient_checkpointing", str(case.checkpointing).lower()]
    words += ["--max_steps", "3", "--eval_strategy", "no", "--save_strategy", "no", "--output_dir", str(run)]
    subprocess.run([sys.executable, "scripts/sft.py", "--overwrite", *words], cwd=ROOT, env=one_gpu(), check=True)
    for weights in run.glob("*.safetensors"):
        weights.unlink()
    return json.loads((run / "run.json").read_text())


def row(case: Case, facts: dict) -> tuple[str, float]:
    """A line of the table, and the error in percent of what was allocated."""
    real, planned = max(facts["totals"]["peak_memory_bytes"]), facts["plan"]["peak_memory_bytes"]
    reserved = facts["totals"].get("reserved_memory_bytes", 0)  # not counted on a CPU
    error = 100 * (planned / real - 1)
    model = case.model.split("/")[-1]
    what = f"{case.micro} × {case.length} | {'on' if case.checkpointing else 'off'} | {case.dtype}"
    gib = " | ".join(f"{size / 2**30:.2f}" for size in (real, reserved, planned))
    return f"| {model} | {case.method} | {what} | {gib} | {error:+.1f} % |", error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models and runs lie (40 GB)")
    parser.add_argument("--only", default="", help="the cases whose names hold this")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced, between its two plan-gpu marks")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()

    import torch

    if not (torch.cuda.is_available() or args.rehearse):
        sys.exit("✘ no CUDA GPU is here; on a CPU: make plan-check, or --rehearse")
    rows = ["| model | method | batch × tokens | ckpt | weights | allocated GiB | reserved GiB | plan GiB | error |",
            "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    errors = []
    for case in REHEARSAL if args.rehearse else CASES:
        if args.only in case.name:
            line, error = row(case, measure(case, args.folder))
            print(line, flush=True)
            rows.append(line)
            errors.append(abs(error))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a rehearsal, on a CPU"
    verdict = f"{device}, torch {torch.__version__}, {len(errors)} combinations: "
    verdict += f"median error {statistics.median(errors):.1f} %, worst {max(errors):.1f} %."
    print(verdict)
    if args.page:
        before, _, after = args.page.read_text().split(MARK)
        args.page.write_text(f"{before}{MARK}{verdict}\n\n" + "\n".join(rows) + f"\n{MARK}{after}")


if __name__ == "__main__":
    main()
