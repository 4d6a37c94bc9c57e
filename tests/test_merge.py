"""A merged model is base and adapter in one, exactly, whatever the adapter; or there is no merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stepladder.errors import ModelError
from stepladder.model.merge import Merge

ROWS = 64  # the vocabulary


def silent(*_: int) -> None:
    pass


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes})
    )


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, **changes)
    )


def adapter_on(model: Any, base: Path, folder: Path, seed: int = 1, **keys: Any) -> Path:
    """An adapter whose every tensor is random, saved as PEFT saves it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **keys})
    model.config._name_or_path = str(base)
    wrapped = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn_like(parameter)
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else parameter.data + noise
    wrapped.save_pretrained(folder)
    return folder


def saved(model: Any, folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Path:
    model.to(dtype).save_pretrained(folder, **keys)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 41).reshape(4, 10)
    with torch.no_grad():
        return model(input_ids=ids).logits


CASES = {
    "LoRA": (llama, {}),
    "rsLoRA": (llama, {"use_rslora": True}),
    "DoRA": (llama, {"use_dora": True}),
    "rank and alpha patterns": (
        llama,
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}},
    ),
    "lora_bias": (lambda: llama(attention_bias=True), {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "head in full": (llama, {"modules_to_save": ["lm_head"]}),
    "embeddings in full": (llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "LoRA on embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "DoRA on embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "single tokens": (llama, {"trainable_token_indices": [3, 5]}),
    "Conv1D": (gpt2, {"fan_in_fan_out": True}),
    "DoRA on Conv1D": (gpt2, {"fan_in_fan_out": True, "use_dora": True}),
    "tied": (lambda: llama(tie_word_embeddings=True), {}),
    "tied, single tokens": (lambda: llama(tie_word_embeddings=True), {"trainable_token_indices": [3, 5]}),
    "tied, trained tied": (
        lambda: llama(tie_word_embeddings=True),
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_merges_what_peft_merges(case: str, tmp_path: Path) -> None:
    """Bit for bit what PEFT's own whole-model merge gives, in the names that the base has on disk."""
    make, keys = CASES[case]
    base = saved(make(), tmp_path / "base")
    adapter = adapter_on(make(), base, tmp_path / "adapter", **keys)
    Merge(base, [adapter], [1.0]).write(make_dir(tmp_path / "out"), torch.float32, 40_000, silent)

    theirs = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    ours = load(tmp_path / "out").state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1  # several shards, and still whole


@pytest.mark.parametrize("keys", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
def test_unties_embeddings_that_parted(keys: dict[str, Any], tmp_path: Path) -> None:
    """Guards against a merge that ties what the adapter trained apart: PEFT's writes both or drops one (peft#2777)."""
    base = saved(llama(tie_word_embeddings=True), tmp_path / "base")
    adapter = adapter_on(llama(tie_word_embeddings=True), base, tmp_path / "adapter", **keys)
    Merge(base, [adapter], [1.0]).write(make_dir(tmp_path / "out"), torch.float32, 10**9, silent)
    merged = load(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    reference = PeftModel.from_pretrained(load(base), adapter)
    torch.testing.assert_close(logits(merged), logits(reference), atol=1e-5, rtol=0)


def make_dir(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_several_adapters_add_up(tmp_path: Path) -> None:
    """The change is the weighted sum of the adapters' changes, which is PEFT's `cat` combination."""
    base = saved(llama(), tmp_path / "base")
    first = adapter_on(llama(), base, tmp_path / "first")
    second = adapter_on(llama(), base, tmp_path / "second", seed=2, r=2, target_modules=["q_proj", "up_proj"])
    Merge(base, [first, second], [0.75, -0.5]).write(make_dir(tmp_path / "out"), torch.float32, 10**9, silent)
    peft = PeftModel.from_pretrained(load(base), first, "first")
    peft.load_adapter(second, "second")
    peft.base_model.set_adapter(["first", "second"])
    for layer in peft.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("first", 0.75)
            layer.set_scale("second", -0.5)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(peft), atol=1e-4, rtol=0)


def test_vocabulary_that_grew(tmp_path: Path) -> None:
    """Embeddings of added tokens come with the adapter, and the merged model has them."""
    base = saved(llama(), tmp_path / "base")
    grown = llama()
    grown.config._name_or_path = str(base)
    grown.resize_token_embeddings(ROWS + 3)
    adapter = adapter_on(grown, base, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    Merge(base, [adapter], [1.0]).write(make_dir(tmp_path / "out"), torch.float32, 10**9, silent)
    merged, bigger = load(tmp_path / "out"), load(base)
    assert merged.config.vocab_size == ROWS + 3
    bigger.resize_token_embeddings(ROWS + 3)
    torch.testing.assert_close(logits(merged), logits(PeftModel.from_pretrained(bigger, adapter)), atol=1e-5, rtol=0)


def test_vocabulary_nobody_knows(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    adapter = adapter_on(llama(), base, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight has 64 rows, the adapter's 66"):
        Merge(base, [adapter], [1.0], tokens=ROWS + 2)


@pytest.mark.parametrize("prefix", [True, False])
def test_names_on_disk_stay(prefix: bool, tmp_path: Path) -> None:
    """GPT-2 lies on the hub without the `transformer.` that its class has."""
    model = gpt2()
    base = saved(model, tmp_path / "base")
    if not prefix:
        from safetensors.torch import load_file, save_file

        file = base / "model.safetensors"
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    adapter = adapter_on(gpt2(), base, tmp_path / "adapter", fan_in_fan_out=True)
    Merge(base, [adapter], [1.0]).write(make_dir(tmp_path / "out"), torch.float32, 10**9, silent)
    theirs = PeftModel.from_pretrained(load(base), adapter)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(theirs), atol=1e-4, rtol=0)
    from stepladder.model.weights import Weights

    assert Weights(base).tensors.keys() == Weights(tmp_path / "out").tensors.keys()


@pytest.mark.parametrize("case", CASES)
def test_reference_is_base_and_adapter(case: str, tmp_path: Path) -> None:
    """What the proof compares with: PEFT's own forward, though no weight of the base is in memory."""
    make, keys = CASES[case]
    base = saved(make(), tmp_path / "base")
    adapter = adapter_on(make(), base, tmp_path / "adapter", **keys)
    reference = Merge(base, [adapter], [1.0]).reference()
    assert torch.equal(logits(reference), logits(PeftModel.from_pretrained(load(base), adapter)))
    assert all(p.is_meta for n, p in reference.named_parameters() if "base_layer" in n)


def test_the_base_as_training_quantized_it(tmp_path: Path) -> None:
    """`dequantized` is the base that a QLoRA run computes with: bitsandbytes' own 4-bit layers, weight by weight."""
    from transformers import BitsAndBytesConfig

    from stepladder.model.quantized import RoundTrip

    base = saved(llama(), tmp_path / "base")
    adapter = adapter_on(llama(), base, tmp_path / "adapter")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as training does: model/load.py says why
    trained = logits(PeftModel.from_pretrained(model, adapter).eval())
    off = {}
    for choice, quantize in (("dequantized", RoundTrip("nf4", True, torch.float32)), ("original", None)):
        out = make_dir(tmp_path / choice)
        Merge(base, [adapter], [1.0], quantize).write(out, torch.float32, 10**9, silent)
        off[choice] = float((logits(load(out)) - trained).abs().max())
    assert off["dequantized"] < 1e-4 < 0.1 < off["original"], off
