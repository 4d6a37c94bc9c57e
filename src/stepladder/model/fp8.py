"""Matrix products in fp8 (`fp8: true`), by torchao: full fine-tuning on NVIDIA's Ada, Hopper and newer GPUs.

torchao replaces the decoder's linear layers. Their weights stay in the precision that they are held in; each forward
and backward pass casts weights, inputs and gradients to fp8 with a scale per tensor (torchao's `tensorwise` recipe).
Names and shapes of the weights stay, so checkpoints, results and resuming are those of a run in bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepladder.errors import LaunchError, ModelError
from stepladder.model.flops import count_experts
from stepladder.settings import Settings

if TYPE_CHECKING:
    from stepladder.hardware import GPU

CAPABILITY = (8, 9)  # of the first GPUs with fp8 products, Ada's
MULTIPLE = 16  # of both sides of a matrix, which the kernel needs (`torch._scaled_mm`)
HELP = "fp8: false, or one of h100, h200, b200, l40s, 4090 …"


def check_device(recipe: Settings, on_cpu: bool) -> None:
    """Raise LaunchError where this rank's device has no fp8 products."""
    if not recipe.get("fp8"):
        return
    import torch

    if on_cpu:
        device, why = "a CPU", "only GPUs have fp8 products; emulated, they are slower than bf16"
    elif torch.version.hip:
        device, why = torch.cuda.get_device_name(), "AMD's fp8 formats were not tried"
    elif torch.cuda.get_device_capability() < CAPABILITY:
        device, why = torch.cuda.get_device_name(), "fp8 products begin with compute capability 8.9"
    else:
        return
    raise LaunchError(f"fp8: true on {device}", where=recipe.where("fp8"), why=why, help=HELP)


def check_planned(recipe: Settings, gpu: GPU) -> None:
    """Raise LaunchError where a GPU that is planned for has no fp8 products."""
    if recipe.get("fp8") and not gpu.fp8:
        why = "fp8 products begin with compute capability 8.9 (Ada, Hopper)"
        raise LaunchError(f"fp8: true on {gpu.name}", where=recipe.where("fp8"), why=why, help=HELP)


def convert(model: Any, recipe: Settings) -> None:
    """Replace the decoder's linear layers by torchao's, in place.

    Raises:
        ModelError: the model has no layer for fp8, or experts, whose weights are no linear layers.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = _layers(model)
    if not names or count_experts(model.config):
        raise ModelError(
            f"fp8: true, and {model.config.model_type} has {'experts' if names else 'no linear layer for it'}",
            where=recipe.where("fp8"),
            why=f"torchao replaces torch.nn.Linear whose sides are multiples of {MULTIPLE}, and no others",
            help="fp8: false",
        )
    convert_to_float8_training(model, config=Float8LinearConfig(), module_filter_fn=lambda _, name: name in names)


def scratch_bytes(model: Any, tokens: int) -> int:
    """Bytes of the fp8 copies that one layer has at most: of its weight, its input and its output's gradient."""
    sides = [(layer.in_features, layer.out_features) for layer in _layers(model).values()]
    return max((ins * outs + tokens * (ins + outs) for ins, outs in sides), default=0)


def _layers(model: Any) -> dict[str, Any]:
    """The linear layers that take fp8, by name; the output layer stays as it is, since the loss reads its weight."""
    from torch.nn import Linear

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is Linear
        and module is not head
        and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
    }
