"""Chapters 1 to 3 of the workshop: the first steps, memory, your own data, a broken model."""

from __future__ import annotations

import json
import re

import pytest

from played import Played

pytestmark = pytest.mark.proof


def test_1_1_prompt_the_base(played: Played) -> None:
    """The transcript is kept, and it is measured whether answers repeat and stop."""
    rows = [json.loads(line) for line in (played.folder / "runs/before.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and not rows[0]["stopped"], "12 tokens are too few for quantum physics"
    said = played.outputs[1].splitlines()
    assert len(said) == 3 and said[0].endswith("is cut off") and all("% of its runs" in line for line in said)


def test_1_2_twice_the_steps(played: Played) -> None:
    """Twice the steps; the first 60 are the same; the page holds both curves; the loss went lower."""
    short, long = ([row["loss"] for row in played.metrics(name) if "loss" in row] for name in ("steps60", "steps120"))
    assert (len(short), len(long)) == (60, 120) and long[:60] == pytest.approx(short, abs=1e-4)
    assert sum(long[-18:]) < sum(short[-18:]), "an epoch each"
    assert re.search(r"^steps120: \w+", played.outputs[2], re.MULTILINE), "the verdict on lower or plateau"
    ratio = re.search(r"([\d.]+) times for 2.00 times the steps", played.outputs[3])
    assert ratio and float(ratio[1]) > 0, played.outputs[3]
    page = (played.folder / "runs/60-against-120.html").read_text()
    assert "steps60" in page and "steps120" in page


def test_2_1_memory_balancing(played: Played) -> None:
    """Micro-batch 2 to 4 is accumulation 4 to 2, on the same curve; out of memory is one message with ways down."""
    facts = [played.run(name) for name in ("micro2", "micro4")]
    cut = [(run["micro_batch_size"], run["gradient_accumulation_steps"], run["global_batch_size"]) for run in facts]
    assert cut == [(2, 4, 8), (4, 2, 8)]
    assert "4 steps compared" in played.outputs[3] and "the same curve (fp32): yes" in played.outputs[3]
    planned = [run["plan"]["peak_memory_bytes"] for run in facts]
    assert planned[1] > planned[0], "more rows at once"
    for run in facts:
        assert run["totals"]["tokens_per_second"] > 0 and max(run["totals"]["peak_memory_bytes"]) > 0
    assert "out of memory on rank 0" in played.outputs[4] and "--per_device_train_batch_size 16" in played.outputs[4]


def test_3_1_bring_your_own_data(played: Played) -> None:
    """Two rows of a Python list are learned: asked who the best instructor is, the model says it."""
    assert "Who is the best instructor?" in played.outputs[0]
    assert played.outputs[2].strip() == "Obviously, the person running this workshop."
    assert played.outputs[3].strip(), "what it says of the worst"


def test_3_2_break_the_model(played: Played) -> None:
    """The verdicts name memorization and overfitting; a training question is answered word for word; and with early
    stopping the result is the best checkpoint."""
    assert re.search(r"^break: memorized, overfitting", played.outputs[1], re.MULTILINE), played.outputs[1]
    assert "2 of 2 training questions answered word for word" in played.outputs[3], played.outputs[3]
    stopped = played.run("stopped")["stopped_early"]
    assert (stopped["step"] - stopped["best_step"], stopped["patience"]) == (80, 2)
    assert played.run("stopped")["result_step"] == stopped["best_step"] and "stopped early" in played.outputs[5]


def test_3_3_fp16_and_bf16(played: Played) -> None:
    """A gradient of 1e-8 is lost in fp16 and kept in bf16; training in bf16 ends where fp32 does."""
    lines = dict(line.split(maxsplit=1) for line in played.outputs[0].splitlines())
    assert "fp16 training needs a GPU" in played.outputs[1]
    assert lines["float16"].startswith("gradient 0, with loss scaling 1e-08")
    assert lines["bfloat16"].startswith("gradient 1e-08")
    assert [played.run(name)["precision"] for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    ends = [
        played.metrics(name)[-1]["train_loss" if "train_loss" in played.metrics(name)[-1] else "loss"]
        for name in ("fp32", "bf16")
    ]
    assert ends[0] == pytest.approx(ends[1], abs=0.05)  # bf16 keeps 2 to 3 digits of a loss of 9
