"""A model small enough to be trained dozens of times by the tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / "models/smollm2-135m-instruct"


def whole(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder as `make` fills it, once. It appears once complete, so that a kill leaves none by half."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        part.rename(folder)
    return folder


def make_tiny(folder: Path) -> Path:
    """Save a random Llama of 64,000 parameters, with SmolLM2's template and a vocabulary of 1,024 tokens.

    SmolLM2's own vocabulary of 49,152 would make a training step seven times as slow. Where SmolLM2 is not on the
    machine, its kind of tokenizer is trained from nothing, with the ChatML template.
    """
    return whole(folder, _make_tiny)


def _make_tiny(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from stepladder.model import weights

    texts = (ROOT / "data/techco.jsonl").read_text().splitlines()
    if SMOLLM2.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(SMOLLM2).train_new_from_iterator(texts, 1024, show_progress=False)
    else:
        tokenizer = _chatml_tokenizer(texts)
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
    weights.apply_umask(folder)


def _chatml_tokenizer(texts: list[str]) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, 1024, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        chat_template=(ROOT / "src/stepladder/data/templates/chatml.jinja").read_text(),
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
    )
