"""Answers from a model: rendered by its chat template, decoded without the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    batch_size: int = 8,
    **sampling: Any,
) -> list[str]:
    """The model's next turn for each conversation, in their order.

    Args:
        conversations: each ends with the user's turn. Without a chat template, the user's
            text is the prompt as it stands.
        sampling: Transformers' generation flags (`max_new_tokens`, `temperature`, …); greedy
            unless `do_sample` is set.
    """
    import torch

    texts = [prompt_text(tokenizer, messages) for messages in conversations]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # the answer begins where the prompt ends
    ends = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)}
    defaults = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(ends)}
    found: list[str] = []
    try:
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                texts[start : start + batch_size], return_tensors="pt", padding=True, add_special_tokens=False
            ).to(model.device)
            with torch.inference_mode():
                out = model.generate(**batch, **{**defaults, **sampling})
            new = out[:, batch["input_ids"].shape[1] :]
            found += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    finally:
        tokenizer.padding_side = side
    return found


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text that the model continues."""
    if tokenizer.chat_template is None:
        return messages[-1]["content"]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
