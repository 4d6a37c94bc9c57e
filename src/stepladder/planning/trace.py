"""Trace one micro-batch on fake tensors: how many bytes are alive in each phase of a step.

The model is built from its configuration, a few layers deep, with the recipe's adapter and
quantization, and goes through forward, loss and backward as TRL's trainer runs them. Fake tensors
have shapes and no values: a layer of any size takes a fraction of a second and no memory.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from stepladder import hardware
from stepladder.errors import ModelError, first_line
from stepladder.model import attention, build, cpu_kernels, fixed_values, fp8, new_tokens, peft_methods
from stepladder.planning import meta_model
from stepladder.planning.live_bytes import PHASES, Moments
from stepladder.planning.meta_model import Work
from stepladder.settings import Settings, has_virtual_tokens

DEPTHS = (2, 4)  # two, since some models have two kinds of layers in turn
TOKEN_TILE, VOCABULARY_TILE = 4096, 32_768  # of TRL's loss (trl/kernels/chunked_logprob.py, trl/trainer/utils.py)
COUNT = 64.0  # any: the loss is divided by it
# Numbers of the parameter's own precision for each of its own: moments, averages, a slow copy. Momentum is off by
# default where it is optional (sgd, rmsprop). Any other optimizer counts as two, like Adam; the
# low-rank ones (GaLore, APOLLO) need less.
NUMBERS = {
    "sgd": 0, "lomo": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "schedule_free_sgd": 1, "ademamix": 3, "grokadamw": 3,
}  # fmt: skip
ADAM = 2
LEAST_IN_8_BITS = 4096  # smaller ones stay in 32 bits (bitsandbytes `min_8bit_size`; torchao has it too)
SCALE = 4 / 256  # an fp32 scale for 256 values (bitsandbytes `optimizer.py`; torchao's block size)


@dataclass(frozen=True)
class Count:
    """Bytes by kind; each grows by the same amount with every layer.

    `held` are the weights as loaded, `computed` as they are computed with, `quantized` those of
    them in 4 or 8 bits, `outside` what belongs to no layer; `states` are the optimizer's. Not bytes
    but numbers: `trainable` and all `parameters`, and the `operators` of a forward and backward pass.
    Of a phase: all that is alive at its worst moment but weights and gradients, the gradients, and the most that is
    alive but weights and the gradients of layers that are done (`apart`), for strategies that shard these. `kept` is
    what the forward pass leaves to the backward pass.
    """

    held: float
    computed: float
    trained: float
    trainable: float
    parameters: float
    states: float
    operators: float
    activations: tuple[float, ...]
    gradients: tuple[float, ...]
    apart: tuple[float, ...]
    kept: float

    def plus(self, other: Count, times: float) -> Count:
        def add(a: Any, b: Any) -> Any:
            return tuple(map(add, a, b)) if isinstance(a, tuple) else a + times * b

        return Count(*(add(a, vars(other)[name]) for name, a in vars(self).items()))


class Parameter(NamedTuple):
    """A parameter as a strategy shards it: `rows` is its first dimension, `held` and `computed` are bytes a number.

    `part` is the unit that it is gathered with: a `layer`, the `embedding`, or the `ends` (the head, the last norm, an
    embedding tied to the head, and what belongs to no layer).
    """

    part: str
    rows: int
    numbers: int
    held: int
    computed: int
    trained: bool
    is_matrix: bool


@dataclass(frozen=True)
class Traced:
    """A `whole` model, what one `layer` adds to it, the work that was traced, and the parameters in the model's order.

    Parameters are traced before a strategy pads them; one in 4 bits has the shape and the numbers of its storage.
    """

    whole: Count
    layer: Count
    work: Work
    parameters: tuple[Parameter, ...]

    @property
    def matrices(self) -> tuple[int, ...]:
        """The size of each matrix that is trained."""
        return tuple(p.numbers for p in self.parameters if p.trained and p.is_matrix)

    def extrapolate(self, other: Traced, times: float, micro: int) -> Traced:
        """Extrapolate to a larger micro-batch: from `other` to this one, and `times` as far beyond."""

        def on(here: Count, there: Count) -> Count:
            return here.plus(here.plus(there, -1), times)

        work = replace(self.work, micro=micro)
        return Traced(on(self.whole, other.whole), on(self.layer, other.layer), work, self.parameters)


def trace_batch(settings: Settings, config: Any, work: Work) -> Traced:
    """What a micro-batch of the whole model holds: traced on few layers, and extrapolated linearly.

    Raises:
        ModelError: the architecture cannot be built, or not be traced.
    """
    if settings.get("load_in_8bit"):
        raise ModelError(
            "a base in 8 bits cannot be planned",
            where=settings.where("load_in_8bit"),
            why="bitsandbytes' 8-bit layers look at their values, and a plan has none",
            help="load_in_4bit: true, which is planned and takes less",
        )
    layers = config.num_hidden_layers
    dense = max(0, (getattr(config, "first_k_dense_replace", None) or 0) - DEPTHS[0])  # DeepSeek's, before its experts
    depths = (DEPTHS[0] + dense, DEPTHS[1] + dense)
    if layers <= depths[1]:
        depths = (1, max(1, layers))
    settings_of = dict.fromkeys(depths, settings)
    if peft_methods.chooses_layers(settings):  # all layers are traced, and their mean is what one more adds
        depths = (1, max(1, layers))
        settings_of = {1: peft_methods.without_layers(settings), layers: settings}
    try:
        with meta_model.disable_zero3_loading():
            (few, short), (more, long) = (_traced(settings_of[depth], config, depth, work) for depth in depths)
    except ModelError:
        raise
    except Exception as error:  # whatever a model does that was never traced before: training goes on without a plan
        raise ModelError(
            f"the architecture {config.model_type} cannot be traced without its values",
            why=f"{type(error).__name__}: {first_line(error)}",
        ) from error
    layer = more.plus(few, -1).plus(more.plus(few, -1), 1 / max(1, depths[1] - depths[0]) - 1)
    whole = more.plus(layer, layers - depths[1])
    times = (layers - depths[1]) / max(1, depths[1] - depths[0])
    return Traced(whole, layer, work, _extrapolate_parameters(short, long, times))


def _extrapolate_parameters(
    short: tuple[Parameter, ...], long: tuple[Parameter, ...], times: float
) -> tuple[Parameter, ...]:
    """Extrapolate the longer list: what it has more than the shorter one is repeated `times` times."""
    at = next((n for n, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    more = len(long) - len(short)
    again = long[at : at + more] * math.ceil(times)
    return long[:at] + again[: round(more * times)] + long[at:]


def _traced(settings: Settings, config: Any, depth: int, work: Work) -> tuple[Count, tuple[Parameter, ...]]:
    from accelerate.utils import patch_environment
    from torch._subclasses.fake_tensor import FakeTensorMode

    # It logs the traceback of an operation that it cannot trace; `trace_batch` reports the error.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    model, base = meta_model.build_meta_model(settings, meta_model.shorten_config(config, depth, work.gpu), work)
    held, states = meta_model.weight_bytes(model), _states(model, str(settings.get("optim")))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    sizes = [p.element_size() for p in model.parameters()]
    rows = attention.lengths_as_mask(torch.full((work.micro,), work.length))  # with values, which attention reads
    # FakeTensorMode asks whether CUDA is available; by NVML, the question does not start the driver.
    with patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"), FakeTensorMode(allow_non_fake_inputs=True):
        computed = torch.bfloat16 if work.cast and work.precision == "bf16" else None
        meta_model.materialize(model, computed)
        fixed_values.hold_in(model, computed)
        moments = Moments([*model.parameters()], [*model.buffers(), *meta_model.quantization_constants(model)])
        layers = moments.follow(base, depth)
        flat = str(base.config._attn_implementation).startswith(attention.BY_ROW)
        shape = (1, work.micro * work.length) if flat or end_to_end(settings) else (work.micro, work.length)
        ids = torch.zeros(shape, dtype=torch.long)
        virtual = has_virtual_tokens(settings)
        mask = rows if flat else None if virtual else _mask(settings, shape)
        low = hardware.dtype_of(work.precision)
        with moments:
            with torch.autocast("cpu", low, enabled=low != torch.float32 and not work.cast):
                given = build.virtual_inputs(model, ids) if virtual else {"input_ids": ids}
                if config.model_type == "opt":  # which counts them from a mask of two dimensions
                    given["position_ids"] = torch.arange(shape[1]).expand(shape)
                if work.gpu or cpu_kernels.has_plain_logits(base):  # all tokens are trained, at worst
                    loss = compute_loss(base, given, mask, work.gpu)
                else:
                    loss = model(input_ids=ids, attention_mask=mask, fused_lm_head=True, num_items_in_batch=COUNT,
                                 labels=ids).loss  # fmt: skip
            loss.backward()
    # fp8 copies of one layer at a time, on top of what the trace in bf16 holds
    scratch = fp8.scratch_bytes(base, shape[0] * shape[1]) if settings.get("fp8") else 0
    learns = [parameter for parameter in moments.parameters if parameter.requires_grad]
    held = moments.weights + (held - meta_model.weight_bytes(model))
    phases = [moments.worst[phase] for phase in PHASES]
    count = Count(
        held, moments.weights, trained, sum(p.numel() for p in learns), meta_model.count_parameters(model), states,
        moments.operators,
        tuple(alive - moments.weights - gradients + scratch for alive, gradients in phases),
        tuple(gradients for _, gradients in phases),
        tuple(moments.apart[phase] - moments.weights + scratch for phase in PHASES),
        moments.kept - moments.weights,
    )  # fmt: skip
    return count, _parameters(model, base, layers, sizes)


def compute_loss(base: Any, given: dict[str, Any], mask: torch.Tensor | None, gpu: bool) -> torch.Tensor:
    """The loss of all tokens, from the last layer's output and the head's weight, as TRL computes it on that device.

    Args:
        given: what the base takes, but for its mask.
    """
    hidden = base.base_model(**given, attention_mask=mask, use_cache=False).last_hidden_state
    hidden, head = hidden.reshape(-1, hidden.shape[-1]), base.get_output_embeddings()
    if gpu:
        return _TritonLoss.apply(hidden, getattr(head.weight, "full_tensor", lambda: head.weight)())  # FSDP with PEFT
    return cpu_kernels.log_probs(hidden, head, torch.zeros(len(hidden), dtype=torch.long))[0].sum()


def _parameters(model: Any, base: Any, layers: Any, sizes: list[int]) -> tuple[Parameter, ...]:
    """The parameters of a model in its order; `sizes` are the bytes a number that each is held in."""
    head, embedding = base.get_output_embeddings(), new_tokens.frozen_weight(base.get_input_embeddings())
    parts = {id(p): "layer" for p in layers.parameters()}
    if head is None or new_tokens.frozen_weight(head) is not embedding:
        parts[id(embedding)] = "embedding"
    return tuple(
        Parameter(
            parts.get(id(p), "ends"), len(p), p.numel(), p.element_size() if hasattr(p, "quant_state") else size,
            p.element_size(), p.requires_grad, p.ndim > 1,
        )
        for p, size in zip(model.parameters(), sizes, strict=True)
    )  # fmt: skip


def end_to_end(settings: Settings) -> bool:
    """Whether TRL lays a batch's sequences end to end in one row, whatever attention makes of it."""
    packed = settings.get("packing") and settings.get("packing_strategy") != "wrapped"
    return bool(packed) or settings.get("padding_free") is True


def _mask(settings: Settings, shape: tuple[int, int]) -> torch.Tensor | None:
    """The mask of all pairs of tokens that a batch of `shape` needs, where its rows do not attend by themselves.

    One row, or one length, needs none; SDPA and eager attention take one for rows that are padded, and one of the
    whole batch where sequences lie end to end. Flash attention knows lengths. That of virtual tokens, which is
    small, is left out.
    """
    rows, tokens = shape
    if "flash" in str(settings.get("attn_implementation")) or (rows == 1 and not end_to_end(settings)):
        return None
    return torch.ones((rows, 1, tokens, tokens), dtype=torch.bool)


def _states(model: Any, optimizer: str) -> float:
    """Bytes of the optimizer's state."""
    embeddings = {id(meta_model.weight(module)) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return sum(state_bytes(optimizer, p, id(p) in embeddings) for p in model.parameters() if p.requires_grad)


def state_bytes(optimizer: str, parameter: torch.nn.Parameter, is_embedding: bool) -> float:
    """Bytes of state for one trained parameter.

    A paged optimizer may move them to the host, but begins on the device. Transformers' trainer keeps
    embeddings in 32 bits under bitsandbytes' 8-bit optimizers. PyTorch's own optimizers keep states in the
    precision of the weights, bitsandbytes in fp32.
    """
    name = optimizer.removeprefix("paged_")
    if name in ("adafactor", "adalomo"):
        return 4 * _factored(parameter.shape)
    numbers = NUMBERS.get(name.removesuffix("_8bit").removesuffix("_32bit").removesuffix("_bnb"), ADAM)
    torchao = name.startswith("adamw_torch_")
    small = parameter.numel() < LEAST_IN_8_BITS or (is_embedding and not torchao)
    if name.endswith("8bit") and not name.startswith("galore") and not small:
        return numbers * (1 + SCALE) * parameter.numel()
    if name.endswith("4bit") and not small:
        return numbers * (0.5 + 2 * SCALE) * parameter.numel()  # torchao: blocks of 128
    return numbers * parameter.numel() * (4 if "bnb" in optimizer or "32bit" in name else parameter.element_size())


def _factored(shape: torch.Size) -> int:
    """Adafactor's second moment: a row and a column for each matrix (Shazeer and Stern 2018, arXiv 1804.04235)."""
    if len(shape) < 2:
        return shape.numel()
    return shape[:-1].numel() + shape[:-2].numel() * shape[-1]


class _TritonLoss(torch.autograd.Function):
    """What TRL's loss allocates on a GPU (`ChunkedLogProbFunction`): its kernels need no copy of a tile.

    All tokens are trained, at worst. The weight's gradient is summed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        chosen = hidden.clone()  # hidden_states[mask]
        statistics = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(9)]
        tile = _tile(hidden, weight)
        ctx.save_for_backward(chosen, weight, *statistics[:2])
        del tile
        return statistics[0].sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden, weight, *_ = ctx.saved_tensors
        to_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        tile = _tile(hidden, weight)
        del tile
        return to_hidden.to(hidden.dtype), None if to_weight is None else to_weight.to(weight.dtype)


def _tile(hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """A tile of logits, and its part of the weight where that is cast."""
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    rows = min(len(weight), VOCABULARY_TILE)
    tile = hidden.new_empty((min(len(hidden), TOKEN_TILE), VOCABULARY_TILE), dtype=low)
    return [tile, weight[:rows] if weight.dtype == low else weight[:rows].to(low)]
