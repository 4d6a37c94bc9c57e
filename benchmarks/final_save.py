"""What writing the result takes, on rank 0 of real runs: private memory above the training's, and seconds.

    python benchmarks/final_save.py --folder /tmp/save

Beside it, of the same trained model, Transformers' `Trainer.save_model`. The model is a random Llama of 100 million
parameters, the launches those of scripts/sft.py. `accelerate launch` starts this file again, with a list of runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import many_runs  # noqa: E402
from measure_load import own_bytes  # noqa: E402

import same_curve  # noqa: E402
from tiny import make_tiny  # noqa: E402

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
METHODS = ("full", "lora")


@contextlib.contextmanager
def watched(found: dict[str, float]) -> Iterator[None]:
    """The most private bytes above those at the start, sampled every 2 ms, and the seconds of the block."""
    before, began, peak, done = own_bytes(), time.perf_counter(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own_bytes() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    yield
    done.set()
    thread.join()
    found |= {"bytes": peak, "seconds": time.perf_counter() - began}


def run(job: dict, rank: int) -> None:
    """This rank's part of one run, whose result is written twice."""
    from trl import SFTTrainer

    from stepladder.training import final_save

    write = final_save.write_weights

    def write_twice(trainer: Any, folder: Path) -> dict[str, str]:
        ours: dict[str, float] = {}
        theirs: dict[str, float] = {}
        with watched(ours):
            names = write(trainer, folder)
        if trainer.is_deepspeed_enabled:  # "stage3_gather_16bit_weights_on_model_save", without which it saves none
            trainer.model_wrapped._config.zero_config.gather_16bit_weights_on_model_save = True
        trainer.accelerator.wait_for_everyone()
        with watched(theirs):
            SFTTrainer.save_model(trainer, f"{folder}-transformers", _internal_call=True)
        if rank == 0:
            Path(f"{job['log']}.saved").write_text(json.dumps({"ours": ours, "theirs": theirs}))
        return names

    final_save.write_weights = write_twice
    many_runs.run(job, rank)


def make_model(folder: Path) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(make_tiny(folder / "tiny"))
    if not (folder / "model").is_dir():
        config = LlamaConfig(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                             num_attention_heads=12, num_key_value_heads=12)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs lie")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=STRATEGIES, nargs="+", default=STRATEGIES)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model, rows = make_model(args.folder), same_curve.write_rows(args.folder / "rows.jsonl")
    print("| strategy | method | MB by Transformers | MB | s by Transformers | s |")
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for strategy in args.only:
        jobs = []
        for method in METHODS:
            name = args.folder / f"{strategy}-{method}"
            keys = same_curve.recipe_keys(method, model, rows) | {"max_steps": 1, "max_length": 400, "use_cpu": True}
            keys |= {"global_batch_size": args.ranks, "per_device_train_batch_size": 1, "eval_strategy": "no"}
            Path(f"{name}.yaml").write_text(json.dumps(keys))  # which is YAML, too
            argv = ["--recipe", f"{name}.yaml", "--output_dir", str(name), "--overwrite"]
            jobs.append({"argv": argv, "port": same_curve.free_port(), "log": f"{name}.log"})
        file = args.folder / f"{strategy}.json"
        same_curve.launch_many(strategy, args.ranks, jobs, file, script="benchmarks/final_save.py")
        for method, job in zip(METHODS, jobs, strict=True):
            saved = json.loads(Path(f"{job['log']}.saved").read_text())
            cells = [f"{saved[who]['bytes'] / 1e6:,.0f}" for who in ("theirs", "ours")]
            cells += [f"{saved[who]['seconds']:.1f}" for who in ("theirs", "ours")]
            print(f"| {strategy} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        many_runs.main(run)
    else:
        main()
