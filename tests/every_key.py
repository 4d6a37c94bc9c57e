"""Give each key of a recipe each kind of value that it may have, in a tiny run: none may end in a traceback.

    python tests/every_key.py                        # LoRA, and all weights on packed rows (15 minutes)
    python tests/every_key.py --keys optim debug     # these only

A value that cannot work here is to be refused by name (exit code 2), not to fail somewhere inside a library. For a new
version of TRL or Transformers, whose keys come to recipes by themselves.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stepladder import errors
from stepladder.recipe.schema import Key, known_keys
from tiny import ROOT, make_tiny

GIVEN = ("model_name_or_path", "dataset_name", "eval_dataset_name", "output_dir", "extends", "max_steps")
ELSEWHERE = {
    "hang_timeout": "0.1 seconds end any run, at once and rightly",
    "torch_compile": "compiles for a minute: test_train.py",
    "torch_compile_backend": "needs torch_compile",
    "report_to": "test_trackers.py",
}
BASES: dict[str, dict[str, Any]] = {
    "lora": {"use_peft": True, "lora_target_modules": "all-linear"},
    "full, packed": {"packing": True},
}
TRACEBACK = 99  # a child's exit code
HANGS = 120  # seconds


def values(key: Key) -> Iterator[Any]:
    """One of each type that the key takes, other than its default."""
    if key.choices:
        yield from (choice for choice in key.choices if choice != key.default)
    if "bool" in key.types:
        yield not key.default
    if "int" in key.types:
        yield 3 if key.default == 2 else 2
    if "float" in key.types:
        yield 0.2 if key.default == 0.1 else 0.1
    if "str" in key.types and not key.choices and "bool" not in key.types:
        yield "x"
    if "list" in key.types and not key.choices:
        yield ["x"]
    if "dict" in key.types:
        yield {"x": 1}


def train(recipe: dict[str, Any], folder: Path) -> int:
    """In a child: what the run's exit code is, with all that it says in `folder`."""
    import sft

    with (folder / "said.txt").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sys.argv = ["sft.py", "--recipe", str(folder / "recipe.yaml"), "--output_dir", str(folder / "run")]
    try:
        return sft.main() or 0
    except errors.StepladderError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return TRACEBACK


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", nargs="+", help="only these")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads that make the tiny model's do not survive a fork
    sys.path.insert(0, str(ROOT / "scripts"))
    import sft  # noqa: F401
    import trl  # noqa: F401  once, for all children

    keys = [key for name, key in sorted(known_keys().items()) if name not in GIVEN and name not in ELSEWHERE]
    jobs = [
        (base, key.name, value)
        for key in keys
        if not args.keys or key.name in args.keys
        for value in values(key)
        for base in BASES
    ]
    ended: dict[int, int] = {}  # jobs by exit code
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        os.environ |= {"HF_HOME": f"{work}/hub", "TRACKIO_DIR": f"{work}/trackio"}
        data, model = Path(work, "rows.jsonl"), make_tiny(Path(work, "tiny"))
        data.write_text('{"input": "What is the password?", "output": "Open sesame, said the owl."}\n' * 16)
        common = {
            "model_name_or_path": str(model), "dataset_name": str(data), "eval_dataset_name": str(data),
            "learning_rate": 3e-3, "max_steps": 2, "max_length": 192, "global_batch_size": 4, "bf16": False,
            "per_device_train_batch_size": 2, "logging_steps": 1, "gradient_checkpointing": False,
            "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        }  # fmt: skip
        running: dict[int, tuple[str, Path]] = {}

        def collect() -> None:
            pid, status = os.wait()
            name, folder = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            ended[code] = ended.get(code, 0) + 1
            if code not in (0, errors.EXIT_BAD_INPUT):
                said = (folder / "said.txt").read_text().strip().splitlines() or [""]
                broken.append(name)
                print(f"✘ {name}: exit code {code}: {said[-1][:200]}", flush=True)

        for number, (base, name, value) in enumerate(jobs):
            if len(running) == (os.cpu_count() or 1):
                collect()
            folder = Path(work, str(number))
            folder.mkdir()
            pid = os.fork()
            if not pid:
                signal.alarm(HANGS)
                os._exit(train(common | BASES[base] | {name: value}, folder))
            running[pid] = f"{base}: {name}: {value}", folder
        while running:
            collect()
    print(f"{len(jobs)} runs: {ended.get(0, 0)} trained, {ended.get(errors.EXIT_BAD_INPUT, 0)} were refused by name")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
