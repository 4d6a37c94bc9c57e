"""Prefix and prompt tuning: a few tokens before every prompt that are no words, trained in place of weights.

Prompt tuning learns their embeddings (Lester et al. 2021, arXiv:2104.08691), prefix tuning their keys and
values in every layer (Li & Liang 2021, arXiv:2101.00190). Both begin as what the base makes of real words,
which those papers found to matter most where there is little data; from noise they lose the base's
ability first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepladder.settings import Settings

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

NAMES = {"prefix": "prefix tuning", "prompt": "prompt tuning"}  # by the recipe's peft_type


def config(recipe: Settings) -> PeftConfig:
    """PEFT's configuration of the recipe's `peft_type`."""
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType

    kinds = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
    made: PeftConfig = kinds[recipe.get("peft_type")](
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=recipe.get("num_virtual_tokens")
    )
    return made


def begin(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Let the virtual tokens begin as `text`, cut or repeated to their number; in fp32 whatever the base."""
    import torch
    from peft import initialize_kv_prefix_from_past_key_values

    kind = model.active_peft_config
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (words * (kind.num_virtual_tokens // len(words) + 1))[: kind.num_virtual_tokens]
    base, encoder = model.get_base_model(), model.prompt_encoder[model.active_adapter]
    with torch.no_grad():
        tokens = torch.tensor([ids], device=base.device)
        if kind.peft_type.value == "PREFIX_TUNING":
            cache = base(input_ids=tokens, use_cache=True).past_key_values
            initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        else:
            encoder.embedding.weight.copy_(base.get_input_embeddings()(tokens)[0])
    encoder.float()


def inputs(model: Any, ids: Any) -> dict[str, Any]:
    """What the base model is given for tokens `ids` (batch × length), by PEFT's documented `get_prompt`."""
    import torch

    prompt = model.get_prompt(batch_size=ids.shape[0])
    if model.active_peft_config.peft_type.value == "PREFIX_TUNING":
        return {"input_ids": ids, "past_key_values": prompt}
    return {"inputs_embeds": torch.cat([prompt, model.get_input_embeddings()(ids)], dim=1)}
