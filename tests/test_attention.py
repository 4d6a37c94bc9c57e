"""Which attention a run takes, and that rows that lie end to end do not see each other wherever they are let to.

What GPUs compute by kernels is computed by their formula here: a stand-in for FlashAttention's varlen function under
Transformers' own path to it.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import manifest, run, script
from stepladder.errors import ModelError, RecipeError
from stepladder.model import attention, cpu_kernels, pretrained
from stepladder.planning import meta_model
from stepladder.recipe import load as recipe_load
from stepladder.recipe.recipe import Recipe

SMALL = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 4, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_embd": 32, "n_layer": 4,
    "n_head": 4, "n_positions": 64, "rotary_dim": 8, "ffn_dim": 48, "word_embed_proj_dim": 32, "d_model": 32,
    "n_layers": 4, "n_heads": 4, "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Whether Transformers keep rows apart that lie end to end, by their mask and by FlashAttention.
KNOWN = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "gemma3_text", "olmo3",
                     "gpt_neox", "granite", "smollm3", "starcoder2", "cohere2"), (True, True)),
    **dict.fromkeys(("opt", "gpt_oss", "afmoe"), (False, True)),
    **dict.fromkeys(("stablelm", "gptj"), (True, None)),  # the second is not asked for
    **dict.fromkeys(("bert", "roberta", "bloom", "mpt", "falcon", "mamba", "jamba", "recurrent_gemma"), (False, False)),
}  # fmt: skip
ROWS = (9, 5, 12)
BY_ROW, PADDED = ("sdpa", "rows end to end, each by itself", True), ("sdpa", "rows padded", False)


def settings(**values: Any) -> Recipe:
    return Recipe(name="", path=Path("r.yaml"), values=values, origins={})


def small(architecture: str, implementation: str = "eager", **changes: Any) -> Any:
    own = AutoConfig.for_model(architecture).to_dict()
    keys = {key: value for key, value in SMALL.items() if own.get(key) is not None or key == "head_dim"}
    keys |= {key: 0.0 for key in own if "drop" in key and isinstance(own[key], float)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**{k: v for k, v in keys.items() if k in own}, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True, softmax_scale=None,
           window_size=(-1, -1), dropout_p=0.0, softcap=None) -> torch.Tensor:  # fmt: skip
    """FlashAttention's formula for rows [tokens, heads, size] that begin at `cu_seqlens`, without its kernel."""
    out, ends = [], cu_seqlens_q.tolist()
    for start, end in itertools.pairwise(ends):
        query, key, value = (x[start:end].transpose(0, 1).float() for x in (q, k, v))
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * (softmax_scale or query.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1).to(q.dtype))
    return torch.cat(out)


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    assert len(q) == 1
    ends = torch.tensor([0, q.shape[1]])
    return varlen(q[0], k[0], v[0], ends, ends, None, None, **kwargs)[None]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' FlashAttention 2, loaded."""
    for name, value in {
        "_flash_fn": whole, "_flash_varlen_fn": varlen, "_loaded_implementation": "flash_attention_2",
        "_pad_fn": flash_utils._pad_input, "_unpad_fn": flash_utils._unpad_input,
        "_process_flash_kwargs_fn": flash_utils._lazy_define_process_function(varlen),
        "_process_with_kvcache_kwargs_fn": dict,
    }.items():  # fmt: skip
        monkeypatch.setattr(flash_utils, name, value)


def contaminated(model: Any) -> float:
    """The largest difference of the scores of rows end to end from those of each alone, as a share of the largest."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    torch.manual_seed(1)
    rows = [torch.randint(3, 100, (length,)).tolist() for length in ROWS]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": row} for row in rows])
    del batch["labels"]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows])
        together = model(**batch, use_cache=False).logits[0]
    return float((together - alone).abs().max() / alone.abs().max())


@pytest.mark.parametrize("architecture", KNOWN)
def test_what_is_known_of_an_architecture_is_so(architecture: str, flash) -> None:
    """Guards against rows that see each other without a word: OPT's did, on a CPU by default, and packed anywhere.

    Where rows are let to lie end to end, the scores are those of each row alone (1e-4 of the largest: fp32).
    """
    by_mask, by_length = KNOWN[architecture]
    model = small(architecture)
    assert attention.separates_by_mask(model) == by_mask
    assert (contaminated(model) < 1e-4) == by_mask
    if by_length is not None:
        assert attention.separates_rows(model, attention.BY_LENGTH) == by_length
    if by_length:
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = "flash_attention_2"
        assert contaminated(model) < 1e-4


def test_an_unknown_architecture_is_stopped_at_its_first_batch(monkeypatch) -> None:
    """Guards what no list knows: a model that attends row by row, and makes its mask without positions."""
    model = small("opt", "sdpa")
    monkeypatch.setattr(attention, "BLIND", set())
    assert attention.by_row(model, settings())
    with pytest.raises(attention.ModelError, match="opt does not keep them apart"):
        contaminated(model)


def test_on_a_gpu_rows_stay_in_bf16_and_nothing_waits_for_the_gpu(monkeypatch) -> None:
    """Guards SDPA's flash kernel, which takes neither fp32 nor a mask, and a wait in each layer: a fake GPU's tensors
    cannot be read, and the rows' lengths are asked for once a forward, however many layers there are."""
    taken: list[tuple[Any, ...]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        taken.append((query.dtype, key.dtype, value.dtype, str(query.device), tuple(query.shape), kwargs))
        return sdpa(query, key, value, **kwargs)

    lengths = attention.lengths_as_mask(torch.tensor([10, 25, 5]))
    before = torch.is_autocast_enabled("cuda")
    with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        query = torch.empty(1, 8, 40, 64, device="cuda")  # rotary positions leave it in fp32 under autocast
        key, value = (torch.empty(1, 2, 40, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        try:
            out, _ = ALL_ATTENTION_FUNCTIONS[attention.BY_ROW](torch.nn.Module(), query, key, value, lengths)
        finally:
            torch.set_autocast_enabled("cuda", before)
    kernel = {"dropout_p": 0.0, "is_causal": True, "scale": None, "enable_gqa": True}
    assert taken == [(*[torch.bfloat16] * 3, "cuda:0", (1, 8, n, 64), kernel) for n in (10, 25, 5)]
    assert (out.shape, out.dtype) == ((1, 40, 8, 64), torch.bfloat16)

    asked: list[int] = []
    on_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: asked.append(1) or on_host(tensor))
    for layers in (2, 6):
        model = small("llama", "sdpa", num_hidden_layers=layers)
        assert attention.by_row(model, settings())
        asked.clear()
        positions = torch.cat([torch.arange(row) for row in ROWS])[None]
        model(input_ids=positions + 3, position_ids=positions, use_cache=False)
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("keys", "device", "precision", "capability", "found"),
    [
        ({}, "cpu", "fp32", None, BY_ROW),
        ({}, "cuda", "bf16", (9, 0), BY_ROW),
        ({"attn_implementation": "sdpa"}, "cuda", "bf16", (8, 0), BY_ROW),
        ({}, "cuda", "fp16", (7, 5), PADDED),  # no flash kernel: T4
        ({}, "cuda", "fp32", (9, 0), PADDED),
        ({}, "mps", "fp16", None, PADDED),
        ({"padding_free": False}, "cuda", "bf16", (9, 0), PADDED),
        ({"packing": True}, "cuda", "bf16", (9, 0), BY_ROW),
        ({"packing": True}, "cuda", "fp16", (7, 5), ("sdpa", "rows end to end, kept apart by a mask", True)),
        ({"packing": True, "padding_free": False}, "cpu", "fp32", None, BY_ROW),
        ({"use_peft": True, "peft_type": "prompt"}, "cuda", "bf16", (9, 0), PADDED),
    ],
)  # fmt: skip
def test_what_is_taken_without_flash_attention(keys, device, precision, capability, found, monkeypatch) -> None:
    """Guards rows without padding where that is exact and has a kernel, and padded ones elsewhere."""
    monkeypatch.setattr(attention, "_capability", lambda: capability)
    choice, notes = attention.settle(small("llama", "sdpa"), settings(**keys), precision, device)
    assert (choice.implementation, choice.rows, choice.padding_free) == found
    assert bool(choice.why) == (device == "cuda" and "attn_implementation" not in keys)
    assert ["all pairs" in note for note in notes] == [True] * (choice.rows.endswith("mask"))


@pytest.mark.parametrize("key", ["packing", "eval_packing", "padding_free"])
@pytest.mark.parametrize("architecture", ["opt", "mamba"])
def test_rows_that_would_see_each_other_are_refused(architecture: str, key: str) -> None:
    """Guards against the key that asks for it being obeyed; left to themselves, such models' rows are padded."""
    with pytest.raises(RecipeError, match=f"{key}: true with {architecture}.*rows would see each other"):
        attention.settle(small(architecture), settings(**{key: True}), "fp32", "cpu")
    choice, notes = attention.settle(small(architecture), settings(), "fp32", "cpu")
    assert (choice.padding_free, choice.rows, notes) == (False, "rows padded", [])


def test_flash_attention_in_fp32_is_refused(flash, monkeypatch) -> None:
    """Guards against its own error at the first step, hours into a queue."""
    model = small("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(RecipeError, match="flash_attention_2 computes in bf16 or fp16 only"):
        attention.settle(model, settings(attn_implementation="flash_attention_2"), "fp32", "cuda")


def test_attention_that_cannot_train_here_is_refused(tiny, write_recipe) -> None:
    """Guards two tracebacks: a kernel of the hub without its package, which flash_attn's message recommends, and
    flex_attention's first backward pass on a CPU."""
    model = AutoModelForCausalLM.from_config(small("llama").config, attn_implementation="flex_attention")
    with pytest.raises(RecipeError, match="flex_attention has no backward pass on a CPU"):
        attention.settle(model, settings(attn_implementation="flex_attention"), "fp32", "cpu")
    recipe = write_recipe(model_name_or_path=str(tiny), attn_implementation="kernels-community/flash-attn2")
    with pytest.raises(ModelError, match="package of that attn_implementation is not installed") as caught:
        pretrained.load_base(recipe_load.load(str(recipe), []), "fp32")
    assert "pip install 'kernels>=" in caught.value.help


# A machine as Python sees it with an H100, the package `kernels`, and a flash_attn built for another PyTorch.
ON_A_GPU = """
import json, sys
sys.path[:0] = [sys.argv[1], "tests"]
import torch, transformers, peft, kernels, test_attention as here
from stepladder.model import attention
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
for known in (transformers.utils.is_torch_cuda_available, transformers.utils.is_flash_attn_2_available):
    known.cache_clear()

found = []
for at_hand, keys in ((True, {}), (True, {"padding_free": False}), (False, {})):
    kernels.AT_HAND = at_hand
    here.flash_utils._loaded_implementation = None
    model = here.small("llama", "sdpa").bfloat16()
    choice, _ = attention.settle(model, here.settings(**keys), "bf16", "cuda")
    found.append([choice.implementation, choice.rows, choice.padding_free, choice.why, here.contaminated(model)])
print(json.dumps([found, kernels.OFFLINE]))
"""
KERNELS = """
import types
from huggingface_hub import constants
AT_HAND, OFFLINE = True, []
def get_kernel(repo, **how):
    if repo.endswith("flash-attn2"):  # and not what bitsandbytes asks for as it is imported
        OFFLINE.append(constants.HF_HUB_OFFLINE)
    if not AT_HAND:
        raise FileNotFoundError(f"{repo} is not in the cache")
    import test_attention as here
    return types.SimpleNamespace(flash_attn_func=here.whole, flash_attn_varlen_func=here.varlen)
def __getattr__(name):  # what Transformers import of it besides: decorators that change nothing
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *a, **k: None, "__call__": lambda self, given=None, *a, **k: given})
"""


def test_flash_attention_where_it_is_at_hand(tmp_path: Path) -> None:
    """Guards the choice by Transformers' own loader: a broken package is passed over, the hub's kernel is taken from
    the cache while the hub does not answer, and without it SDPA attends row by row; each time with its reason."""
    for name, version, module in (
        ("kernels", "0.18.2", KERNELS),
        ("flash_attn", "2.8.3", 'raise ImportError("undefined symbol: _ZN3c10")'),
    ):
        (tmp_path / f"{name}.py").write_text(module)
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        (info / "top_level.txt").write_text(name)
    file = tmp_path / "on_a_gpu.py"
    file.write_text(ON_A_GPU)
    done = run(sys.executable, "-W", "ignore", file, tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9",
               PYTHONPATH=f"{tmp_path}:src")  # fmt: skip
    assert done.code == 0, done
    found, offline = json.loads(done.out.splitlines()[-1])
    assert offline and all(offline), "the hub did not answer: only its cache is asked"
    taken, padded, without = found
    kernel = "kernels-community/flash-attn2"
    assert taken[:4] == [kernel, "rows end to end", True, "kernels is installed"]
    assert padded[:4] == [kernel, "rows padded", False, "kernels is installed"]
    assert without[:3] == ["sdpa", "rows end to end, each by itself", True]
    assert "undefined symbol" in without[3] and "is not in the cache" in without[3]
    assert all(choice[4] < 0.02 for choice in found)  # bf16 rounds by 0.4 %


def test_a_plan_for_a_gpu_is_of_what_runs_there() -> None:
    """Guards the plan's memory: no mask of pairs, and nothing of the CPU's kernels."""
    values = {"use_peft": True, "lora_target_modules": ["q_proj"], "lora_r": 4, "padding_free": "auto"}
    for gpu, name in ((True, attention.BY_ROW), (False, cpu_kernels.BY_ROW_ON_CPU)):
        config = small("llama", "sdpa").config
        _, base = meta_model.build_meta_model(settings(**values), config, meta_model.Work(2, 8, "bf16", False, gpu=gpu))
        assert base.config._attn_implementation == name


def test_a_run_says_what_it_attends_by(tiny: Path, learnable: Path, write_recipe, tmp_path: Path) -> None:
    """Guards the opening lines and run.json, and that packing's price under a mask is named."""
    keys = {"model_name_or_path": str(tiny), "dataset_name": str(learnable), "max_steps": 1, "max_length": 128,
            "bf16": False, "global_batch_size": 4, "per_device_train_batch_size": 2, "eval_strategy": "no",
            "save_strategy": "no"}  # fmt: skip
    done = script("sft", "--recipe", write_recipe("auto", **keys), "--output_dir", tmp_path / "auto")
    assert done.code == 0 and "attention   sdpa, rows end to end, each by itself" in done.out + done.err, done
    expected = {"implementation": "sdpa", "rows": "rows end to end, each by itself", "flat": True, "why": ""}
    assert manifest(tmp_path / "auto")["attention"] == expected
    recipe = write_recipe("eager", **keys, packing=True, attn_implementation="eager")
    done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / "eager")
    assert done.code == 0, done
    for said in ("eager computes all pairs of a micro-batch's tokens (2 × 128 = 256 at most), 2 times", "by a mask"):
        assert said in done.out + done.err, done
