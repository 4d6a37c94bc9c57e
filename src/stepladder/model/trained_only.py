"""The output layer on a CPU: for the trained tokens only, not for each one of the batch.

TRL does so where it has Triton; elsewhere it scores every position, prompts and padding too, so that shapes stay the
same for compilers (`compact` in trl/trainer/utils.py). SmolLM2 has 49,152 words to score at each; what it is worth to
leave that out stands in docs/benchmarks.md (issue 13).

Its seams: a forward hook on the model below the output layer, and `shift_labels`, which TRL scores as they stand.
"""

from __future__ import annotations

from typing import Any

import torch


class TrainedOnly:
    """Lets `model`, a causal language model without virtual tokens, hand on what stands before a trained token."""

    def __init__(self, model: Any):
        self.positions: torch.Tensor | None = None  # those handed on, in rows laid end to end; None for all
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.base_model.register_forward_hook(self._hand_on)

    def of(self, inputs: dict[str, Any], ignored: int) -> dict[str, Any]:
        """`inputs` whose `labels` [rows, tokens] have become `shift_labels` [1, trained tokens]; until `done`.

        Args:
            ignored: the label of a token that is not trained.
        """
        labels = torch.nn.functional.pad(inputs["labels"], (0, 1), value=ignored)[:, 1:].flatten()
        positions = (labels != ignored).nonzero().flatten()
        # A batch that trains nothing still takes part in the backward pass, for the ranks that wait for it.
        self.positions = positions if len(positions) else positions.new_zeros(1)
        others = {key: value for key, value in inputs.items() if key != "labels"}
        return {**others, "shift_labels": labels[self.positions][None]}

    def done(self) -> None:
        self.positions = None

    def _hand_on(self, module: Any, args: Any, output: Any) -> Any:
        if self.positions is not None:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[self.positions][None]
        return output
