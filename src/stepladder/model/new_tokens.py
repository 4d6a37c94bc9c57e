"""Embeddings of tokens that a tokenizer has and its base model lacks: their rows, how these begin, and their training.

A new row begins as the mean of the rows of the tokens that its text was before, in the input and in the output
embeddings, for full fine-tuning and for adapters. From noise, new tokens begin far from what they stand for, and the
output layer gives them probability at once (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

An adapter trains them by PEFT's `trainable_token_indices`, which replaces rows of a frozen matrix.
"""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stepladder import generators
from stepladder.data.special_tokens import KEY, NewToken
from stepladder.data.templates import TEMPLATE_KEYS
from stepladder.errors import ModelError
from stepladder.model import start
from stepladder.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Indices = list[int] | dict[str, list[int]]  # PEFT's `trainable_token_indices`: of the input embeddings, or by module


def needed_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that embeddings need for a tokenizer; its numbers may have gaps."""
    return max(len(tokenizer), max(tokenizer.added_tokens_decoder, default=-1) + 1)


def fit_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new: Sequence[NewToken] = ()) -> None:
    """Give the embeddings a row for each token, and the new ones their start values; every rank calls it.

    Tokens beyond the model's rows that are not among the new ones get rows of noise: an adapter's, which it replaces.
    """
    import torch

    if needed_rows(tokenizer) > model.get_input_embeddings().num_embeddings:
        with generators.unchanged():  # the same adapter and dropout follow, however many rows were added
            model.resize_token_embeddings(needed_rows(tokenizer), mean_resizing=False)
    if not new or model.device.type == "meta":  # the weights come from rank 0
        return
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    found = [parameter for end in ends for parameter in (end.weight, getattr(end, "bias", None))]
    tensors = {id(tensor): tensor for tensor in found if tensor is not None}.values()  # tied ones once
    with gather(list(tensors)), torch.no_grad():
        for token in new:
            for tensor in tensors:
                tensor[token.row] = tensor[list(token.pieces)].float().mean(0).to(tensor.dtype)


@contextlib.contextmanager
def gather(parameters: list[Any]) -> Iterator[None]:
    """Hold parameters whole inside, where ZeRO-3 has cut them; what rank 0 writes into them is kept."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def check_trainable(model: PreTrainedModel, recipe: Settings, source: start.Start, new: Sequence[NewToken]) -> None:
    """Raise ModelError where an adapter cannot train the new tokens."""
    key = KEY if recipe.get(KEY) else next((key for key in TEMPLATE_KEYS if recipe.get(key)), KEY)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    places = [f".{name}" for name, module in model.named_modules() if module in ends]
    asked = [*(recipe.get("lora_modules_to_save") or []), *(recipe.get("lora_target_modules") or [])]
    embeddings = [name for name in asked if any(at.endswith(f".{name}") or re.fullmatch(name, at[1:]) for at in places)]
    why = help = ""
    if recipe.get("peft_type") != "lora":
        why = f"peft_type: {recipe.get('peft_type')} trains no rows of the embeddings"
        without = "a template without new tokens: zephyr, mistral or a prompt_template"
        help = f"peft_type: lora, or {f'no {KEY}' if key == KEY else without}"
    elif source.adapter:
        why = f"{source.adapter} has no rows for them, and an adapter that is trained on keeps its form"
        help = f"merge it first: {start.merge_command(source.adapter, {})}"
    elif embeddings:
        why = f"{embeddings[0]} would be trained in two ways: PEFT takes whole embeddings or rows of them"
        help = f"no {embeddings[0]} under lora_modules_to_save and lora_target_modules: each new token has a row there"
    if why:
        texts = ", ".join(token.text for token in new)
        raise ModelError(
            f"the adapter cannot learn the new tokens {texts}", where=recipe.where(key), why=why, help=help
        )


def token_indices(model: PreTrainedModel, rows: Sequence[int]) -> Indices | None:
    """What PEFT trains of the embeddings: rows of the input's, and of the output's where these are another matrix.

    Raises:
        ModelError: PEFT's layer would compute another output than the model.
    """
    if not rows:
        return None
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if last is None or last.weight is first.weight:
        indices: Indices = list(rows)
    else:
        names = {module: name for name, module in model.named_modules()}
        indices = {names[first]: list(rows), names[last]: list(rows)}
    if getattr(last, "bias", None) is not None:
        raise ModelError(
            "an adapter cannot train new tokens of this model: its output layer has a bias",
            why="PEFT computes the output layer without it where it trains rows of it (peft/tuners/trainable_tokens)",
            help="use_peft: false, or no new tokens",
        )
    return indices


@contextlib.contextmanager
def shown_as_tied(model: Any) -> Iterator[None]:
    """Let Accelerate see that wrapped input and output embeddings are one matrix, while it shards the model by FSDP.

    It compares their weights (`fsdp2_prepare_model`), for which PEFT's wrappers give two new tensors, and would shard
    one parameter twice.
    """
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if is_wrapped(end)]
    tied = [end for end in ends if ends[-1].token_adapter.tied_adapter]
    for end in tied:
        end.__dict__["weight"] = frozen_weight(end)
    try:
        yield
    finally:
        for end in tied:
            del end.__dict__["weight"]


def unshard_before_loss(model: PreTrainedModel) -> None:
    """Let the loss find the output layer's weight and its trained rows whole under FSDP.

    TRL's fused loss reads the weight without calling the layer, so that FSDP's hooks do not gather it. The gradients of
    the rows are reduced with those of the other units, at the end of the backward pass.
    """
    from torch.distributed.fsdp import FSDPModule

    forward = model.forward

    @functools.wraps(forward)
    def forward_unsharded(self: Any, *args: Any, **kwargs: Any) -> Any:
        head = self.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()
        return forward(*args, **kwargs)

    if is_wrapped(model.get_output_embeddings()):
        model.forward = types.MethodType(forward_unsharded, model)


def frozen_weight(module: Any) -> Any:
    """The weight of an embedding or output layer, without the rows that an adapter trains."""
    return module.token_adapter.base_layer.weight if is_wrapped(module) else module.weight


def is_wrapped(module: Any) -> bool:
    """Whether an adapter trains rows of this module's weight."""
    from peft.utils.other import TrainableTokensWrapper

    return isinstance(module, TrainableTokensWrapper)


def finish_rows(wrapped: PeftModel) -> None:
    """Make what PEFT has wrapped for `trainable_token_indices` trainable here.

    The rows are in fp32, as all of the adapter. Under FSDP other ranks than the first have no weights: their copies of
    the rows' start values, which training does not read, are zeros.
    """
    import torch
    from peft.utils.other import TrainableTokensWrapper

    base = wrapped.get_base_model()
    first, last = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(first, TrainableTokensWrapper) and last is not None and not isinstance(last, TrainableTokensWrapper):
        raise ModelError(
            "an adapter cannot train new tokens of this model: PEFT leaves the output layer's rows as they are",
            why="input and output embeddings are one matrix, and the model's configuration does not say so",
            help="use_peft: false",
        )
    for wrapper in (first, last):
        if not isinstance(wrapper, TrainableTokensWrapper):
            continue
        wrapper.bias = None  # TRL's loss asks the output layer for it, and PEFT's wrapper knows of weights only
        adapter = wrapper.token_adapter
        for name, rows in adapter.trainable_tokens_delta.items():
            rows.data = rows.data.float()
            original = adapter.trainable_tokens_original[name]
            if original.is_meta:
                adapter.trainable_tokens_original[name] = torch.zeros(original.shape, device="cpu")
