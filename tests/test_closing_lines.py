"""What a run says at its end can be typed as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pages
from conftest import ROOT

pytestmark = pytest.mark.proof

LINE = re.compile(r"^  (ask it|compare it|merge it): +(python .*)$", re.MULTILINE)
RUNS = {
    "lora": ("--recipe lora", {"ask it", "compare it", "merge it"}),
    "a split": ("--recipe lora --eval_dataset_name null --test_split_size 4", {"ask it", "compare it", "merge it"}),
    "qlora": ("--recipe qlora --eval_strategy no", {"ask it", "merge it"}),
    "full": ("--recipe sft", {"ask it", "compare it"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_line_works(name, player: pages.Player, tiny: Path, tmp_path: Path) -> None:
    """Guards QLoRA's merge line, which was refused for want of a flag, and any other that a run ends with; the folder
    has a blank in its name."""
    for linked in ("scripts", "src", "recipes", "data"):
        (tmp_path / linked).symlink_to(ROOT / linked)
    words, expected = RUNS[name]
    code, said = player.play(
        f"python scripts/sft.py {words} --model_name_or_path {tiny} --max_steps 2 --max_length 192 "
        "--output_dir 'runs/my run' --global_batch_size 2 --per_device_train_batch_size 1",
        tmp_path,
    )
    assert code == 0, said
    lines = dict(LINE.findall(said))
    assert lines.keys() == expected, said
    for line in lines.values():
        code, told = player.play(line, tmp_path)
        assert code == 0, f"{line}\n{told}"
