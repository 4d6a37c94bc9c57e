"""LoRA+: another learning rate for LoRA's B matrices (Hayou et al. 2024, arXiv:2402.12354)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer


def create_optimizer(trainer: Any, ratio: float) -> Optimizer:
    """PEFT's LoRA+ optimizer of the class that the arguments ask for; `Trainer.create_optimizer` is its seam.

    The first group is that of the A matrices, so the logged learning rate is the recipe's. Groups without parameters
    are left out: ZeRO drops them, and a checkpoint's groups would be others than those of one process.

    Args:
        ratio: the learning rate of the B matrices, as a multiple of `learning_rate`.
    """
    from peft.optimizers import create_loraplus_optimizer

    optimizer_class, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    optimizer = create_loraplus_optimizer(
        trainer.model,
        optimizer_class,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=trainer.args.weight_decay,
        **kwargs,
    )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer
