"""Adapters: made from a recipe, and checked when they are saved."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import hardware
from stepladder.errors import ModelError, suggest
from stepladder.model import start
from stepladder.model.adapter_config import ADAPTER, CONFIG
from stepladder.model.merge.weights import more
from stepladder.settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VIRTUAL = {"prefix": "prefix tuning", "prompt": "prompt tuning"}  # by the recipe's peft_type
# What PEFT raises for a configuration that was written by hand, or for another model.
FAULTS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, re.error)


def attach(
    model: PreTrainedModel,
    recipe: Settings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Sequence[str] = (),
    fused: bool = False,
) -> PreTrainedModel:
    """Wrap the model in the adapter that the recipe asks for, or that it starts from; without `use_peft` it stays.

    The adapter is in fp32 whatever the base: in bf16, small updates would round to nothing.

    Args:
        tokenizer: for the text that virtual tokens begin as; without it (a plan's model) they begin anyhow, and the
            weights of an adapter that is trained on are not read.
        new_tokens: tokens that a template added to the vocabulary.
        fused: LoRA's linear layers are those of `cpu/fused_lora`, which read the adapter's weights past the
            modules where ZeRO-3 and FSDP gather them: only where each rank holds them all. `torch_compile` fuses
            PEFT's own, and cannot read these.

    Raises:
        ModelError: a module or parameter that the recipe names does not exist in this model, an adapter does not fit
            it, or there are new tokens: TRL's fused output layer reads the plain weight (`add_fused_lm_head`), so
            PEFT's wrapped one, which would train their embeddings, cannot stand in its place.
    """
    if not recipe.get("use_peft"):
        return model
    if new_tokens:
        raise ModelError(
            f"the chat template adds {', '.join(new_tokens)} to the vocabulary, and an adapter cannot learn new tokens",
            where=recipe.where("chat_template"),
            why="their embeddings would stay as random as they begin",
            help="use_peft: false, or a template without new tokens: zephyr, mistral or a prompt_template",
        )
    from peft import get_peft_model

    if recipe.get("peft_type") != "lora":
        wrapped = get_peft_model(model, _virtual_tokens(recipe))
        if tokenizer:
            _initialize(wrapped, tokenizer, recipe.get("virtual_tokens_text"))
        return wrapped
    source = start.of_recipe(recipe)
    config = _of_adapter(source, recipe, model) if source.adapter else _new_config(recipe)
    if source.adapter and tokenizer is None:  # a plan's model has few of the layers
        config.layers_to_transform = config.layers_pattern = None
    if fused:
        _fuse(config, recipe)
    names = [name for name, _ in model.named_modules()]
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "Linear" in type(m).__name__})
    try:
        wrapped = get_peft_model(model, config)
    except FAULTS as error:
        if source.adapter:
            raise _misfit(source, str(error)) from None
        if not isinstance(error, ValueError):
            raise
        raise _does_not_fit(recipe, str(error).splitlines()[0], linear, names) from None
    _check_names(wrapped, recipe, linear, names)
    if source.adapter and tokenizer is not None:
        _load(wrapped, source)
    return wrapped


def _virtual_tokens(recipe: Settings) -> PeftConfig:
    """PEFT's configuration of tokens before every prompt that are trained in place of weights.

    Prompt tuning learns their embeddings (Lester et al. 2021, arXiv:2104.08691), prefix tuning their keys and values in
    every layer (Li & Liang 2021, arXiv:2101.00190).
    """
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType

    kind = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}[recipe.get("peft_type")]
    return kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=recipe.get("num_virtual_tokens"))


def _initialize(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Start virtual tokens as what the base makes of `text`, cut or repeated to their number; in fp32.

    From noise they lose the base's ability first: both papers found the start to matter most where data is scarce.
    """
    import torch
    from peft import initialize_kv_prefix_from_past_key_values

    kind = model.active_peft_config
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (words * (kind.num_virtual_tokens // len(words) + 1))[: kind.num_virtual_tokens]
    base, encoder = model.get_base_model(), model.prompt_encoder[model.active_adapter]
    with torch.no_grad():
        tokens = torch.tensor([ids], device=base.device)
        if kind.peft_type.value == "PREFIX_TUNING":
            cache = base(input_ids=tokens, use_cache=True).past_key_values
            initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        else:
            encoder.embedding.weight.copy_(base.get_input_embeddings()(tokens)[0])
    encoder.float()


def virtual_inputs(model: Any, ids: Any) -> dict[str, Any]:
    """What the base model is given for tokens `ids` (batch × length), by PEFT's documented `get_prompt`."""
    import torch

    prompt = model.get_prompt(batch_size=ids.shape[0])
    if model.active_peft_config.peft_type.value == "PREFIX_TUNING":
        return {"input_ids": ids, "past_key_values": prompt}
    return {"inputs_embeds": torch.cat([prompt, model.get_input_embeddings()(ids)], dim=1)}


def _fuse(config: LoraConfig, recipe: Settings) -> None:
    """Let PEFT make `cpu/fused_lora`'s layers of linear ones, where those are not quantized or compiled."""
    from torch.nn import Linear

    from stepladder.model.cpu.fused_lora import FusedLinear

    quantized = recipe.get("load_in_4bit") or recipe.get("load_in_8bit")  # those are linear layers, too
    if not quantized and not recipe.get("torch_compile"):
        config._register_custom_module({Linear: FusedLinear})


def _new_config(recipe: Settings) -> LoraConfig:
    from peft import LoraConfig

    values = {field: recipe.get(key) for key, field in start.FIELDS.items()}
    return LoraConfig(**{
        **values, "target_modules": targets(recipe), "bias": "none", "task_type": recipe.get("lora_task_type"),
        "revision": recipe.values.get("model_revision"),
    })  # fmt: skip


def _of_adapter(source: start.Start, recipe: Settings, model: PreTrainedModel) -> LoraConfig:
    """The configuration of an adapter that is trained on, checked against what the recipe says of its modules."""
    try:
        config = source.lora_config(recipe)
        _check_targets(model, recipe, source)
    except FAULTS as error:
        raise _misfit(source, str(error)) from None
    config.base_model_name_or_path = model.name_or_path
    return config


def _misfit(source: start.Start, why: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit its base {source.base}",
        where=str(source.adapter),
        why=why.strip().split("\n")[0],
        help=f"the base that it was trained on: base_model_name_or_path in {CONFIG}",
    )


def _check_targets(model: PreTrainedModel, recipe: Settings, source: start.Start) -> None:
    """Raise ModelError where `lora_target_modules` names other modules than the adapter has, as it names them."""
    key, its = "lora_target_modules", source.config.get("target_modules")
    its = [its] if isinstance(its, str) else its
    if not its or not recipe.get(key):
        return  # compared already, without the model (model/adapter_recipe.py)
    asked, own = (_matched(model, names) for names in (recipe.get(key), its))
    if asked != own:
        new, less = sorted(asked - own), sorted(own - asked)
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
    if pattern := pattern_of(modules):
        return {name for name in names if re.fullmatch(pattern, name)}
    return {name for name in names if any(f".{name}".endswith(f".{end}") for end in modules)}


def _load(wrapped: PeftModel, source: start.Start) -> None:
    """Put an adapter's tensors into the model that was wrapped for them; all of them, and no other is left.

    Raises:
        ModelError: one is missing, has no place, has another shape, or is not finite.
    """
    import torch

    folder = source.adapter or Path()
    saved = read_tensors(folder)
    fault = _differences({n: tuple(t.shape) for n, t in saved.items()},
                         {n: tuple(t.shape) for n, t in _tensors(wrapped).items()})  # fmt: skip
    if fault:
        raise _misfit(source, fault)
    wrapped.load_adapter(str(folder), "default", is_trainable=True, torch_device="cpu")
    for name, tensor in _tensors(wrapped).items():
        if not torch.equal(tensor.detach().cpu().float(), saved[name].float()):
            raise ModelError(f"{name} of the adapter could not be put into the model", where=str(folder / ADAPTER))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by their names in its file; ModelError where a number is not finite."""
    from safetensors.torch import load_file

    tensors = load_file(folder / ADAPTER)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"the adapter holds numbers that are not finite, in {name}",
                where=str(folder / ADAPTER),
                help="train it again",
            )
    return tensors


def _tensors(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    """An adapter's tensors by their names in its file."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(wrapped, save_embedding_layers=False))


def _differences(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    """Which tensors are missing, unexpected or of another shape; empty where none is."""
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    wrong = sorted(n for n in shapes.keys() & expected.keys() if shapes[n] != expected[n])
    found = (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
    return "; ".join(f"{label}: {names[0]}{more(names)}" for label, names in found if names)


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
        help=f"lora_target_modules: all-linear, or some of {', '.join(linear)}",
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
                help=suggest(missing[0], linear) or "remove it",
            )


def load_trained(model: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
    """An adapter on a whole model, as PEFT loads it.

    Raises:
        ModelError: a tensor is missing, which PEFT would leave as random as it begins, with a warning.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, folder, name)
        except UserWarning as warning:
            missing = re.findall(r"'([^']+)'", str(warning)) or [str(warning)]
            what = f"the adapter lacks {missing[0].replace(f'.{name}.', '.')}{more(missing)}"
            raise wrong_base(folder, Path(model.name_or_path), what) from None


def wrong_base(adapter: Path, base: Path, what: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit this base: {what}",
        where=str(adapter),
        why=f"it was trained on another model than {base}, or on another size of it",
        help="name the base that it was trained on: --base",
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
    file = folder / ADAPTER
    if not file.is_file():
        raise ModelError(f"no adapter was saved in {folder}")
    tensors = read_tensors(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise ModelError(
            f"the saved adapter is not the one that was trained: {len(shapes)} tensors, expected {len(expected)}",
            where=str(file),
            why=_differences(shapes, expected),
        )
    matrices = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if matrices and not any(tensor.any() for tensor in matrices):
        raise ModelError(
            "every B matrix of the saved adapter is zero: nothing was learned",
            where=str(file),
            why="B begins as zeros, and only a step with a learning rate above 0 changes it",
            help="train more steps: under warmup_steps the first has a rate of 0 (`learning_rate` in metrics.jsonl)",
        )
