"""Rules of the model and the method: adapters, quantization, and how the base is held."""

from __future__ import annotations

import re

from stepladder.errors import suggest
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.ruling import RuleBreak, conflict, idle, rule, shown

QUANTIZATION = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
ATTENTION = ("auto", "sdpa", "eager", *(f"flash_attention_{n}" for n in (2, 3, 4)), "flex_attention")
VIRTUAL_TOKENS = ("num_virtual_tokens", "virtual_tokens_text")
# Keys of a block in model_init_kwargs that the recipe has at its top, by which name.
OWN_KEY = {
    **{"attn_implementation": "attn_implementation", "dtype": "dtype", "torch_dtype": "dtype"},
    **{"quantization_config": "load_in_4bit", "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit"},
    **{"revision": "model_revision", "trust_remote_code": "trust_remote_code"},
    "use_safetensors": "",  # always true
}


@rule
def attention_is_a_kernel_that_trains(recipe: Recipe) -> RuleBreak | None:
    """It is one of Transformers' kernels or a repository of kernels on the hub; the `paged` ones are for generation."""
    key = "attn_implementation"
    named = recipe.get(key)
    if named is None or named in ATTENTION or re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?", named):
        return None
    help = suggest(named, ATTENTION) or f"one of {', '.join(ATTENTION)}"
    return conflict(recipe, f"{key}: there is no '{named}' to train with", [key], help)


@rule
def adapter_keys_need_an_adapter(recipe: Recipe) -> RuleBreak | None:
    """They shape an adapter, and without use_peft there is none: every weight is trained."""
    keys = [*_of_lora(recipe), "peft_type", *VIRTUAL_TOKENS]
    return None if recipe.get("use_peft") else idle(recipe, "use_peft", keys, "use_peft: true")


@rule
def each_adapter_has_its_own_keys(recipe: Recipe) -> RuleBreak | None:
    """LoRA has matrices of a rank, prefix and prompt tuning have virtual tokens."""
    lora = recipe.get("peft_type") == "lora"
    help = "peft_type: prefix (or prompt)" if lora else "peft_type: lora"
    return idle(recipe, "peft_type", VIRTUAL_TOKENS if lora else _of_lora(recipe), help)


@rule
def target_modules_are_names_or_one_pattern(recipe: Recipe) -> RuleBreak | None:
    """PEFT takes a list of module names, the word all-linear, or one regular expression over whole module names."""
    key = "lora_target_modules"
    modules = recipe.get(key) or []
    others = [name for name in modules if not name.replace(".", "_").isidentifier()]
    if len(modules) > 1 and others:
        what = f"{key}: '{others[0]}' is no module name, and stands in a list"
        return conflict(recipe, what, [key], f"{key}: '{others[0]}' alone, or names only")
    try:
        re.compile(others[0] if others else "")
    except (re.error, OverflowError, RecursionError) as error:
        what = f"{key}: '{others[0]}' is no regular expression: {error}"
        return conflict(recipe, what, [key], f"{key}: '.*\\.(q|v)_proj', or a list of names")
    return None


@rule
def virtual_tokens_stand_before_each_row(recipe: Recipe) -> RuleBreak | None:
    """Virtual tokens come before a sequence, and rows laid end to end are one: only the first would see them."""
    for key in ("packing", "eval_packing", "padding_free"):
        if recipe.get("use_peft") and recipe.get("peft_type") != "lora" and recipe.get(key) is True:
            what = f"{key}: true with {shown(recipe, 'peft_type')}"
            return conflict(recipe, what, ["peft_type", key], f"{key}: false", at=key)
    return None


@rule
def a_prefix_is_a_cache(recipe: Recipe) -> RuleBreak | None:
    """PEFT gives the model a prefix as cached keys and values, which checkpointing's second forward would grow."""
    newer = recipe.get("activation_checkpointing") is not None
    key = "activation_checkpointing" if newer else "gradient_checkpointing"
    if recipe.get("use_peft") and recipe.get("peft_type") == "prefix" and recipe.get(key):
        what = f"{shown(recipe, key)} with peft_type: prefix"
        return conflict(recipe, what, ["peft_type", key], f"{key}: false, or peft_type: prompt")
    return None


def _of_lora(recipe: Recipe) -> list[str]:
    return [key for key in recipe.values if key.startswith("lora_") or key in ("use_rslora", "use_dora")]


@rule
def quantization_keys_need_4_bits(recipe: Recipe) -> RuleBreak | None:
    """They say how the base is held in 4 bits."""
    return None if recipe.get("load_in_4bit") else idle(recipe, "load_in_4bit", QUANTIZATION, "load_in_4bit: true")


@rule
def one_quantization(recipe: Recipe) -> RuleBreak | None:
    """The base is held in one format."""
    keys = ["load_in_8bit", "load_in_4bit"]
    if all(recipe.get(key) for key in keys):
        return conflict(recipe, "load_in_4bit and load_in_8bit are both true", keys, "remove one")
    return None


@rule
def quantized_base_needs_an_adapter(recipe: Recipe) -> RuleBreak | None:
    """Only an adapter can be trained on a quantized base: its own weights are frozen."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if recipe.get(key) and not recipe.get("use_peft"):
            return conflict(recipe, f"{key}: true without use_peft: true", ["use_peft", key], "use_peft: true", at=key)
    return None


@rule
def dtype_of_a_quantized_base(recipe: Recipe) -> RuleBreak | None:
    """What is not quantized is held in the precision that training computes in, which bf16 and fp16 decide."""
    bf16, fp16 = recipe.get("bf16"), recipe.get("fp16")
    precision = "bfloat16" if bf16 is True else "float16" if fp16 else "float32" if bf16 is False else "auto"
    if recipe.get("dtype") == precision != "auto":
        return None  # it says what happens anyway
    for key in ("load_in_4bit", "load_in_8bit"):
        if recipe.get(key):
            return idle(recipe, key, ["dtype"], "bf16: true for bfloat16, fp16: true for float16")
    return None


@rule
def model_init_kwargs_repeat_no_key(recipe: Recipe) -> RuleBreak | None:
    """What the recipe has a key of its own for is said there, once."""
    for name in (name for name in recipe.get("model_init_kwargs") or {} if name in OWN_KEY):
        at = f"model_init_kwargs.{name}"
        help = f"{OWN_KEY[name]}: …" if OWN_KEY[name] else "remove it: weights are read from safetensors only"
        return conflict(recipe, f"{at} cannot be used", ["model_init_kwargs"], help, at=at)
    return None
