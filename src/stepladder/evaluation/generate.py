"""Answers from a model: rendered by its chat template, decoded without the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder.data import render
from stepladder.data.formats import Example
from stepladder.errors import DataError, ModelError
from stepladder.evaluation import shared_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

Message = dict[str, Any]
MAX_NEW_TOKENS = 128  # of generate.py and compare.py alike: a transcript of one is a side of the other


class Answer(NamedTuple):
    """What a model said; `stopped`: it ended by itself, within the tokens that it was allowed."""

    text: str
    stopped: bool


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Example | list[Message]],
    batch_size: int = 16,
    streamer: BaseStreamer | None = None,
    shared: bool = True,
    **sampling: Any,
) -> list[Answer]:
    """The model's next turn for each conversation, in their order; the ranks share them out.

    Args:
        conversations: each ends before an answer, as a row's example (with its tools and
            `chat_template_kwargs`) or as its messages alone. Without a chat template, the user's
            text is the prompt as it stands.
        streamer: is given the tokens as they come (of one conversation).
        shared: False where one rank alone asks.
        sampling: Transformers' generation flags (`max_new_tokens`, `temperature`, …); greedy
            unless `do_sample` is set.

    Raises:
        DataError: the template refuses a conversation, or does not render a part of it.
        ModelError: there is no template and the conversation needs one; a prompt and its answer take more
            positions than the model has.
    """
    import torch

    examples = [asked if isinstance(asked, dict) else {"messages": asked} for asked in conversations]
    texts = [prompt_text(tokenizer, example) for example in examples]
    ends = sorted({tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)})
    defaults = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}

    def batch_of(prompts: list[str]) -> list[Answer]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        _check_positions(model, batch["input_ids"].shape[1], sampling.get("max_new_tokens", 1))
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


def prompt_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The text that the model continues.

    Raises:
        DataError: the chat template refuses the conversation, or does not render a part of it.
        ModelError: there is no chat template, and more than one text to ask.
    """
    if tokenizer.chat_template is not None:
        try:
            return render.prompt_text(example, tokenizer)
        except DataError as error:
            asked = f"{tokenizer.name_or_path}, asked {str(example['messages'][-1]['content'])[:40]!r}"
            raise DataError(error.what, where=asked, why=error.why, help=error.help) from None
    if len(example["messages"]) > 1 or "tools" in example:
        raise no_template(str(tokenizer.name_or_path))
    return str(example["messages"][-1]["content"])


def no_template(name: str) -> ModelError:
    return ModelError(
        f"'{name}' has no chat template",
        why="of a system prompt or a conversation it would see the last turn alone",
        help="--prompt with all that it should see, or a model with a template (-Instruct)",
    )


def _check_positions(model: PreTrainedModel, prompt: int, new: int) -> None:
    """Models that learned a vector a position (GPT-2, OPT) have no more of them; on a GPU the index kills the process.

    Rotary positions (Llama, Qwen, …) go on.
    """
    import torch

    count, words = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words)
    if count and prompt + new > count and any(table.num_embeddings in (count, count + 2) for table in tables):
        raise ModelError(
            f"the model has {count} positions: a prompt of {prompt} tokens and {new} new ones need {prompt + new}",
            help=f"--max_new_tokens {count - prompt} at most" if prompt < count else "a shorter prompt",
        )


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
