"""Seconds that answers and losses of held-out rows take, beside Transformers' pipeline and TRL's `evaluate`.

    python benchmarks/evaluation.py --repeat 3
    python benchmarks/evaluation.py --repeat 3 --model runs/lora   # an adapter

What compare.py measures of a side, by the functions that it calls: TechCo's 24 held-out rows, greedy, up to 128 new
tokens, fp32 on a CPU. Each contender in a process of its own, by turns; imports, loading and TRL's preparation of the
rows are not counted. How many answers are the same and the mean losses are printed, so that speed is not bought with
another result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "data/techco_eval.jsonl"
ANSWERS = ("answers: Stepladder", "answers: a pipeline, 16 at a time", "answers: a pipeline, one by one")
LOSSES = ("loss: Stepladder", "loss: TRL's `evaluate`")


def pipeline_answers(model: Any, tokenizer: Any, conversations: list[Any], batch_size: int) -> list[str]:
    from transformers import pipeline

    from stepladder.evaluation.generation import MAX_NEW_TOKENS

    ask = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch_size)
    found = ask(conversations, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, return_full_text=False)
    return [answer["generated_text"].strip() for (answer,) in found]


def trl_loss(
    model: Any, tokenizer: Any, conversations: list[Any], references: list[str], folder: str
) -> Callable[[], float]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    completions = [[{"role": "assistant", "content": reference}] for reference in references]
    rows = Dataset.from_dict({"prompt": conversations, "completion": completions})
    args = SFTConfig(output_dir=folder, report_to="none", per_device_eval_batch_size=8, bf16=False,
                     use_cpu=True, disable_tqdm=True)  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    return lambda: float(trainer.evaluate()["eval_loss"])


def play(contender: str, name: str) -> tuple[float, Any]:
    """Seconds, and the answers or the mean loss."""
    from stepladder.data import mixture
    from stepladder.evaluation import questions
    from stepladder.evaluation.generation import MAX_NEW_TOKENS, generate_answers
    from stepladder.evaluation.held_out import mean_loss, measure_losses
    from stepladder.model import pretrained

    rows = mixture.from_name(str(ROWS))
    asked = questions.extract_questions(rows)
    conversations, references = [question.messages for question in asked], [question.reference for question in asked]
    model, tokenizer = pretrained.load_for_inference(name)
    work: dict[str, Callable[[], Any]] = {
        ANSWERS[0]: lambda: [
            answer.text for answer in generate_answers(model, tokenizer, conversations, max_new_tokens=MAX_NEW_TOKENS)
        ],
        ANSWERS[1]: lambda: pipeline_answers(model, tokenizer, conversations, 16),
        ANSWERS[2]: lambda: pipeline_answers(model, tokenizer, conversations, 1),
        LOSSES[0]: lambda: mean_loss(measure_losses(model, tokenizer, rows)),
    }
    with tempfile.TemporaryDirectory() as folder:
        if contender == LOSSES[1]:
            work[contender] = trl_loss(model, tokenizer, conversations, references, folder)
        began = time.perf_counter()
        found = work[contender]()
        return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--model", default=str(ROOT / "models/smollm2-135m-instruct"))
    parser.add_argument("--play", choices=ANSWERS + LOSSES, help="one contender, in this process")
    args = parser.parse_args()
    if args.play:
        print(json.dumps(play(args.play, args.model)))
        return
    seconds: dict[str, list[float]] = {}
    results: dict[str, Any] = {}
    for _ in range(args.repeat):
        for contender in ANSWERS + LOSSES:
            words = [sys.executable, "-W", "ignore", __file__, "--play", contender, "--model", args.model]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"✘ {contender}\n{done.stderr[-2000:]}")
            taken, results[contender] = json.loads(done.stdout.splitlines()[-1])
            seconds.setdefault(contender, []).append(taken)
            print(f"{contender}: {taken:.1f} s", flush=True)
    print("\n| | seconds | × Stepladder | result |\n| --- | ---: | ---: | --- |")
    for contender, taken in seconds.items():
        first, found = (ANSWERS if contender in ANSWERS else LOSSES)[0], results[contender]
        median, spread = statistics.median(taken), f" ({min(taken):.1f} to {max(taken):.1f})" * (len(taken) > 1)
        same = f"loss {found:.4f}" if contender in LOSSES else (
            f"{sum(a == b for a, b in zip(found, results[first], strict=True))} of {len(found)} the same"
        )  # fmt: skip
        print(f"| {contender} | {median:.1f}{spread} | {median / statistics.median(seconds[first]):.2f} | {same} |")


if __name__ == "__main__":
    main()
