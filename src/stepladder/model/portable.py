"""A saved model's small files in the words of older programs, too: Transformers 4, vLLM, Ollama, llama.cpp.

Transformers 5 writes rotary embeddings as `rope_parameters`, tokenizers as `TokenizersBackend` and
weights' types as `dtype`. What does not know these names takes its own defaults without a word, and
computes another model. The older names stand beside the newer ones; both read them alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.files import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Model types whose older configuration had names of its own for theta and for the part that rotates.
ROPE_NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
# Two rotary embeddings in one model, of which the older names scale the first only: where theta stands for
# layers that attend to all, and for those that attend to a window.
TWO_ROPES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "olmo3": ("rope_theta", "rope_theta"),
}
# What Transformers 5 keeps among the rope parameters, and older programs do not look for in `rope_scaling`.
BESIDE = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
PROBE = " It's 12,345 items:\n\n  déjà vu, 北京, 🎉; don't\t{'a': 1}"  # where tokenizers differ, if they do
THIS_MACHINE = ("is_local", "local_files_only", "backend")  # of the tokenizer's folder here, or of Transformers 5 only


def add_older_names(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Add the older names to the config and the tokenizer's config of a model or adapter folder.

    A file that Transformers reads otherwise with them stays as it was.

    Args:
        tokenizer: the one that was saved there.

    Returns:
        What older programs cannot be told, one sentence each; empty where they can be told all.
    """
    return _add_to_config(folder / "config.json") + _add_to_tokenizer(folder / "tokenizer_config.json", tokenizer)


def _write(file: Path, facts: dict[str, Any]) -> None:
    write_atomic(file, json.dumps(facts, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


# ---- config.json ----


def _add_to_config(file: Path) -> list[str]:
    if not file.is_file():
        return []  # an adapter's folder
    text = file.read_text(encoding="utf-8")
    facts, remarks = json.loads(text), []
    own_code = "auto_map" in facts  # which Transformers would ask about before it reads them
    before = None if own_code else _ropes(file.parent)
    for config in _config_and_parts(facts):
        if "dtype" in config:
            config["torch_dtype"] = config["dtype"]
        if config.get("rope_parameters"):
            remarks += [remark] if (remark := _older_rope(config)) else []
    if facts.get("use_cache") is False:  # it is off in training only
        facts["use_cache"] = True
    _write(file, facts)
    if not own_code and _ropes(file.parent) != before:
        write_atomic(file, text)
        return [_unknown(facts["model_type"], "has rope_parameters")]
    return remarks


def _config_and_parts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration and those of its parts, as of a model that sees and reads."""
    inner = [value for key, value in facts.items() if key.endswith("_config") and isinstance(value, dict)]
    return [facts, *(config for value in inner for config in _config_and_parts(value))]


def _ropes(folder: Path) -> list[Any]:
    """What each part of the model rotates by, as Transformers reads it; `type` is an older name of `rope_type`."""
    from transformers import AutoConfig

    def plain(rope: Any) -> Any:
        return {k: plain(v) for k, v in rope.items() if k != "type"} if isinstance(rope, dict) else rope

    facts = AutoConfig.from_pretrained(folder).to_dict()
    return [plain(config.get("rope_parameters")) for config in _config_and_parts(facts)]


def _older_rope(config: dict[str, Any]) -> str | None:
    """Add the older names of `rope_parameters`; returns why they cannot say it where they cannot."""
    kind, ropes = config.get("model_type", ""), config["rope_parameters"]
    if any(isinstance(value, dict) for value in ropes.values()):
        full, sliding = ropes.get("full_attention"), ropes.get("sliding_attention")
        if kind not in TWO_ROPES or not full or not sliding or _older_scaling(sliding):
            return _unknown(kind, "has several rotary embeddings")
        of_full, of_sliding = TWO_ROPES[kind]
        if of_full == of_sliding and full["rope_theta"] != sliding["rope_theta"]:
            return _unknown(kind, "rotates by two thetas")
        config |= {of_full: full["rope_theta"], of_sliding: sliding["rope_theta"]}
        config |= {"rope_scaling": _older_scaling(full)} if _older_scaling(full) else {}
        return None
    theta, part = ROPE_NAMES.get(kind, ("rope_theta", "partial_rotary_factor"))
    config[theta] = ropes["rope_theta"]
    if "partial_rotary_factor" in ropes:
        config[part] = ropes["partial_rotary_factor"]
    scaling = _older_scaling(ropes)
    if not scaling:
        return None
    if scaling["rope_type"] == "longrope":
        # Older programs look for the length of the first training outside, and take the factor from it.
        first, longest = ropes.get("original_max_position_embeddings"), config.get("max_position_embeddings")
        if first:
            config["original_max_position_embeddings"] = first
        if kind in ("phi3", "phi4_multimodal"):  # of exactly these three
            scaling = {"type": "longrope", **{k: ropes[k] for k in ("short_factor", "long_factor")}}
        factor = ropes.get("factor")
        if ropes.get("attention_factor") and "attention_factor" not in scaling:
            return _unknown(kind, "has an attention_factor")
        if first and longest and factor and abs(factor - longest / first) > 1e-6:
            return _unknown(kind, f"has factor {factor}, and lengths of {longest:,} and {first:,}")
    config["rope_scaling"] = scaling
    return None


def _older_scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling` of one embedding; empty where it is not scaled."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    return {"rope_type": kind, **{key: value for key, value in rope.items() if key not in BESIDE}}


def _unknown(kind: str, why: str) -> str:
    return f"this {kind} needs Transformers 5 or newer: it {why}, which older configurations cannot say"


# ---- tokenizer_config.json ----


def _add_to_tokenizer(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Have tokenizer.json read as it stands, by a class that Transformers 4 and 5 know.

    Transformers 4's classes of one model (LlamaTokenizerFast, …) add tokens of their own accord, whatever
    tokenizer.json says; its general class has defaults that are not those of Transformers 5.
    """
    from transformers import PreTrainedTokenizerFast

    if not file.is_file() or not (file.parent / "tokenizer.json").is_file():
        return []
    text = file.read_text(encoding="utf-8")
    facts = json.loads(text)
    if "auto_map" in facts:
        return []  # a class of its own, which reads the file itself
    facts["tokenizer_class"] = "PreTrainedTokenizerFast"
    facts["model_input_names"] = list(tokenizer.model_input_names)
    facts["clean_up_tokenization_spaces"] = bool(tokenizer.clean_up_tokenization_spaces)
    if isinstance(facts.get("extra_special_tokens"), list):  # a table of names in Transformers 4, which fails at a list
        facts["additional_special_tokens"] = facts.pop("extra_special_tokens")
    for key in THIS_MACHINE:
        facts.pop(key, None)
    _write(file, facts)
    # Not AutoTokenizer, which would ask about a model's own code.
    if PreTrainedTokenizerFast.from_pretrained(file.parent)(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        write_atomic(file, text)
        return [f"this tokenizer is read right by its {json.loads(text).get('tokenizer_class')} of Transformers 5 only"]
    return []
