"""What is measured on a GPU, rehearsed on a tiny model: none is at hand, and what nobody runs stops running."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from conftest import metrics, run

pytestmark = pytest.mark.proof


def test_training_beside_trl(tmp_path: Path, smollm2: Path) -> None:
    """Guards `make bench-gpu`: rows that fit exactly, TRL's printed losses, a line for each contender."""
    done = run(sys.executable, "benchmarks/train_gpu.py", "--folder", tmp_path, "--rehearse", "--repeat", 1,
               "--only", "qlora")  # fmt: skip
    lines = [line.split("|")[2:-1] for line in done.out.splitlines() if "tiny, qlora" in line or "`trl sft`, " in line]
    assert done.code == 0 and [line[0].strip() for line in lines] == ["Stepladder", "`trl sft`, the same flags"], done
    losses = [float(line[-1]) for line in lines]
    # rows in another order, and TRL trains one token more of each
    assert losses[0] == pytest.approx(losses[1], abs=0.5)
    steps = metrics(tmp_path / "ours")
    assert len(steps) == 10 and steps[-1]["tokens"] > 0.9 * 10 * 2 * 64  # whole rows, none cut


def test_the_plan_beside_what_is_measured(tmp_path: Path, smollm2: Path) -> None:
    """Guards `make plan-gpu`: a line for the case, and the page's table in its place."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- plan-gpu -->\nold\n<!-- plan-gpu -->\nafter\n")
    done = run(sys.executable, "benchmarks/plan_gpu.py", "--folder", tmp_path, "--rehearse", "--only", "full",
               "--page", page)  # fmt: skip
    text = page.read_text()
    assert done.code == 0 and text.startswith("before\n") and text.endswith("after\n") and "old" not in text, done
    assert re.search(r"\| tiny \| full \| 2 × 64 \| off \| bfloat16 \|.* %", text)


def test_the_curve_beside_the_cpu_s(tmp_path: Path, smollm2: Path) -> None:
    """Guards `make curve-gpu`, which finds a CPU in the GPU's place: the same curve, to the bit."""
    words = ("--gpu", "--only", "lora", "--only", "fp32", "--folder", tmp_path)
    done = run(sys.executable, "tests/same_curve.py", *words)
    assert done.code == 0 and "equal    lora-gpu-1-2-unpacked-fp32-tiny" in done.out and "loss 0.0e+00," in done.out, (
        done
    )
