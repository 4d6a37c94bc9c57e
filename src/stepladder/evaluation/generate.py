"""Answers from a model: rendered by its chat template, decoded without the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder.evaluation import shared_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

Message = dict[str, Any]


class Answer(NamedTuple):
    """What a model said; `stopped`: it ended by itself, within the tokens that it was allowed."""

    text: str
    stopped: bool


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    batch_size: int = 16,
    streamer: BaseStreamer | None = None,
    shared: bool = True,
    **sampling: Any,
) -> list[Answer]:
    """The model's next turn for each conversation, in their order; the ranks share them out.

    Args:
        conversations: each ends with the user's turn. Without a chat template, the user's
            text is the prompt as it stands.
        streamer: is given the tokens as they come (of one conversation).
        shared: False where one rank alone asks.
        sampling: Transformers' generation flags (`max_new_tokens`, `temperature`, …); greedy
            unless `do_sample` is set.
    """
    import torch

    texts = [prompt_text(tokenizer, messages) for messages in conversations]
    ends = sorted({tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)})
    defaults = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}

    def batch_of(prompts: list[str]) -> list[Answer]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.inference_mode():
            out = model.generate(**batch, streamer=streamer, **{**defaults, **sampling})
        new = out[:, batch["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = torch.isin(new, torch.tensor(ends, device=new.device)).any(dim=1).tolist()
        return [Answer(text.strip(), stopped) for text, stopped in zip(said, ended, strict=True)]

    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) == "PROMPT_TUNING":
        batch_size = 1  # PEFT 0.21 leaves out position ids here, so that padding would move a prompt's positions
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # the answer begins where the prompt ends
    try:
        batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        each = shared_out.each(batches, batch_of) if shared else map(batch_of, batches)
        return [answer for batch in each for answer in batch]
    finally:
        tokenizer.padding_side = side


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text that the model continues."""
    if tokenizer.chat_template is None:
        return str(messages[-1]["content"])
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
