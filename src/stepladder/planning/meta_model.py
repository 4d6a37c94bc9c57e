"""The recipe's model on the meta device: built as sft.py builds it, without values; and the size of its weights."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepladder import files
from stepladder.data import special_tokens, templates
from stepladder.data.render import IGNORED
from stepladder.data.special_tokens import NewToken
from stepladder.errors import ModelError, first_line
from stepladder.model import attention, pretrained, start
from stepladder.model.attention import Choice
from stepladder.model.build import build
from stepladder.model.cpu_kernels import speed_up
from stepladder.model.new_tokens import needed_rows
from stepladder.settings import Settings
from stepladder.suggest import suggest


@dataclass(frozen=True)
class Work:
    """What is traced: a micro-batch on one device.

    `cast`: the strategy itself holds what is computed with, in bf16 where it is to be (ZeRO, FSDP); else
    autocast makes copies. `gpu`: the loss runs in Triton's kernels and
    attention keeps no mask of its dropout.
    """

    micro: int
    length: int
    precision: str
    checkpointing: bool
    cast: bool = False
    gpu: bool = False


def load_config(settings: Settings) -> Any:
    """The model's configuration: from its folder, from shapes.yaml, or from the hub.

    Raises:
        ModelError: there is none.
    """
    config = _config(settings)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, new_rows(settings, text.vocab_size)[0])
    return config


def _config(settings: Settings) -> Any:
    from transformers import AutoConfig

    source = start.resolve_recipe_model(settings)
    name = source.base
    shapes = files.read_table("planning/shapes.yaml")
    if not Path(name).is_dir() and name in shapes:
        return AutoConfig.for_model(**shapes[name])
    start.check_files(Path(name), settings.where("model_name_or_path"))
    revision = source.revision if source.adapter else None
    try:
        code = bool(settings.get("trust_remote_code"))
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=code)
    except Exception as error:  # values of another kind raise whatever the expressions that read them raise
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise pretrained.needs_code(name, settings.where("model_name_or_path")) from None
        raise ModelError(
            f"'{name}' has no config.json that can be read",
            where=settings.where("model_name_or_path"),
            why=" ".join(line.strip() for line in (str(error) or type(error).__name__).splitlines()[:2]),
            help=suggest(name, shapes) or "a local folder with config.json, or a hub id (network or cache needed)",
        ) from None


_known_rows: dict[str, tuple[int, list[NewToken]]] = {}


def new_rows(settings: Settings, rows: int) -> tuple[int, list[NewToken]]:
    """How many rows the recipe's tokenizer needs, and its new tokens.

    Of a model of which only the shape is here, a template is taken to add none, and each of the recipe's
    `additional_special_tokens` to be new.

    Args:
        rows: of the base's embeddings.
    """
    source, texts = start.resolve_recipe_model(settings), settings.get(special_tokens.KEY) or []
    if not (texts or source.adapter or any(settings.get(key) for key in templates.TEMPLATE_KEYS)):
        return rows, []
    keys = (special_tokens.KEY, *templates.TEMPLATE_KEYS, start.MODEL_KEY, "model_revision", "eos_token", "pad_token")
    asked = repr([settings.get(key) for key in keys])
    if asked not in _known_rows:
        if source.has_tokenizer or Path(source.base).is_dir() or _is_cached(source):
            tokenizer = pretrained.load_tokenizer_for(settings)
            new = templates.prepare(tokenizer, settings)
            _known_rows[asked] = needed_rows(tokenizer), new
        else:
            new = [NewToken(text, rows + number, ()) for number, text in enumerate(texts)]
            _known_rows[asked] = rows + len(new), new
    return _known_rows[asked]


def _is_cached(source: start.Start) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source.base, "tokenizer_config.json", revision=source.revision), str)


def build_meta_model(settings: Settings, config: Any, work: Work) -> tuple[Any, Any]:
    """The model as sft.py builds it, without storage: with its adapter, and the base alone."""
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    dtype = pretrained.weights_dtype(settings, work.precision)
    with torch.device("meta"):
        try:
            base = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.bfloat16 if dtype == "auto" else dtype,  # what the models of today are saved in
                trust_remote_code=bool(settings.get("trust_remote_code")),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(
                f"the architecture {config.model_type} cannot be built from its configuration",
                why=first_line(error),
                help="a causal language model that the installed Transformers know",
            ) from None
        if quantization := pretrained.quantization_config(settings, work.precision):
            _quantize(base, quantization)
        model = build(
            base,
            settings,
            work.precision,
            functools.partial(_attend, settings, work),
            new_tokens=new_rows(settings, config.get_text_config().vocab_size)[1],
            sharded=work.cast,
            on_cpu=not work.gpu,
        ).model
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer asks for it
        if not work.gpu:
            speed_up(base, IGNORED)
    model.train()
    if work.checkpointing:
        if settings.get("use_peft"):
            base.enable_input_require_grads()
        base.activation_checkpointing_enable()
    return model, base


def _attend(settings: Settings, work: Work, base: Any) -> tuple[Choice, list[str]]:
    """As `attention.settle`. Flash attention holds as much as by row; in fp16 a GPU has neither."""
    flat = (not work.gpu or work.precision == "bf16") and attention.by_row(base, settings)
    return Choice("sdpa", "", flat), []


@contextlib.contextmanager
def disable_zero3_loading() -> Iterator[None]:
    """Keep Transformers from sharding the model that is built inside, as it does under a ZeRO-3 launch."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config:
            deepspeed.set_hf_deepspeed_config(config)


def shorten_config(config: Any, depth: int, gpu: bool) -> Any:
    """A copy of the configuration with `depth` layers, computed as a run on that device would."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    config.use_cache = False
    config._attn_implementation = "sdpa"  # flash attention keeps the same: no scores
    if gpu:  # CUDA's fused attention draws its dropout anew in the backward pass; the CPU's keeps all scores
        for name in ("attn_pdrop", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
    return config


def materialize(model: Any, dtype: torch.dtype | None) -> None:
    """Replace meta tensors by (fake) CPU ones: autocast has no meta device, and PEFT adds no layers to fake tensors."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                made[id(old)] = _packed(module, old) if type(old).__name__ == "Params4bit" else torch.nn.Parameter(
                    torch.empty(old.shape, dtype=dtype if dtype and old.is_floating_point() else old.dtype),
                    old.requires_grad,
                )  # fmt: skip
            module._parameters[name] = None if old is None else made[id(old)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as model/pretrained.py has it


def quantization_constants(model: Any) -> list[torch.Tensor]:
    """The tensors of quantization constants, which are not parameters."""
    states = [state for module in model.modules() if (state := getattr(weight(module), "quant_state", None))]
    nested = [state.state2 for state in states if state.nested]
    return [tensor for state in [*states, *nested] for tensor in (state.absmax, state.code)]


def weight(module: Any) -> Any:
    """A module's own weight parameter, if it has one."""
    return module._parameters.get("weight")


def weight_bytes(model: Any) -> int:
    """Bytes of all weights except those in 4 bits."""
    full = (p for p in model.parameters() if type(p).__name__ != "Params4bit" and not hasattr(p, "quant_state"))
    return sum(p.numel() * p.element_size() for p in full)


def count_parameters(model: Any) -> int:
    """The number of parameters; one in 4 bits counts with its unpacked shape."""

    def stands_for(p: Any) -> int:
        return int(torch.Size(p.quant_state.shape).numel()) if hasattr(p, "quant_state") else p.numel()

    return sum(map(stands_for, model.parameters()))


def _quantize(base: Any, config: Any) -> None:
    """Replace linear layers by bitsandbytes' ones, as Transformers does before it loads weights."""
    from bitsandbytes.functional import quantize_4bit
    from transformers.integrations import bitsandbytes as integration
    from transformers.quantizers.base import get_keys_to_not_convert

    integration.replace_with_bnb_linear(base, get_keys_to_not_convert(base), quantization_config=config)
    base.requires_grad_(False)
    base.is_loaded_in_4bit = config.load_in_4bit
    base.is_loaded_in_8bit = config.load_in_8bit
    with torch.device("cpu"):  # bitsandbytes keeps the table that it makes at first: it must not be a fake one
        quantize_4bit(torch.zeros(64, 64), compress_statistics=True)


def _packed(module: Any, old: Any) -> Any:
    """A weight in 4 bits as a plain parameter, since a fake tensor cannot be a `Params4bit`."""
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(
        torch.empty((module.out_features, module.in_features), dtype=module.compute_dtype),
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    made: Any = torch.nn.Parameter(data, requires_grad=False)
    made.quant_state = state
    return made
