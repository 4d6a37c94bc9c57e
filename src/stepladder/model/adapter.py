"""Adapters: made from a recipe, and checked when they are saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder.errors import ModelError
from stepladder.model import virtual_tokens
from stepladder.settings import Settings
from stepladder.suggest import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def attach(
    model: PreTrainedModel,
    recipe: Settings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Sequence[str] = (),
    fused: bool = False,
) -> PreTrainedModel:
    """Wrap the model in the adapter that the recipe asks for; without `use_peft` it stays as it is.

    The adapter is in fp32 whatever the base: in bf16, small updates would round to nothing.

    Args:
        tokenizer: for the text that virtual tokens begin as; without it (a plan's model) they begin anyhow.
        new_tokens: tokens that a template added to the vocabulary.
        fused: LoRA's linear layers are those of `fused_lora`, which read the adapter's weights past the
            modules where ZeRO-3 and FSDP gather them: only where each rank holds them all. `torch_compile` fuses
            PEFT's own, and cannot read these.

    Raises:
        ModelError: a module or parameter that the recipe names does not exist in this model, or there are new
            tokens: TRL's fused output layer reads the plain weight (`add_fused_lm_head`), so PEFT's wrapped one,
            which would train their embeddings, cannot stand in its place.
    """
    if not recipe.get("use_peft"):
        return model
    if new_tokens:
        raise ModelError(
            f"the chat template adds {', '.join(new_tokens)} to the vocabulary, and an adapter cannot learn new tokens",
            where=recipe.where("chat_template"),
            why="their embeddings would stay as random as they begin",
            way_out="use_peft: false, or a template without new tokens: zephyr, mistral or a prompt_template",
        )
    import torch
    from peft import LoraConfig, get_peft_model

    if recipe.get("peft_type") != "lora":
        wrapped = get_peft_model(model, virtual_tokens.config(recipe))
        if tokenizer:
            virtual_tokens.begin(wrapped, tokenizer, recipe.get("virtual_tokens_text"))
        return wrapped
    config = LoraConfig(
        r=recipe.get("lora_r"),
        lora_alpha=recipe.get("lora_alpha"),
        lora_dropout=recipe.get("lora_dropout"),
        target_modules=targets(recipe),
        target_parameters=recipe.get("lora_target_parameters"),
        modules_to_save=recipe.get("lora_modules_to_save"),
        use_rslora=recipe.get("use_rslora"),
        use_dora=recipe.get("use_dora"),
        bias="none",
        task_type=recipe.get("lora_task_type"),
    )
    quantized = recipe.get("load_in_4bit") or recipe.get("load_in_8bit")  # those are linear layers, too
    if fused and not quantized and not recipe.get("torch_compile"):
        from stepladder.model.fused_lora import FusedLinear

        config._register_custom_module({torch.nn.Linear: FusedLinear})
    names = [name for name, _ in model.named_modules()]
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "Linear" in type(m).__name__})
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise _does_not_fit(recipe, str(error).splitlines()[0], linear, names) from None
    _check_names(wrapped, recipe, linear, names)
    return wrapped


def _does_not_fit(recipe: Settings, fault: str, linear: list[str], names: list[str]) -> ModelError:
    """The adapter does not fit; a pattern is explained by a name that it would have to match."""
    pattern = pattern_of(recipe.get("lora_target_modules"))
    layer = next((name for name in names if name.endswith(f".{linear[0]}")), names[-1]) if linear else names[-1]
    return ModelError(
        f"the adapter does not fit the model: {fault}",
        where=recipe.where("lora_target_modules"),
        why=f"'{pattern}' is a regular expression that must match a whole module name, such as {layer}"
        if pattern
        else "",
        way_out=f"lora_target_modules: all-linear, or some of {', '.join(linear)}",
    )


def _check_names(wrapped: PreTrainedModel, recipe: Settings, linear: list[str], names: list[str]) -> None:
    """Raise ModelError for a name that matched nothing: PEFT is content where one name of a list does."""
    config = wrapped.peft_config["default"]
    modules, parameters = wrapped.base_model.targeted_module_names, wrapped.base_model.targeted_parameter_names
    # The configuration's own names: PEFT replaces those of experts that Transformers holds fused.
    targeted = config.target_modules if isinstance(config.target_modules, (list, set)) else ()
    for key, wanted, found in (
        ("lora_target_modules", targeted, modules),
        ("lora_target_parameters", config.target_parameters or (), parameters),
        ("lora_modules_to_save", config.modules_to_save or (), names),
    ):
        missing = sorted(name for name in wanted if not any(f".{full}".endswith(f".{name}") for full in found))
        if missing and recipe.get(key):
            raise ModelError(
                f"{key}: the model has no {', '.join(missing)}",
                where=recipe.where(key),
                why="without them a smaller adapter would be trained than the recipe says",
                way_out=suggest(missing[0], linear) or "remove it",
            )


def hold_as_computed(model: PreTrainedModel, precision: str) -> None:
    """Hold the frozen linear layers in bf16 or fp16 where autocast would round them to it at each use.

    The products are the same to the bit, in half the memory, and rounded once: autocast keeps its copies of
    trained weights only. Embeddings, norms and what the output layer shares with them compute in fp32 and stay so.
    For one process and DDP: ZeRO and FSDP hold what they compute with themselves.
    """
    import torch

    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    adapted = getattr(model, "peft_config", {}).values()
    if low is None or any(getattr(config, "use_dora", False) for config in adapted):  # DoRA takes norms of them
        return
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if type(module) is torch.nn.Linear and id(module.weight) not in looked_up:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and parameter.dtype == torch.float32:
                    parameter.data = parameter.data.to(low)


def targets(recipe: Settings) -> str | list[str] | None:
    """`lora_target_modules` as PEFT takes it: names as a list, `all-linear` and a regular expression as text."""
    modules = recipe.get("lora_target_modules")
    if modules and len(modules) == 1 and modules[0].lower() == "all-linear":
        return "all-linear"
    return pattern_of(modules) or modules


def pattern_of(modules: list[str] | None) -> str:
    """The regular expression that stands in place of names, or nothing: a single text that is no dotted name."""
    single = modules[0] if modules and len(modules) == 1 else ""
    return "" if single.lower() == "all-linear" or single.replace(".", "_").isidentifier() else single


def check_saved(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless the adapter in `folder` holds exactly the trained tensors, finite and learned.

    Args:
        folder: where it was saved.
        expected: the shape of each tensor by its name in the file.

    Sharded strategies have saved empty adapters without a word (trl#4416, peft#2450).
    """
    import torch
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"no adapter was saved in {folder}")
    matrices: list[bool] = []  # for each B matrix, which begins as zeros: has it learned?
    with safe_open(file, framework="pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        if shapes != expected:
            missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
            wrong = sorted(n for n in shapes.keys() & expected.keys() if shapes[n] != expected[n])
            raise ModelError(
                f"the saved adapter is not the one that was trained: {len(shapes)} tensors, expected {len(expected)}",
                where=str(file),
                why="; ".join(
                    f"{label}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
                    for label, names in (
                        ("missing", missing),
                        ("unexpected", extra),
                        ("of another shape", wrong),
                    )
                    if names
                ),
            )
        for name in shapes:
            tensor = tensors.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise ModelError(f"the saved adapter holds numbers that are not finite, in {name}", where=str(file))
            if "lora_B" in name:
                matrices.append(bool(tensor.any()))
    if matrices and not any(matrices):
        raise ModelError(
            "every B matrix of the saved adapter is zero: nothing was learned",
            where=str(file),
            why="B begins as zeros, and only a step with a learning rate above 0 changes it",
            way_out="train more steps: under warmup_steps the first has a rate of 0 (`learning_rate` in metrics.jsonl)",
        )
