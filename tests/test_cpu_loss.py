"""The loss on a CPU is TRL's, in fewer products."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from test_packing import gradients_of, model_of, two_rows
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

from stepladder.model import cpu_kernels


@pytest.mark.parametrize("trains", ["all", "adapter"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gpt_neox", "phi"])
def test_the_fused_loss_is_trls_own(architecture, trains, monkeypatch) -> None:
    """Guards the loss on a CPU, its metrics and all gradients, over several parts of a batch.

    1e-6: sums of fp32 in another order, at gradients up to 1.
    """
    monkeypatch.setattr(cpu_kernels, "TOKENS", 7)

    def trained(own: bool, inputs: dict[str, torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        model = model_of(architecture)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if own:
            cpu_kernels.attach_loss(model, -100)
        model.get_output_embeddings().requires_grad_(trains == "all")
        output = model(**inputs, fused_lm_head=True)
        (-output.log_probs.exp().detach() * output.log_probs).sum().backward()  # as `loss_type: dft`, each its own
        return output, gradients_of(model)

    for inputs in (two_rows(), {**two_rows(), "labels": torch.full((2, 20), -100)}):
        (theirs, reference), (ours, gradients) = trained(False, inputs), trained(True, inputs)
        assert torch.equal(ours.label_mask, theirs.label_mask) and torch.equal(ours.is_top1, theirs.is_top1)
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-6)
        for name in ("log_probs", "entropy"):
            assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5)
        for a, b in zip(gradients, reference, strict=True):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"final_logit_softcapping": 30.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {}),
        ("qwen3_moe", {}),
    ],
)
def test_a_loss_that_is_not_of_plain_scores_stays_trls(architecture, changes) -> None:
    """Guards against scores without their scale or cap, and experts without the loss that balances them."""
    model = model_of(architecture, **changes)
    forward = model.forward
    cpu_kernels.attach_loss(model, -100)
    assert model.forward == forward


def test_what_changes_scores_is_known() -> None:
    """Guards against a scale that a new TRL reads from a configuration, and that this loss would leave out."""
    source = inspect.getsource(add_fused_lm_head)
    read = set(re.findall(r'getattr\(text_config, "(\w+)"', source) + re.findall(r"text_config\.(\w+)", source))
    of_experts = {"output_router_logits", "router_aux_loss_coef", "num_experts", "num_experts_per_tok"}
    assert read - of_experts - {"model_type"} == set(cpu_kernels.CHANGED)


def test_the_fused_loss_in_bf16_drifts_less_than_trls() -> None:
    """Guards the gradients under autocast: TRL found that a part of the vocabulary at a time, in bf16, biases training.

    Each number is rounded by up to 2^-8: the error is 3e-3 of the whole. What of it lies along the gradient is a
    drift: 1e-4 here, where TRL's has 8e-4.
    """
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 64), torch.nn.Linear(64, 3000, bias=False)
    torch.nn.init.normal_(head.weight, std=0.2)
    targets = (hidden @ head.weight.t()).argmax(-1)
    targets[::2] = torch.randint(3000, (150,))  # half are likely, half are not

    def own(at: torch.Tensor) -> torch.Tensor:
        return cpu_kernels.log_probs(at, head, targets)[0]

    def theirs(at: torch.Tensor) -> torch.Tensor:
        return ChunkedLogProbFunction.apply(at, head.weight, None, targets, 1.0, 32768)[0]

    def gradients(of: Any, bf16: bool) -> tuple[torch.Tensor, ...]:
        at = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = -of(at).mean()
        return torch.autograd.grad(loss, [at, head.weight])

    exact = gradients(own, False)
    for ours, trls, right in zip(gradients(own, True), gradients(theirs, True), exact, strict=True):
        assert 1e-4 < (ours - right).norm() / right.norm() < 1e-2
        drift, reference = (abs(((found - right) * right).sum() / right.square().sum()) for found in (ours, trls))
        assert drift < reference and drift < 1e-3
