"""The result on disk: the tensors that Transformers and PEFT write, in one dtype, gathered one at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import same_curve
from conftest import manifest
from stepladder.data import mixture
from stepladder.errors import TrainingError
from stepladder.evaluation.held_out import mean_loss, measure_losses
from stepladder.model import pretrained
from stepladder.training import final_save, result


def make_untied(tiny: Path, folder: Path) -> Path:
    """The tiny model with an output layer of its own, which an adapter can hold as a whole."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def make_experts(tiny: Path, folder: Path) -> Path:
    """A model whose files hold each expert's matrices apart and under other names than the model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_gpt2(_: Path, folder: Path) -> Path:
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


BASES: dict[str, Callable[[Path, Path], Path]] = {
    "tied": lambda tiny, _: tiny,
    "untied": make_untied,
    "experts": make_experts,
    "gpt2": make_gpt2,
}


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(tiny, folder / name) for name, make in BASES.items()}


def write(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the files that one process writes of a model."""
    folder.mkdir()
    accelerator = SimpleNamespace(unwrap_model=lambda model, keep_torch_compile: model)
    trainer = SimpleNamespace(accelerator=accelerator, model=model, args=SimpleNamespace(should_save=True))
    final_save.write_weights(trainer, folder)
    return tensors_in(folder)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_result_is_what_transformers_writes(
    name: str, dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards tied weights that are left out, names that differ in files, experts that are split, and the configuration;
    also in several files, beside those of an interrupted attempt."""
    model = AutoModelForCausalLM.from_pretrained(bases[name], dtype=dtype)
    model._keys_to_ignore_on_save = ["model.norm.weight"]
    model.save_pretrained(tmp_path / "theirs")
    assert_same(write(model, tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "theirs" / file).read_text()
    monkeypatch.setattr(final_save, "LIMIT", 10_000)
    write(model, tmp_path / "parts")
    parts = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert len(set(parts["weight_map"].values())) > 2
    assert_same(tensors_in(tmp_path / "parts"), tensors_in(tmp_path / "theirs"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert loaded.dtype == dtype


def test_the_recipe_s_dtype_holds_whatever_the_strategy_trains_in(bases: dict[str, Path], tmp_path: Path) -> None:
    """Guards a recipe of bfloat16, of which FSDP trains fp32 copies, and a module that Transformers keeps in fp32."""
    model = AutoModelForCausalLM.from_pretrained(bases["tied"], dtype=torch.bfloat16).float()
    model.config.dtype = torch.bfloat16  # as loaded
    model._keep_in_fp32_modules_strict = {"norm"}
    found = write(model, tmp_path / "run")
    assert {name for name, tensor in found.items() if tensor.dtype == torch.float32} == {
        n for n in found if "norm" in n
    }
    assert json.loads((tmp_path / "run/config.json").read_text())["dtype"] == "bfloat16"


ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "whole module": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "tokens": lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5], task_type="CAUSAL_LM"),
    "embeddings": lambda: LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_what_peft_writes(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Guards an adapter that lacks a part: DoRA's magnitudes, a whole module, rows of embeddings, virtual tokens, and
    the embeddings of a vocabulary that grew."""
    base = AutoModelForCausalLM.from_pretrained(bases["untied"])
    if kind == "embeddings":
        base.resize_token_embeddings(base.vocab_size + 8)
    model = get_peft_model(base, ADAPTERS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * parameter.requires_grad)
    model.save_pretrained(str(tmp_path / "theirs"))
    assert_same(write(model, tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    file = "adapter_config.json"
    assert (tmp_path / "ours" / file).read_text() == (tmp_path / "theirs" / file).read_text()


@pytest.mark.parametrize("name", BASES)
def test_one_tensor_is_held_at_a_time(
    name: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the memory of the rank that writes: of what was gathered, the tensor that is written and the next one are
    there, or the layer's experts that files hold apart."""
    model, gather = AutoModelForCausalLM.from_pretrained(bases[name]), final_save._gather
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def gather_copies(names: Any, live: Any) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, tensor in gather(names, live):
            copy = tensor.clone()
            alive.add(copy)
            most = max(most, sum(tensor.nbytes for tensor in alive))
            yield name, copy
            del copy

    monkeypatch.setattr(final_save, "_gather", gather_copies)
    write(model, tmp_path / "run")
    largest = max(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.model.layers[0].mlp.parameters()) if name == "experts" else 0
    assert largest <= most <= 2 * max(largest, layer)
    assert most < sum(p.nbytes for p in model.parameters()) * 0.8


def test_a_result_that_cannot_be_pushed_is_saved_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the hub's errors, which are errors of a file system too: they were taken for a full disk."""
    done: list[str] = []

    def push(message: str, revision: str | None) -> None:
        assert done == ["saved"]  # and verified, with its card
        raise OSError("401 Client Error: Unauthorized")

    monkeypatch.setattr(result, "_save", lambda *_: done.append("saved"))
    args = SimpleNamespace(push_to_hub=True, hub_revision=None)
    trainer: Any = SimpleNamespace(args=args, hub_model_id="me/it", push_to_hub=push)
    with pytest.raises(TrainingError) as caught:
        result.save(trainer, SimpleNamespace(folder=tmp_path), {})  # type: ignore[arg-type]
    assert "the result is saved" in caught.value.what and "401" in caught.value.what
    assert f"hf upload me/it {tmp_path}" in caught.value.help


@pytest.mark.proof
@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp"])
def test_a_sharded_result_is_one_process_s(
    config: str, bases: dict[str, Path], learnable: Path, tmp_path: Path
) -> None:
    """Guards bf16 of what was trained in fp32, a tensor saved twice or not at all, and experts in the wrong place: each
    result has the tensors and dtype of its base, and its loss as one process computes it is the one that was verified.
    """
    runs = {
        "full": {"model": "tied", "bf16": True},
        "lower": {"model": "tied", "bf16": True, "dtype": "bfloat16"},
        "experts": {"model": "experts", "router_aux_loss_coef": 0.0},  # no loss beside the tokens'
        "lora": {"model": "tied", "bf16": True, **same_curve.METHODS["lora"]},
        "whole": {"model": "untied", **same_curve.METHODS["lora"], "lora_modules_to_save": ["lm_head"],
                  "lora_target_modules": ["q_proj"]},
    }  # fmt: skip
    if config == "fsdp":  # which is refused there
        del runs["whole"]
    jobs = []
    for name, keys in runs.items():
        recipe = same_curve.recipe_keys("full", bases[keys.pop("model")], learnable)
        recipe |= {"max_steps": 2, "eval_strategy": "no", "use_cpu": True, **keys}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        words = ["--recipe", str(tmp_path / f"{name}.yaml"), "--output_dir", str(tmp_path / name)]
        jobs.append({"argv": words, "port": same_curve.free_port(), "log": str(tmp_path / f"{name}.log")})
    same_curve.launch_many(config, 2, jobs, tmp_path / "jobs.json")
    for name, keys in runs.items():
        run = tmp_path / name
        assert same_curve.finished(run), (tmp_path / f"{name}.log").read_text()[-3000:]
        found, dtype = tensors_in(run), torch.bfloat16 if name == "lower" else torch.float32
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        if dtype == torch.float32:  # not rounded to 16 bits and back
            assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in found.values())
        if "use_peft" not in keys:
            base = tensors_in(Path(manifest(run)["starts_from"]["base"]))
            assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in base.items()}
        if "bf16" not in keys:
            model, tokenizer = pretrained.load_for_inference(str(run))
            taken = mixture.from_name(str(learnable)).take(range(8))
            loss = mean_loss(measure_losses(model, tokenizer, taken))
            assert loss == pytest.approx(manifest(run)["saved"]["loss"], abs=1e-4)
