"""What a model is: written as its card (`README.md`), and read back from a model's cards and configurations."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

from stepladder import files, hardware, installation
from stepladder.console import printable, quote_for_shell
from stepladder.errors import ModelError
from stepladder.manifest import LARGEST, MANIFEST, read_manifest, read_metrics
from stepladder.model import start
from stepladder.model.weights import Weights
from stepladder.settings import TUNERS, VIRTUAL, Settings

README_BYTES = 1 << 22
UNNAMED = "none named"
QUESTION = "How do I track my order?"  # of the example prompt
NEEDED = (
    *("recipe", "totals.steps", "parameters.all", "parameters.trainable", "datasets", "packages", "git_commit"),
    *("global_batch_size", "strategy", "world_size", "precision"),
)  # of a manifest, for the card
BARS = "▁▂▃▄▅▆▇█"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be (vllm/config/lora.py)


def front_matter(folder: Path) -> dict[str, Any]:
    """What the YAML head of a folder's README.md says; empty without one, and for one that is no YAML."""
    try:
        text = files.read_text(folder / "README.md", README_BYTES, errors="replace")
        front = files.parse_yaml(text[4:].split("\n---", 1)[0]) if text.startswith("---\n") else {}
    except ValueError:
        return {}
    return front if isinstance(front, dict) else {}


def training_method(recipe: Settings | dict[str, Any]) -> str:
    """How a recipe trains: full fine-tuning, LoRA, QLoRA, DoRA, prefix or prompt tuning."""
    if not recipe.get("use_peft"):
        return "full fine-tuning"
    if (kind := recipe.get("peft_type") or "lora") != "lora":
        return {**TUNERS, **VIRTUAL}.get(kind, kind)
    kind = "DoRA" if recipe.get("use_dora") else "LoRA"
    return f"Q{kind}" if recipe.get("load_in_4bit") else kind


def read_training(folder: Path) -> tuple[dict[str, Any], list[float]]:
    """A run's manifest and its losses; empty where the folder is no run.

    Raises:
        ModelError: run.json is there, and does not say how a model was trained.
    """
    if not os.path.lexists(folder / MANIFEST):
        return {}, []
    try:
        trained = read_manifest(folder, NEEDED)
        if trained["precision"] not in hardware.DTYPES:
            raise ValueError(f"its precision is {trained['precision']!r}")
        if not all(rows.keys() >= {"name", "rows"} for rows in trained["datasets"]):
            raise ValueError("its datasets have no names or rows")
    except ValueError as error:
        raise ModelError(
            f"{folder / MANIFEST} cannot be used: {error}",
            why="it says how the model was trained, which the result's card repeats",
            help="put it back from a copy, or remove it: the card then says nothing of the training",
        ) from None
    losses = (row["loss"] for _, row in read_metrics(folder) if row and isinstance(row.get("loss"), int | float))
    return trained, [loss for loss in losses if abs(loss) < LARGEST]  # not NaN


def curve(losses: list[float], width: int = 32) -> str:
    """The losses as a row of bars."""
    picked = [losses[i * len(losses) // width] for i in range(width)] if len(losses) > width else losses
    low, high = min(picked), max(picked)
    return "".join(BARS[round((loss - low) / (high - low or 1) * (len(BARS) - 1))] for loss in picked)


def render(
    folder: Path,
    base: str,
    licence: str | None,
    trained: dict[str, Any],
    losses: list[float],
    merged: dict[str, Any] | None,
) -> str:
    """The card's text.

    Args:
        folder: where the model will lie.
        base: the base model, a folder or a hub id.
        licence: the base's, which the result carries on; None where its card names none.
        trained: run.json of the run that trained it; empty where it was trained elsewhere.
        merged: merge.json of a merged model; None for what a run saved.
    """
    is_adapter = not merged and bool(trained) and bool(trained["recipe"].get("use_peft"))
    data = [d["name"] for d in trained.get("datasets", ())][:1]
    front: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["stepladder", "sft"],
    }
    front |= {"license": licence} if licence else {}
    how = training_method(trained["recipe"]) if trained else "An adapter"
    origin = f"{how} of {format_code(base)}{' on ' + ', '.join(map(format_code, data)) if data else ''}"
    cells = {
        name: _line(value).replace("|", "\\|") for name, value in _facts(base, licence, trained, losses, merged).items()
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in cells.items())
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(folder.name)}",
        f"{_line(origin)}{', merged' if merged else ''}, made with Stepladder.",
        f"| | |\n| --- | --- |\n{table}",
        "## Load and serve\n\n" + _fenced("bash", _commands(folder, base, trained, merged, is_adapter)),
    ]
    if trained:
        recipe = yaml.safe_dump(trained["recipe"], sort_keys=False, allow_unicode=True)
        source = Path(merged["adapters"][0]) if merged else folder
        again = (
            f"{installation.command('sft')} --recipe {quote_for_shell(source / 'recipe.yaml')} --output_dir runs/again"
        )
        versions = ", ".join(f"{name} {version}" for name, version in trained["packages"].items())
        parts.append(
            "## Repeat\n\n"
            + _fenced("bash", again + (f"\npython {_line(merged['command'])}" if merged else ""))
            + f"\n\nCommit {trained['git_commit']}; {versions}.\n\n"
            + _fenced("yaml", recipe.rstrip("\n"))
        )
    return "\n\n".join(parts) + "\n"


def _facts(
    base: str, licence: str | None, trained: dict[str, Any], losses: list[float], merged: dict[str, Any] | None
) -> dict[str, str]:
    """The rows of the card's table."""
    rows = {
        "base": format_code(base),
        "licence": _text(licence) if licence else "the base's, which its folder does not name",
    }
    if before := trained.get("starts_from", {}).get("adapter"):
        rows["trained on from"] = f"the adapter {format_code(before)}"
    if trained:
        # the evaluation's data set comes second
        sets = [f"{format_code(d['name'])} ({d['rows']} rows)" for d in trained.get("datasets", ())]
        totals, final, counts = trained["totals"], trained.get("final", {}), trained["parameters"]
        rows |= {
            "data": ", ".join(sets[:1]),
            **({"held out": f"{sets[1]}, not trained on"} if len(sets) > 1 else {}),
            "method": f"{training_method(trained['recipe'])}, {counts['trainable']:,} trainable of "
            f"{counts['all']:,} parameters",
            "training": f"{totals['steps']} steps of {trained['global_batch_size']} sequences, "
            f"{trained['strategy']} on {trained['world_size']} rank(s), {trained['precision']}",
            "last loss": f"{final['loss']:.4f}" if "loss" in final else "unknown",
            "held-out loss": f"{final['eval_loss']:.4f}{_held_out_note(trained)}"
            if "eval_loss" in final
            else "not evaluated",
        }
        if losses:
            rows["curve"] = f"{losses[0]:.3f} {curve(losses)} {losses[-1]:.3f}"
    if merged:
        by = f" by {merged['combination']['type']}" if merged.get("combination") else ""
        rows["merged"] = f"{', '.join(map(format_code, merged['adapters']))}{by} in {merged['dtype']}, {_proof(merged)}"
        if choice := merged["quantized_base"]:
            rows["merged into"] = f"the {choice} weights of a base that was in 4 bits during training (docs/merge.md)"
        rows |= {"note": "; ".join(merged["remarks"])} if merged.get("remarks") else {}
    return rows


def _held_out_note(trained: dict[str, Any]) -> str:
    """What a reader must know of the rows behind the held-out loss: trained on too, or of other data."""
    rows = trained.get("held_out", {})
    count = rows.get("trained_on")
    note = f" ({count:,} of its {rows['rows']:,} rows are trained on too)" if count else ""
    return note + (f" on `{rows['foreign']}`, which came with other data" if rows.get("foreign") else "")


def _proof(merged: dict[str, Any]) -> str:
    proof = merged["proof"]
    if not proof:
        return "**unverified**: nothing compared it with base and adapter"
    return (
        f"proved: {proof['changed']} of {proof['tensors']} tensors changed, logits off by {proof['exact']['max']:.1e} "
        f"before rounding and {proof['written']['mean']:.1e} in the mean after (the adapter moves them by "
        f"{proof['adapter_moves']['mean']:.1e})"
    )


def _line(text: object) -> str:
    """Text of any origin on one line."""
    return printable(str(text)).replace("\n", " ")


def _text(text: object) -> str:
    return _line(text).replace("<", "&lt;")


def format_code(text: object) -> str:
    """A name as Markdown's code, between more backticks than it holds in a row: nothing in it is Markdown or HTML."""
    line = _line(text)
    marks = "`" * (_backticks(line) + 1)
    return f"{marks} {line} {marks}" if "`" in line else f"`{line}`"


def _fenced(kind: str, text: str) -> str:
    """A block of code that nothing in it ends."""
    marks = "`" * max(3, _backticks(text) + 1)
    return f"{marks}{kind}\n{text}\n{marks}"


def _backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _commands(folder: Path, base: str, trained: dict[str, Any], merged: dict[str, Any] | None, is_adapter: bool) -> str:
    here = quote_for_shell(folder)
    ask = f'{installation.command("generate")} --model {here} --prompt "…"'
    if not is_adapter:
        lines = [ask, f"transformers serve {here}", f"vllm serve {here}"]
        if merged and (file := merged.get("gguf")):
            lines.append(f"llama-server -m {quote_for_shell(folder / file['file'])}")
        elif merged:
            lines.append(f"# for llama.cpp: the same {installation.command('merge')} command with --gguf q8_0")
        else:
            lines += [
                "# GGUF, for llama.cpp: its converter is in its repository only",
                "git clone https://github.com/ggml-org/llama.cpp && pip install -r llama.cpp/requirements.txt",
                f"python llama.cpp/convert_hf_to_gguf.py {here} "
                f"--outfile {quote_for_shell(folder / f'{folder.name}.gguf')} --outtype bf16",
            ]
        if merged and merged.get("ollama"):
            lines.append(f"ollama create {quote_for_shell(folder.name)} -f {quote_for_shell(folder / 'Modelfile')}")
        return "\n".join(lines)
    if (kind := trained["recipe"].get("peft_type", "lora")) in VIRTUAL:
        return ask
    merge_it = start.merge_command(folder, trained["recipe"])
    served = f"# vLLM does not serve {TUNERS[kind]} beside its base; merged, it does" if kind in TUNERS else ""
    vllm = served or _vllm(folder, base)
    return f"{ask}\n{vllm}\n{merge_it} && transformers serve {quote_for_shell(f'merged/{folder.name}')}"


def _vllm(folder: Path, base: str) -> str:
    """How vLLM serves the adapter in this folder beside its base, or why it cannot."""
    file = folder / "adapter_config.json"
    config = files.read_object(file) if file.is_file() else {}
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    refused = {  # vllm/lora/peft_helper.py; it takes one scale for all modules without a word
        "DoRA": config.get("use_dora"),
        "modules_to_save": config.get("modules_to_save"),
        "trained tokens": config.get("trainable_token_indices"),
        "trained biases": config.get("lora_bias") or config.get("bias", "none") != "none",
        "a rank or alpha of its own for some modules": config.get("rank_pattern") or config.get("alpha_pattern"),
        f"rank {rank}, above {VLLM_RANKS[-1]}": rank > VLLM_RANKS[-1],
    }
    if reasons := [name for name, value in refused.items() if value]:
        return f"# vLLM does not serve this adapter beside its base ({', '.join(reasons)}); merged, it does"
    limit = next(limit for limit in VLLM_RANKS if limit >= rank)
    return (
        f"vllm serve {quote_for_shell(base)} --enable-lora --max-lora-rank {limit} "
        f"--lora-modules {quote_for_shell(f'{folder.name}={folder}')}"
    )


# ---- read back ----


def describe(name: str) -> dict[str, str]:
    """Facts by their names, as inspect_model.py prints them; `none named` where no file has one.

    Args:
        name: a folder or a hub id.

    Raises:
        ModelError: there is no such model, or one of its files is damaged.
    """
    from stepladder.data import render, templates
    from stepladder.model import pretrained

    folder = pretrained.find_folder(name, small_files_only=True)
    adapter, config = _read_object(folder / "adapter_config.json"), _read_object(folder / "config.json")
    merged, (trained, _), front = _read_object(folder / "merge.json"), read_training(folder), front_matter(folder)
    if merged and not trained:
        adapters = merged.get("adapters")
        if not (isinstance(adapters, list) and adapters and isinstance(adapters[0], str) and merged.get("status")):
            raise ModelError(f"{folder / 'merge.json'} does not hold what a merge writes", help="merge again")
        trained, _ = read_training(Path(adapters[0]))
    tokenizer = pretrained.load_tokenizer(str(folder))
    has_template = tokenizer.chat_template is not None
    conversation = {"messages": [{"role": "user", "content": QUESTION}]}
    return {
        "name": name,
        "base model": adapter.get("base_model_name_or_path") or front.get("base_model") or UNNAMED,
        "task": front.get("pipeline_tag") or _task(adapter, config),
        "data set": ", ".join(f"{d['name']} ({d['rows']} rows)" for d in trained.get("datasets", ())[:1])
        or _join(front.get("datasets"))
        or UNNAMED,
        "method": _method(adapter, merged, trained, config),
        "size": _size(folder, "adapter_model.safetensors" if adapter else "model.safetensors"),
        "template": templates.name_of(tokenizer.chat_template),
        "licence": front.get("license") or UNNAMED,
        "example prompt": render.prompt_text(conversation, tokenizer) if has_template else QUESTION,
    }


def _read_object(file: Path) -> dict[str, Any]:
    try:
        return files.read_object(file) if file.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{file} cannot be used: {error}") from None


def _join(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _task(adapter: dict[str, Any], config: dict[str, Any]) -> str:
    architectures = config.get("architectures")
    names = [adapter.get("task_type"), *(architectures if isinstance(architectures, list) else ())]
    names = [name for name in names if isinstance(name, str)]
    causal = any(name.endswith(("CausalLM", "LMHeadModel")) or name == "CAUSAL_LM" for name in names)
    return "text-generation" if causal else _join(names) or UNNAMED


def _method(adapter: dict[str, Any], merged: dict[str, Any], trained: dict[str, Any], config: dict[str, Any]) -> str:
    method = training_method(trained["recipe"]) if trained else ""
    if adapter:
        kind = "DoRA" if adapter.get("use_dora") else adapter.get("peft_type", "an adapter")
        rank = f", r {adapter.get('r')}, alpha {adapter['lora_alpha']}" if "lora_alpha" in adapter else ""
        return f"{method or kind}{rank}"
    if merged:
        return f"{method or 'an adapter'}, merged ({merged['status']})"
    return method or f"{config.get('model_type', 'unknown')}, nothing says how it was trained"


def _size(folder: Path, single: str) -> str:
    try:
        tensors = Weights(folder, single).tensors.values()
    except ModelError:
        return "the weights are not here"
    return f"{sum(math.prod(t.shape) for t in tensors):,} parameters, {sum(t.bytes for t in tensors) / 1e6:,.1f} MB"
