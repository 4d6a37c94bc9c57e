"""Where a generation ends: at the model's own ends, the tokenizer's, and the template's end of turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import script


def with_ends(source: Path, folder: Path, ends: int | list[int]) -> Path:
    """The model with `<|endoftext|>` as its tokenizer's end, while its template ends turns by `<|im_end|>`.

    `ends` is what its generation config lists: one is as Qwen's bases have it, several as Phi-3, Gemma and Llama 3.1.
    """
    shutil.copytree(source, folder)
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    for name, values in (
        ("tokenizer_config.json", tokens),
        ("generation_config.json", {"eos_token_id": ends, "pad_token_id": 0}),
        ("config.json", {"eos_token_id": ends}),
    ):
        file = folder / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values))
    return folder


def saved_ends(folder: Path) -> list[int]:
    return sorted(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])


def test_a_run_and_its_merge_end_where_the_template_ends(tiny, learnable, tmp_path) -> None:
    """Guards against a model that never stops: run, merge and Modelfile know its end of turn."""
    base = with_ends(tiny, tmp_path / "base", 0)
    words = ["--model_name_or_path", base, "--dataset_name", learnable, "--max_steps", 2, "--eval_strategy", "no"]
    run, merged = tmp_path / "run", tmp_path / "merged"
    done = script("sft", "--recipe", "lora", *words, "--output_dir", run)
    assert done.code == 0 and "an answer ends at <|im_end|> too" in done.out, done
    assert saved_ends(run) == [0, 2]
    done = script("merge", "--adapter", run, "--output_dir", merged, "--ollama")
    assert done.code == 0, done
    assert saved_ends(merged) == [0, 2]
    assert 'PARAMETER stop "<|im_end|>"' in (merged / "Modelfile").read_text()


@pytest.mark.parametrize("ends", [0, [0, 2], [0, 5]])
def test_no_end_is_lost(ends: int | list[int], tiny, tmp_path) -> None:
    """Guards the model's own list of ends, which its tokenizer's single one once replaced."""
    from transformers import AutoModelForCausalLM

    from stepladder.model import pretrained

    base = with_ends(tiny, tmp_path / "base", ends)
    tokenizer, model = pretrained.load_tokenizer(str(base)), AutoModelForCausalLM.from_pretrained(base)
    own = set(ends if isinstance(ends, list) else [ends])
    assert pretrained.fit_embeddings(model, tokenizer) == (["<|im_end|>"] if 2 not in own else [])
    assert set(model.generation_config.eos_token_id) == set(model.config.eos_token_id) == own | {2}
    model.save_pretrained(tmp_path / "full")
    assert saved_ends(tmp_path / "full") == sorted(own | {2})
    asked, _ = pretrained.load_for_inference(str(base))
    assert set(asked.generation_config.eos_token_id) == own | {2}
