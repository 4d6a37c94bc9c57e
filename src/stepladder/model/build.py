"""The changes to a loaded model before it trains, in the one order that they may come in; most of all its adapter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import hardware
from stepladder.data.special_tokens import NewToken
from stepladder.errors import ModelError, first_line
from stepladder.model import fp8, initial_factors, module_patterns, peft_methods, start
from stepladder.model.new_tokens import check_trainable, finish_rows, token_indices
from stepladder.model.pretrained import fit_embeddings
from stepladder.model.start import ADAPTER, ADAPTER_CONFIG
from stepladder.model.weights import differences, read_adapter
from stepladder.settings import TUNERS, VIRTUAL, Settings
from stepladder.suggest import suggest

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stepladder.model.attention import Choice

# What PEFT raises for a configuration that was written by hand, or for another model.
FAULTS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, re.error)


@dataclass(frozen=True)
class Built:
    """A model with its adapter, how it attends, and notes for the run's opening lines."""

    model: PreTrainedModel
    attention: Choice
    notes: list[str]


def build(
    base: PreTrainedModel,
    recipe: Settings,
    precision: str,
    attend: Callable[[PreTrainedModel], tuple[Choice, list[str]]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Sequence[NewToken] = (),
    sharded: bool = False,
    on_cpu: bool = False,
) -> Built:
    """Make a loaded base the model that trains: embeddings, attention, adapter, and the precision of held weights.

    Embeddings come before the adapter, which would wrap the smaller ones. Attention comes before it too, since it is
    chosen by the base's layers. Weights are held in the precision of the products last, since only then is known
    which of them are frozen. What is made for CPUs follows TRL's fused output layer, which the trainer adds
    (`cpu_kernels.speed_up`).

    Args:
        attend: `attention.settle` with all but the model.
        tokenizer: of the run; None in a plan, which knows neither added tokens nor an adapter's weights.
        new_tokens: tokens that the recipe or its template added to the vocabulary.
        sharded: whether the strategy itself holds what is computed with (ZeRO, FSDP).
        on_cpu: whether it computes there, where LoRA's layers are those of `cpu_kernels`.

    Raises:
        ModelError, RecipeError: as `attend` and `attach_adapter`.
    """
    notes: list[str] = []
    if tokenizer is not None and (ends := fit_embeddings(base, tokenizer, new_tokens)):
        notes.append(f"an answer ends at {' or '.join(ends)} too: so the chat template or the tokenizer has it")
    choice, costs = attend(base)
    projected = recipe.get("optim_target_modules") or []  # Transformers matches a list's entries, too
    for expression in [projected] if isinstance(projected, str) else projected:
        key = "optim_target_modules"
        module_patterns.match_in_time(expression, [name for name, _ in base.named_modules()], key, recipe.where(key))
    if recipe.get("fp8") and tokenizer is not None:  # a plan's model is traced in bf16
        fp8.convert(base, recipe)
    model = attach_adapter(base, recipe, tokenizer, new_tokens, fused=on_cpu and not sharded)
    if not sharded:
        hold_as_computed(model, precision)
    return Built(model, choice, notes + costs)


def attach_adapter(
    model: PreTrainedModel,
    recipe: Settings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Sequence[NewToken] = (),
    fused: bool = False,
) -> PreTrainedModel:
    """Wrap the model in the adapter that the recipe asks for, or that it starts from; without `use_peft` it stays.

    The adapter is in fp32 whatever the base: in bf16, small updates would round to nothing.

    Args:
        tokenizer: for the text that virtual tokens begin as; without it (a plan's model) they begin anyhow, and the
            weights of an adapter that is trained on are not read.
        new_tokens: tokens that were added to the vocabulary, whose rows of the embeddings are trained too.
        fused: LoRA's linear layers are those of `cpu_kernels`, which read the adapter's weights past the
            modules where ZeRO-3 and FSDP gather them: only where each rank holds them all. `torch_compile` fuses
            PEFT's own, and cannot read these.

    Raises:
        ModelError: a module or parameter that the recipe names does not exist in this model, an adapter does not fit
            it, or it cannot train the new tokens.
    """
    if not recipe.get("use_peft"):
        return model
    source = start.resolve_recipe_model(recipe)
    if new_tokens:
        check_trainable(model, recipe, source, new_tokens)
    if recipe.get("peft_type") in VIRTUAL:
        return _attach_virtual_tokens(model, recipe, tokenizer)
    is_tuner = recipe.get("peft_type") in TUNERS
    names = [name for name, _ in model.named_modules()]
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "Linear" in type(m).__name__})
    try:
        config = peft_methods.tuner_config(recipe) if is_tuner else _lora_config(source, recipe, model, fused)
    except ValueError as error:  # fields of the recipe that contradict each other
        raise _does_not_fit(recipe, first_line(error), linear, names) from None
    if new_tokens:
        config.trainable_token_indices = token_indices(model, [token.row for token in new_tokens])
    module_patterns.check(config, names, lambda field: peft_methods.place(recipe, source, field))
    if source.adapter and tokenizer is None:  # a plan's model has few of the layers
        config.layers_to_transform = config.layers_pattern = None
    try:
        wrapped = initial_factors.wrap(model, config)
    except FAULTS as error:
        if source.adapter:
            raise _misfit(source, str(error)) from None
        if not isinstance(error, ValueError) and not is_tuner:
            raise
        raise _does_not_fit(recipe, first_line(error), linear, names) from None
    _check_names(wrapped, recipe, linear, names)
    peft_methods.check_names(wrapped, recipe, names, linear)
    if not is_tuner and config.trainable_token_indices:
        finish_rows(wrapped)
    if source.adapter and tokenizer is not None and model.device.type != "meta":  # else they come from rank 0
        _load(wrapped, source)
    return wrapped


def _attach_virtual_tokens(model: Any, recipe: Settings, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """Put tokens before every prompt that are trained in place of weights.

    Prompt tuning learns their embeddings (Lester et al. 2021, arXiv:2104.08691), prefix tuning their keys and values in
    every layer (Li & Liang 2021, arXiv:2101.00190). They begin in fp32 as what the base makes of `virtual_tokens_text`,
    cut or repeated to their number. From noise they lose the base's ability first: both papers found the start to
    matter most where data is scarce.
    """
    import torch
    from peft import (
        PrefixTuningConfig,
        PromptTuningConfig,
        TaskType,
        get_peft_model,
        initialize_kv_prefix_from_past_key_values,
    )

    number, is_prefix = recipe.get("num_virtual_tokens"), recipe.get("peft_type") == "prefix"
    kind = PrefixTuningConfig if is_prefix else PromptTuningConfig
    wrapped = get_peft_model(model, kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=number))
    if not tokenizer:
        return wrapped
    ids = tokenizer(recipe.get("virtual_tokens_text"), add_special_tokens=False)["input_ids"]
    base, encoder = wrapped.get_base_model(), wrapped.prompt_encoder[wrapped.active_adapter]
    with torch.no_grad():
        tokens = torch.tensor([(ids * (number // len(ids) + 1))[:number]], device=base.device)
        if is_prefix:
            cache = base(input_ids=tokens, use_cache=True).past_key_values
            initialize_kv_prefix_from_past_key_values(wrapped, past_key_values=cache)
        else:
            encoder.embedding.weight.copy_(base.get_input_embeddings()(tokens)[0])
    encoder.float()
    return wrapped


def virtual_inputs(model: Any, ids: Any) -> dict[str, Any]:
    """What the base model is given for tokens `ids` (batch × length), by PEFT's documented `get_prompt`."""
    import torch

    prompt = model.get_prompt(batch_size=ids.shape[0])
    if model.active_peft_config.peft_type.value == "PREFIX_TUNING":
        return {"input_ids": ids, "past_key_values": prompt}
    return {"inputs_embeds": torch.cat([prompt, model.get_input_embeddings()(ids)], dim=1)}


def _lora_config(source: start.Start, recipe: Settings, model: PreTrainedModel, fused: bool) -> LoraConfig:
    """The recipe's configuration, or the adapter's that is trained on, checked against the recipe's modules."""
    from peft import LoraConfig
    from torch.nn import Linear

    if source.adapter:
        known = {item.name for item in dataclasses.fields(LoraConfig)} - {"auto_mapping"}
        values = {name: value for name, value in source.config.items() if name in known}
        values |= {"lora_dropout": recipe.get("lora_dropout"), "task_type": "CAUSAL_LM", "inference_mode": False}
        values["init_lora_weights"] = True  # its weights come from its file
        try:
            config = LoraConfig(**values)
            _check_targets(model, recipe, source)
        except FAULTS as error:
            raise _misfit(source, str(error)) from None
        config.base_model_name_or_path = model.name_or_path
    else:
        modules = recipe.get("lora_target_modules")  # PEFT takes `all-linear` and a regular expression as text
        all_linear = modules and len(modules) == 1 and modules[0].lower() == "all-linear"
        values = {field: recipe.get(key) for key, field in start.FIELDS.items()}
        values |= {"target_modules": "all-linear" if all_linear else _pattern(modules) or modules, "bias": "none"}
        values |= {"task_type": recipe.get("lora_task_type"), "revision": recipe.values.get("model_revision")}
        values |= peft_methods.fields(recipe)
        config = LoraConfig(**values)
    quantized = recipe.get("load_in_4bit") or recipe.get("load_in_8bit")  # those are linear layers, too
    if fused and not quantized and not recipe.get("torch_compile"):
        from stepladder.model.cpu_kernels import FusedLinear

        config._register_custom_module({Linear: FusedLinear})
    return config


def _misfit(source: start.Start, why: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit its base {source.base}",
        where=str(source.adapter),
        why=why.strip().split("\n")[0],
        help=f"the base that it was trained on: base_model_name_or_path in {ADAPTER_CONFIG}",
    )


def _check_targets(model: PreTrainedModel, recipe: Settings, source: start.Start) -> None:
    """Raise ModelError where `lora_target_modules` names other modules than the adapter has, as it names them."""
    key, its = "lora_target_modules", source.config.get("target_modules")
    its = [its] if isinstance(its, str) else its
    if not its or not recipe.get(key):
        return  # compared already, without the model (model/adapter_recipe.py)
    ours, its_own = (_matched(model, names) for names in (recipe.get(key), its))
    if ours != its_own:
        new, less = sorted(ours - its_own), sorted(its_own - ours)
        raise ModelError(
            f"{key}: {', '.join(recipe.get(key))} are other modules than the adapter's: {', '.join(sorted(its))}",
            where=recipe.where(key),
            why=f"the adapter has none for {new[0]}" if new else f"the adapter has one for {less[0]} too",
            help=f"remove {key}: an adapter that is trained on keeps its form",
        )


def _matched(model: PreTrainedModel, modules: list[str]) -> set[str]:
    """The modules of a model that names, `all-linear` or a regular expression stand for, by PEFT's rules."""
    import torch
    from transformers.pytorch_utils import Conv1D

    names = {name: module for name, module in model.named_modules() if name}
    if modules[0].lower() == "all-linear":
        head = model.get_output_embeddings()
        return {n for n, m in names.items() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}
    if pattern := _pattern(modules):
        return {name for name in names if re.fullmatch(pattern, name)}
    return {name for name in names if any(f".{name}".endswith(f".{end}") for end in modules)}


def _load(wrapped: PeftModel, source: start.Start) -> None:
    """Put an adapter's tensors into the model that was wrapped for them; all of them, and no other is left.

    Raises:
        ModelError: one is missing, has no place, has another shape, or is not finite.
    """
    import torch

    folder = source.adapter or Path()
    saved = read_adapter(folder)
    fault = differences({n: tuple(t.shape) for n, t in saved.items()},
                         {n: tuple(t.shape) for n, t in _tensors(wrapped).items()})  # fmt: skip
    if fault:
        raise _misfit(source, fault)
    wrapped.load_adapter(str(folder), "default", is_trainable=True, torch_device="cpu")
    for name, tensor in _tensors(wrapped).items():
        if not torch.equal(tensor.detach().cpu().float(), saved[name].float()):
            raise ModelError(f"{name} of the adapter could not be put into the model", where=str(folder / ADAPTER))


def _tensors(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    """An adapter's tensors by their names in its file."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(wrapped, save_embedding_layers=False))


def _does_not_fit(recipe: Settings, fault: str, linear: list[str], names: list[str]) -> ModelError:
    """The adapter does not fit; a pattern is explained by a name that it would have to match."""
    if recipe.get("peft_kwargs"):
        fields = ", ".join(recipe.get("peft_kwargs"))
        return ModelError(
            f"the adapter does not fit the model: {fault}",
            where=recipe.where("peft_kwargs"),
            why=f"its modules follow from {fields} too",
            help=f"other values of these; the model's linear layers are {', '.join(linear)}",
        )
    pattern = _pattern(recipe.get("lora_target_modules"))
    layer = next((name for name in names if name.endswith(f".{linear[0]}")), names[-1]) if linear else names[-1]
    return ModelError(
        f"the adapter does not fit the model: {fault}",
        where=recipe.where("lora_target_modules"),
        why=f"'{pattern}' is a regular expression that must match a whole module name, such as {layer}"
        if pattern
        else "",
        help=f"lora_target_modules: all-linear, or some of {', '.join(linear)}",
    )


def _check_names(wrapped: PreTrainedModel, recipe: Settings, linear: list[str], names: list[str]) -> None:
    """Raise ModelError for a name that matched nothing: PEFT is content where one name of a list does."""
    config = wrapped.peft_config["default"]
    modules, parameters = wrapped.base_model.targeted_module_names, wrapped.base_model.targeted_parameter_names
    if getattr(config, "exclude_modules", None):  # which peft_methods.check_names knows
        modules = names
    # The configuration's own names: PEFT replaces those of experts that Transformers holds fused.
    targeted = config.target_modules if isinstance(config.target_modules, (list, set)) else ()
    for key, wanted, present in (
        ("lora_target_modules", targeted, modules),
        ("lora_target_parameters", getattr(config, "target_parameters", None) or (), parameters),
        ("lora_modules_to_save", config.modules_to_save or (), names),
    ):
        missing = sorted(name for name in wanted if not any(f".{full}".endswith(f".{name}") for full in present))
        if missing and recipe.get(key):
            raise ModelError(
                f"{key}: the model has no {', '.join(missing)}",
                where=recipe.where(key),
                why="without them a smaller adapter would be trained than the recipe says",
                help=suggest(missing[0], linear) or "remove it",
            )


def hold_as_computed(model: PreTrainedModel, precision: str) -> None:
    """Hold the frozen linear layers in bf16 or fp16 where autocast would cast them to it at each use.

    The products are the same to the bit, from fp32 in half the memory, and cast once: autocast keeps its copies of
    trained weights only. A base in bf16 becomes fp16 on a GPU without bf16. Embeddings, norms and what the output
    layer shares with them compute in fp32 and stay so.
    For one process and DDP: ZeRO and FSDP hold what they compute with themselves.
    """
    import torch

    low = hardware.dtype_of(precision)
    adapted = getattr(model, "peft_config", {}).values()
    if low == torch.float32 or any(
        getattr(config, "use_dora", False) for config in adapted
    ):  # DoRA takes norms of them
        return
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if type(module) is torch.nn.Linear and id(module.weight) not in looked_up:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and parameter.is_floating_point():
                    parameter.data = parameter.data.to(low)


def _pattern(modules: list[str] | None) -> str:
    """The regular expression that stands in place of names, or nothing: a single text that is no dotted name."""
    single = modules[0] if modules and len(modules) == 1 else ""
    return "" if single.lower() == "all-linear" or single.replace(".", "_").isidentifier() else single
