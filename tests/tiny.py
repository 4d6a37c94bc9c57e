"""A model small enough to be trained dozens of times by the tests."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / "models/smollm2-135m-instruct"


def make_tiny(folder: Path) -> Path:
    """Save a random Llama of 64,000 parameters, with SmolLM2's template and a vocabulary of 1,024 tokens.

    SmolLM2's own vocabulary of 49,152 would make a training step seven times as slow.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from stepladder.model import weights

    if (folder / "model.safetensors").is_file():
        return folder
    texts = (ROOT / "data/techco.jsonl").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2).train_new_from_iterator(texts, 1024, show_progress=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,  # the usual 0.02 leaves a model this narrow with nothing to say
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    weights.share(folder)
    return folder
