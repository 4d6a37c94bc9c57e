"""LoRA on the same rows by ms-swift and litgpt, with the flags for speed that train.py gives TRL, beside the recipe.

    python benchmarks/peers.py --repeat 2

As train.py, with which it shares rows, model, batch and how time is taken. Each of them wants other versions of
the same libraries, so that each gets an environment of its own in runs/peers/, made at the first call (it needs the
network and takes some minutes). LLaMA-Factory 0.9.5 is not among them: it imports torchaudio, whose wheel does not load
beside a torch without CUDA.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import train

ENVIRONMENTS = train.ROOT / "runs/peers"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
STEPS, RATE, BATCH = 2 * train.EPOCH, train.RATE["lora"], train.BATCH
# litgpt's command line wants requests and does not ask for it.
PACKAGES = {"ms-swift": ("ms-swift==4.6.0",), "litgpt": ("litgpt==0.5.13", "requests")}


def environment(name: str) -> Path:
    """The folder of the peer's commands; made if it is not there."""
    folder = ENVIRONMENTS / name
    if not (folder / "made").exists():
        print(f"… {name}: making {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        torch = f"torch=={importlib.metadata.version('torch').split('+')[0]}"
        subprocess.run([*install, torch], check=True)
        subprocess.run([*install, torch, *PACKAGES[name]], check=True)
        (folder / "made").touch()
    return folder / "bin"


def write(folder: Path) -> None:
    """The rows in the forms that they want."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    texts = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]
    alpaca = [{"instruction": question, "input": "", "output": answer, "system": SYSTEM} for question, answer in texts]
    talks = [{"messages": [{"role": "system", "content": SYSTEM}, *row["prompt"], *row["completion"]]} for row in rows]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (folder / "litgpt").mkdir()
    (folder / "litgpt/train.json").write_text(json.dumps(alpaca))
    (folder / "litgpt/val.json").write_text(json.dumps(alpaca[:1]))


def flags(**pairs: object) -> list[str]:
    return [word for key, value in pairs.items() for word in (f"--{key}", str(value))]


def swift(bin: Path, folder: Path) -> list[str]:
    pairs = flags(
        model=train.MODEL, model_type="llama", template="chatml", dataset=folder / "talks.jsonl", use_hf=True,
        split_dataset_ratio=0, tuner_type="lora", lora_rank=16, lora_alpha=32, lora_dropout=0, warmup_ratio=0,
        target_modules="all-linear", max_length=512, torch_dtype="bfloat16", gradient_checkpointing=False,
        group_by_length=True, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, learning_rate=RATE,
        max_steps=STEPS, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", eval_strategy="no",
        report_to="none", seed=42, use_cpu=True, output_dir=folder / "swift",
    )  # fmt: skip
    return [str(bin / "swift"), "sft", *pairs]


def litgpt(bin: Path, folder: Path) -> list[str]:
    """It wants the weights in a form of its own first, in a folder by whose name it knows the model."""
    model = folder / "SmolLM2-135M-Instruct"
    model.mkdir()
    for file in train.MODEL.iterdir():
        (model / file.name).symlink_to(file)
    subprocess.run([bin / "litgpt", "convert_to_litgpt", model], check=True, capture_output=True)
    lora = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": float(RATE), "weight_decay": 0.0}}
    pairs = {
        "data": "JSON", "data.json_path": folder / "litgpt", "data.mask_prompt": True, "data.prompt_style": "smollm2",
        "precision": "bf16-mixed", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0, **lora, "train.max_steps": STEPS,
        "train.epochs": 9, "train.global_batch_size": BATCH, "train.micro_batch_size": BATCH,
        "train.max_seq_length": 512, "train.lr_warmup_steps": 1, "train.min_lr": RATE, "optimizer": json.dumps(adamw),
        "seed": 42, "train.save_interval": "null", "eval.interval": 1000, "eval.max_iters": 1,
        "out_dir": folder / "litgpt_out",
    }  # fmt: skip
    return [str(bin / "litgpt"), "finetune_lora", str(model), *flags(**pairs)]


COMMANDS = {"ms-swift": swift, "litgpt": litgpt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = train.tokens(folder)
        write(folder)
        contenders = {"Stepladder": train.commands("lora", folder)[train.OURS]}
        for peer in PACKAGES:
            contenders[peer] = (COMMANDS[peer](environment(peer), folder), train.MALLOC)
        runs, share = train.measured(contenders, count, folder, args.repeat)
        print(f"\nlora: {count} non-padding tokens an epoch, {args.repeat} repetitions, medians\n")
        train.table(count, runs, share, "Stepladder")


if __name__ == "__main__":
    main()
