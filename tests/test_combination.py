"""Adapters combined by PEFT's types, streamed: what PEFT gives with the whole model in memory, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_merge import adapter_on, gpt2, llama, load, make_dir, saved, silent

from conftest import script
from stepladder.errors import ModelError
from stepladder.model.merge.combination import PRUNING, TYPES, Combination
from stepladder.model.merge.methods import open_merge
from stepladder.model.merge.proof import Proof

WEIGHTS = [0.7, -0.4]


def pair(folder: Path, make: Any = llama, first: dict | None = None, second: dict | None = None) -> list[Path]:
    """A base and two random adapters on it."""
    base = saved(make(), folder / "base")
    return [
        base,
        adapter_on(make(), base, folder / "first", **(first or {})),
        adapter_on(make(), base, folder / "second", seed=2, **(second or {})),
    ]


def by_peft(base: Path, adapters: list[Path], combination: Combination) -> dict[str, torch.Tensor]:
    """The weights that PEFT's own `add_weighted_adapter` and merge give."""
    model = PeftModel.from_pretrained(load(base), adapters[0], "adapter_0")
    for number, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, f"adapter_{number}")
    torch.manual_seed(combination.seed or 0)
    names = [f"adapter_{number}" for number in range(len(adapters))]
    model.add_weighted_adapter(
        names, WEIGHTS[: len(adapters)], "both", combination_type=combination.type, density=combination.density
    )
    model.set_adapter("both")
    return dict(model.merge_and_unload().state_dict())


CASES = {
    "same modules": (llama, {}, {}),
    "other modules": (llama, {}, {"target_modules": ["q_proj", "up_proj"]}),
    "other alphas, ranks by pattern": (
        llama,
        {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"k_proj": 2}},
        {"rank_pattern": {"k_proj": 2}},
    ),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["q_proj"]}),
    "Conv1D": (gpt2, {"fan_in_fan_out": True}, {"fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", TYPES[1:])
def test_combines_what_peft_combines(kind: str, case: str, tmp_path: Path) -> None:
    """Guards each type against PEFT's whole-model result, with a negative weight: the same tensors, and the proof."""
    make, *keys = CASES[case]
    base, *adapters = pair(tmp_path, make, *keys)
    combination = Combination(kind, 0.5 if kind in PRUNING else None, 3 if kind.startswith("dare") else None)
    work, because = open_merge(base, adapters, WEIGHTS, None, 0, "cpu", combination)
    assert because is None
    check = Proof(work, [[1, 5, 9, 4], [1, 7]])
    work.write(make_dir(tmp_path / "out"), torch.float32, 10**9, silent)
    check.compare(tmp_path / "out", torch.float32)
    expected, found = by_peft(base, adapters, combination), load(tmp_path / "out").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=f"{kind}, {case}: {name}")


REFUSED = {
    "rsLoRA": ({"use_rslora": True}, {}, "√r"),
    "DoRA": ({}, {"use_dora": True}, "use_dora"),
    "modules in full": ({"modules_to_save": ["lm_head"]}, {}, "whole modules"),
    "other ranks": ({}, {"r": 2}, "same r"),
    "other ranks in a module": ({}, {"rank_pattern": {"k_proj": 2}}, "size"),
    "a pattern beside names": (
        {"target_modules": r".*\.q_proj"},
        {"target_modules": ["q_proj"]},
        "target modules type",
    ),
    "left out by the first": ({"exclude_modules": ["k_proj"]}, {"target_modules": ["q_proj", "k_proj"]}, "excluded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_combines_wrongly_is_refused(case: str, tmp_path: Path) -> None:
    """Guards against a merge that PEFT computes without an error, and of other adapters (peft#3761)."""
    first, second, said = REFUSED[case]
    base, *adapters = pair(tmp_path, llama, first, second)
    with pytest.raises(ModelError) as error:
        open_merge(base, adapters, WEIGHTS, None, 0, "cpu", Combination("linear"))
    assert said in error.value.render() and "cat" in error.value.help, error.value.render()


def test_the_seed_decides_what_dare_drops(tmp_path: Path) -> None:
    """Guards repeatability: the same seed gives the same weights, another one others."""
    base, *adapters = pair(tmp_path)

    def merged(seed: int) -> torch.Tensor:
        work, _ = open_merge(base, adapters, WEIGHTS, None, 0, "cpu", Combination("dare_linear", 0.5, seed))
        return work.merged_weight("model.layers.0.self_attn.q_proj.weight")

    assert torch.equal(merged(3), merged(3)) and not torch.equal(merged(3), merged(4))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--combination_type", "ties"], "needs --density"),
        (["--combination_type", "linear", "--density", "0.5"], "--density has no effect"),
        (["--density", "0.5"], "--density has no effect with --combination_type cat"),
        (["--combination_type", "ties", "--density", "0.5", "--seed", "1"], "--seed has no effect"),
        (["--combination_type", "ties", "--density", "0"], "0"),
        (["--combination_type", "svd"], "invalid choice"),
        (["--combination_type", "linear", "--weights", "1"], "2 adapters and 1 weights"),
    ],
)
def test_flags_that_do_not_fit_are_named(words: list[str], said: str, tmp_path: Path) -> None:
    """Guards against a flag that is taken and has no effect."""
    _, first, second = pair(tmp_path)
    done = script("merge", "--adapter", first, "--adapter", second, "--output_dir", tmp_path / "out", *words)
    assert done.code == 2 and said in done.out + done.err and "Traceback" not in done.err, done
    assert not (tmp_path / "out").exists()


def test_the_command_writes_what_it_did(tiny: Path, tmp_path: Path) -> None:
    """Guards merge.json and the card: type, density and seed stand in them."""
    adapters = [adapter_on(load(tiny), tiny, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    words = [word for folder in adapters for word in ("--adapter", folder)]
    words += ["--combination_type", "dare_ties", "--density", "0.6", "--dtype", "fp32"]
    done = script("merge", *words, "--output_dir", tmp_path / "out")
    assert done.code == 0, done
    facts = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert facts["combination"] == {"type": "dare_ties", "density": 0.6, "seed": 0} and facts["status"] == "proved"
    assert "by dare_ties" in (tmp_path / "out" / "README.md").read_text()
