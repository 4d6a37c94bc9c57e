"""What a model is, by the files that lie with it: its base, task, data, method, size and template."""

from __future__ import annotations

import math
from pathlib import Path

from stepladder import errors, files
from stepladder.model import card
from stepladder.model.merge import weights

QUESTION = "How do I track my order?"


def describe(name: str) -> dict[str, str]:
    """Facts by their names, as inspect_model.py prints them; `none named` where no file has one.

    Args:
        name: a folder or a hub id.

    Raises:
        ModelError: there is no such model, or one of its files is damaged.
    """
    from stepladder.data import render, templates
    from stepladder.model import load

    folder = load.folder_of(name, small_files_only=True)
    adapter, config = _json(folder / "adapter_config.json"), _json(folder / "config.json")
    merged, (trained, _) = _json(folder / "merge.json"), card.read(folder)
    front = card.front_matter(folder)
    if merged and not trained:
        trained, _ = card.read(_adapter(folder, merged))
    tokenizer = load.tokenizer_of(str(folder))
    asked = [{"role": "user", "content": QUESTION}]
    has = tokenizer.chat_template is not None
    prompt = render.prompt_text({"messages": asked}, tokenizer) if has else QUESTION
    return {
        "name": name,
        "base model": adapter.get("base_model_name_or_path") or front.get("base_model") or "none named",
        "task": front.get("pipeline_tag") or _task(adapter, config),
        "data set": ", ".join(f"{d['name']} ({d['rows']} rows)" for d in trained.get("datasets", ())[:1])
        or _listed(front.get("datasets"))
        or "none named",
        "method": _method(adapter, merged, trained, config),
        "size": _size(folder, adapter),
        "template": templates.name_of(tokenizer.chat_template),
        "licence": front.get("license") or "none named",
        "example prompt": prompt,
    }


def _json(file: Path) -> dict:
    try:
        return files.read_object(file) if file.is_file() else {}
    except ValueError as error:
        raise errors.ModelError(f"{file} cannot be used: {error}") from None


def _adapter(folder: Path, merged: dict) -> Path:
    adapters = merged.get("adapters")
    if not (isinstance(adapters, list) and adapters and isinstance(adapters[0], str) and merged.get("status")):
        raise errors.ModelError(f"{folder / 'merge.json'} does not hold what merge.py writes", help="merge again")
    return Path(adapters[0])


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _task(adapter: dict, config: dict) -> str:
    architectures = config.get("architectures")
    named = [adapter.get("task_type"), *(architectures if isinstance(architectures, list) else ())]
    named = [name for name in named if isinstance(name, str)]
    causal = any(name.endswith(("CausalLM", "LMHeadModel")) or name == "CAUSAL_LM" for name in named)
    return "text-generation" if causal else _listed(named) or "none named"


def _method(adapter: dict, merged: dict, trained: dict, config: dict) -> str:
    if adapter:
        kind = "DoRA" if adapter.get("use_dora") else adapter.get("peft_type", "an adapter")
        rank = f", r {adapter.get('r')}, alpha {adapter['lora_alpha']}" if "lora_alpha" in adapter else ""
        return f"{card.method(trained) if trained else kind}{rank}"
    if merged:
        how = card.method(trained) if trained else "an adapter"
        return f"{how}, merged ({merged['status']})"
    return (
        card.method(trained) if trained else f"{config.get('model_type', 'unknown')}, nothing says how it was trained"
    )


def _size(folder: Path, adapter: dict) -> str:
    try:
        disk = weights.Weights(folder, single="adapter_model.safetensors" if adapter else "model.safetensors")
    except errors.ModelError:
        return "the weights are not here"
    found = disk.tensors.values()
    return f"{sum(math.prod(t.shape) for t in found):,} parameters, {sum(t.bytes for t in found) / 1e6:,.1f} MB"
