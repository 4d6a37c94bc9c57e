"""Did you mean …? The known words nearest to one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHORTEST_PART = 4  # letters: `epochs` finds `num_train_epochs` as a part of it; shorter words find too much
CUTOFF = 0.74  # of difflib's ratio: one slip in a word of four letters, two swapped ones in one of eight
CLOSE = 0.06  # below the best ratio: what else is offered
# Short forms that other tools and papers use, and the keys of a recipe that they stand for.
ALIASES = {
    "lr": ["learning_rate"],
    "wd": ["weight_decay"],
    "bs": ["global_batch_size", "per_device_train_batch_size"],
    "batch_size": ["global_batch_size", "per_device_train_batch_size"],
    "model": ["model_name_or_path"],
    "data": ["dataset_name", "datasets"],
    "dataset": ["dataset_name", "datasets"],
    "rank": ["lora_r"],
    "alpha": ["lora_alpha"],
    "dropout": ["lora_dropout"],
    "epochs": ["num_train_epochs"],
    "steps": ["max_steps"],
    "grad_accum": ["gradient_accumulation_steps", "global_batch_size"],
    "max_len": ["max_length"],
    "max_seq_len": ["max_length"],
    "optimizer": ["optim"],
    "scheduler": ["lr_scheduler_type"],
    "warmup": ["warmup_steps"],
    "output": ["output_dir"],
}


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'a' or 'b'?`, or nothing where no known word is near."""
    found = nearest(word, known)
    return f"did you mean {' or '.join(repr(name) for name in found)}?" if found else ""


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """At most three known words, the nearest first."""
    text, names = normalize(word), {normalize(name): name for name in known}
    if aliases := [name for name in ALIASES.get(text, []) if name in names]:
        return aliases
    if close := difflib.get_close_matches(text, names, n=3, cutoff=CUTOFF):
        ratios = [difflib.SequenceMatcher(a=name, b=text).ratio() for name in close]
        return [names[name] for name, ratio in zip(close, ratios, strict=True) if ratio >= ratios[0] - CLOSE]
    if len(text) < SHORTEST_PART:
        return []
    return sorted((name for plain, name in names.items() if f"_{text}_" in f"_{plain}_"), key=len)[:3]


def normalize(word: str) -> str:
    return word.strip().casefold().replace("-", "_").replace(" ", "_")
