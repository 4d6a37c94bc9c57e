"""A model that was merged or trained here is the same model in older programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo3Config,
    Phi3Config,
    Phi3ForCausalLM,
)

from conftest import installed, script
from stepladder.model import card, portable
from tiny import make_tiny

IDS = (torch.arange(2 * 100).reshape(2, 100) * 7 % 61) + 1  # longer than the scaled models' first length
TEXTS = [" Where's my order 12,345?\n\n", "déjà vu, 北京 🎉", "<|im_start|>user\nHi<|im_end|>\n"]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# What Transformers 4 makes of each folder: its logits, its tokens, and what its tokenizer returns.
OLDER = """
import json, pathlib, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
ids, texts = json.loads(sys.argv[1])
for folder in map(pathlib.Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    found = {"logits": model.float()(input_ids=torch.tensor(ids), use_cache=False).logits.detach()}
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found["tokens"] = [tokenizer(text)["input_ids"] for text in texts]
        found["keys"] = list(tokenizer("a"))
        found["text"] = tokenizer.decode(tokenizer("a , b . c !")["input_ids"])
        chat = [{"role": "user", "content": "Hi"}]
        found["chat"] = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    torch.save(found, folder / "older.pt")
"""


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that lets Transformers 4.57, in an environment of its own, answer for model folders."""
    # Torch and the rest are those of this environment; what must differ comes first on the path.
    wanted = ["transformers==4.57.*", "tokenizers>=0.22,<=0.23.0", "huggingface_hub>=0.34,<1"]
    folder = installed(tmp_path_factory.mktemp("transformers-4"), *wanted)

    def answer(*folders: Path) -> list[dict[str, Any]]:
        env = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, "-c", OLDER, json.dumps([IDS.tolist(), TEXTS]), *folders]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(one / "older.pt", weights_only=False) for one in folders]

    return answer


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=IDS).logits


def sizes(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.2, "max_position_embeddings": 4096,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 123456.0, **keys}


FACTORS = {"short_factor": [1.5] * 8, "long_factor": [3.0 + n for n in range(8)]}
ROPES = {
    "default": (LlamaForCausalLM, LlamaConfig(**sizes(rope_parameters=rope("default")))),
    "llama3": (LlamaForCausalLM, LlamaConfig(**sizes(rope_parameters=LLAMA3))),
    "linear": (LlamaForCausalLM, LlamaConfig(**sizes(rope_parameters=rope("linear", factor=4.0)))),
    "dynamic": (
        LlamaForCausalLM,
        LlamaConfig(**sizes(rope_parameters=rope("dynamic", factor=4.0), max_position_embeddings=64)),
    ),
    "yarn": (
        LlamaForCausalLM,
        LlamaConfig(
            **sizes(rope_parameters=rope("yarn", factor=64.0, original_max_position_embeddings=64, beta_fast=24.0))
        ),
    ),
    "longrope": (
        Phi3ForCausalLM,
        Phi3Config(**sizes(original_max_position_embeddings=64, rope_parameters=rope("longrope", **FACTORS))),
    ),
    "partial": (Phi3ForCausalLM, Phi3Config(**sizes(rope_parameters=rope("default", partial_rotary_factor=0.5)))),
    "other names": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(**sizes(rope_parameters=rope("default", partial_rotary_factor=0.5))),
    ),
    "two ropes": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **sizes(
                head_dim=16,
                layer_types=["sliding_attention", "full_attention"],
                rope_parameters={"full_attention": rope("linear", factor=8.0), "sliding_attention": rope("default")},
            )
        ),
    ),
}


def test_older_programs_rotate_alike(older: Any, tmp_path: Path) -> None:
    """Guards theta, scaling and the part that rotates against Transformers 4, which takes its defaults silently."""
    folders = []
    for name, (model, config) in ROPES.items():
        torch.manual_seed(0)
        model(config).save_pretrained(tmp_path / name)
        assert portable.add_older_names(tmp_path / name, None) == []  # type: ignore[arg-type]
        folders.append(tmp_path / name)
    unsettled = tmp_path / "unsettled"
    LlamaForCausalLM.from_pretrained(tmp_path / "default").save_pretrained(unsettled)
    for folder, found in zip(folders, older(*folders), strict=True):
        torch.testing.assert_close(found["logits"], logits(folder), atol=1e-4, rtol=0, msg=folder.name)
    assert (older(unsettled)[0]["logits"] - logits(unsettled)).abs().max() > 0.1  # else the others prove nothing


def test_what_older_names_cannot_say(tmp_path: Path) -> None:
    """Guards against a config that older programs would read as another model: there is a remark instead."""
    ropes = {"full_attention": rope("default"), "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}
    config = Olmo3Config(**sizes(layer_types=["sliding_attention", "full_attention"], rope_parameters=ropes))
    config.save_pretrained(tmp_path / "thetas")
    (remark,) = portable.add_older_names(tmp_path / "thetas", None)  # type: ignore[arg-type]
    assert "this olmo3 needs Transformers 5 or newer: it rotates by two thetas" in remark
    factors = rope("longrope", attention_factor=2.0, **FACTORS)
    config = Phi3Config(**sizes(original_max_position_embeddings=64, rope_parameters=factors))
    config.save_pretrained(tmp_path / "factor")
    (remark,) = portable.add_older_names(tmp_path / "factor", None)  # type: ignore[arg-type]
    assert "it has an attention_factor" in remark


# ---- through the command line ----


@pytest.fixture(scope="module")
def trained(smollm2: Path, learnable: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with a theta and scaling of its own, in bf16, and what it became: a full run, an adapter, merged."""
    folder = tmp_path_factory.mktemp("elsewhere")
    base = make_tiny(folder / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_parameters": LLAMA3}))
    greedy = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(greedy))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "extra_special_tokens": ["<|im_start|>"]}))
    keys = {
        "model_name_or_path": str(base), "dataset_name": str(learnable), "learning_rate": 2e-2, "max_steps": 25,
        "lr_scheduler_type": "linear", "max_length": 192, "per_device_train_batch_size": 4, "global_batch_size": 4,
        "bf16": False, "test_split_size": 0.125, "eval_strategy": "steps", "eval_steps": 25, "save_strategy": "no",
        "gradient_checkpointing": False,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    lora = ("--use_peft", "true", "--lora_r", "12", "--lora_alpha", "24", "--lora_target_modules", "all-linear")
    found = {"base": base, "full": folder / "full", "adapter": folder / "adapter", "merged": folder / "merged"}
    for name, words in (("full", ["--max_steps", "2"]), ("adapter", lora)):
        done = script("sft", "--recipe", folder / "recipe.yaml", "--output_dir", found[name], *words)
        assert done.code == 0, done
    done = script("merge", "--adapter", found["adapter"], "--output_dir", found["merged"], "--ollama")
    assert done.code == 0, done
    return found


def test_the_same_model_in_transformers_4(trained: dict[str, Path], older: Any) -> None:
    """The main path: logits, tokens and chat of a merged and of a fully tuned model, from the command line."""
    for folder, found in zip(
        (trained[n] for n in ("full", "merged")), older(trained["full"], trained["merged"]), strict=True
    ):
        torch.testing.assert_close(found["logits"], logits(folder), atol=1e-4, rtol=0)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert found["tokens"] == [tokenizer(text)["input_ids"] for text in TEXTS]
        assert found["keys"] == ["input_ids", "attention_mask"]  # `generate` refuses token_type_ids
        assert found["text"] == "a , b . c !"
        chat = [{"role": "user", "content": "Hi"}]
        assert found["chat"] == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        config = json.loads((folder / "config.json").read_text())
        assert config["torch_dtype"] == config["dtype"] == "float32" and config["use_cache"] is True
        assert config["rope_theta"] == 50000.0 and config["rope_scaling"]["factor"] == 8.0
        assert AutoConfig.from_pretrained(folder).rope_parameters == LLAMA3


def test_a_config_that_does_not_sample_has_no_temperature(trained: dict[str, Path]) -> None:
    """Guards against a model that vLLM and Ollama sample from at a temperature that its base never used."""
    for name in ("full", "adapter", "merged"):
        assert not {"temperature", "top_p"} & json.loads((trained[name] / "generation_config.json").read_text()).keys()
    assert "temperature" not in (trained["merged"] / "Modelfile").read_text()


def test_the_card_says_what_is_so(trained: dict[str, Path]) -> None:
    """Guards against a card on which the model was trained on its evaluation set, or that vLLM would not serve by."""
    for name in ("full", "adapter", "merged"):
        text = (trained[name] / "README.md").read_text()
        (line,) = re.findall(r"^\| data \| (.*) \|$", text, re.MULTILINE)
        assert "(7 rows)" in line and "(1 rows)" not in line
        assert re.search(r"^\| held out \| .*\(1 rows\), not trained on \|$", text, re.MULTILINE)
    assert "--max-lora-rank 16 " in (trained["adapter"] / "README.md").read_text()  # vLLM knows no 12


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 600}, "rank 600, above 512"),
        ({"bias": "all"}, "trained biases"),
        ({"alpha_pattern": {"q_proj": 4}}, "of its own for some modules"),
    ],
)
def test_no_command_for_what_vllm_cannot_serve(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, **keys}))
    line = card._vllm(tmp_path, "base")
    assert line.startswith("#") and said in line
