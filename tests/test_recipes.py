"""Everything shipped that a run is made of: recipes, accelerate configs, DeepSpeed configs."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from stepladder.recipe import load
from stepladder.recipe.recipe import split_batch

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
MODELS = [path for path in RECIPES if path.parent.parent.name == "models"]
ADAPTERS = [path for path in MODELS if path.stem != "full"]
LAUNCH_CONFIGS = sorted((ROOT / "accelerate_configs").iterdir())
DEEPSPEED_CONFIGS = sorted((ROOT / "ds_configs").iterdir())

# One layer of each family, a few numbers wide: the layers have their real names.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "distilgpt2": ("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 16}),
    "gpt2": ("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 16}),
    # as opt-350m alone has it: embeddings narrower than the layers, projected in and out
    "opt-350m": ("opt", {"ffn_dim": 16, "word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    **dict.fromkeys(("smollm2-135m", "smollm2-360m", "smollm2-1.7b", "llama-3.1-8b", "llama-3.1-70b"), ("llama", {})),
    **dict.fromkeys(("qwen3-0.6b", "qwen3-8b"), ("qwen3", {"head_dim": 8})),
    "mistral-7b": ("mistral", {}),
    "phi-3-mini": ("phi3", {"pad_token_id": 0}),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes").with_suffix("")) if path in RECIPES else path.name


def header(path: Path) -> list[str]:
    """The comment lines that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.lstrip("# ") for line in lines[:end]]


def command(path: Path) -> list[str]:
    """The one command that a recipe's header shows, as a shell would split it."""
    (line,) = [line for line in header(path) if re.match(r"(python|accelerate launch) ", line)]
    return shlex.split(line)


def test_no_recipe_is_missed() -> None:
    """Guards against a test that looks at the top folder only: torchtune's checked 3 of its 197 configs."""
    lying_there = [name for _, _, names in os.walk(ROOT / "recipes") for name in names if not name.endswith(".md")]
    assert len(RECIPES) == len(lying_there) and len(MODELS) >= 30


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_loads_and_its_resolved_form_is_the_same(path: Path, tmp_path: Path) -> None:
    """Guards against a shipped key that a library has dropped, and a run folder's recipe that means another run."""
    recipe = load.load(str(path), [])
    # What a recipe of the workshop switches off, its parent's keys for that are left out.
    notes = [note for note in recipe.notes if path.parent.name != "workshop" or " is left out: " not in note]
    assert not notes, "a shipped recipe uses today's names"
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load.load(str(resolved), [])
    assert again.values == recipe.values and again.hash() == recipe.hash()


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_grouped_by_banners(path: Path) -> None:
    """Guards the recipes' one form: the five banners in their order, here or in the recipe that it extends."""
    while parent := (yaml.safe_load(path.read_text(encoding="utf-8"))).get("extends"):
        path = ROOT / f"recipes/{parent}.yaml"
    banners = re.findall(r"^# ---- (.*) ----$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert banners == ["model", "data", "method", "training", "saving and monitoring"]


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_shows_its_own_command(path: Path) -> None:
    """Guards against a copied header: the command must name this recipe, an existing config, and ranks that divide."""
    words = command(path)
    flags = {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}
    assert "scripts/sft.py" in words and flags["--recipe"] == name_of(path)
    assert load.find(str(ROOT / "recipes" / flags["--recipe"]) + ".yaml") == path
    ranks = 1
    if words[0] == "accelerate":
        config = ROOT / flags["--config_file"]
        assert config in LAUNCH_CONFIGS
        ranks = int(flags.get("--num_processes") or yaml.safe_load(config.read_text())["num_processes"])
        assert (ranks > 1) == (config.stem != "single") or path.parent.name == "recipes"
    recipe = load.load(str(path), [])
    if total := recipe.get("global_batch_size"):
        step = split_batch(total, recipe.get("per_device_train_batch_size"), ranks)
        assert step.places == total, "a shipped command wastes no place"


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_a_model_recipe_says_what_it_runs_on(path: Path) -> None:
    """Guards the first line: the smallest hardware, with the arithmetic behind it."""
    assert re.match(r"For .*\b(CPU|GPUs?)\b.* \d+ GB.*: .* parameters.* = [\d.,]+ GB", header(path)[0])


def test_model_recipes_do_not_share_a_run_folder() -> None:
    """Guards against runs/lora for twelve models: the second would be refused, or would replace the first."""
    folders = [load.load(str(path), []).output_dir for path in MODELS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_a_model_recipe_has_a_template(path: Path) -> None:
    """Guards base models, which cannot render a conversation: they have a prompt template, instruct models none."""
    recipe = load.load(str(path), [])
    is_base = FAMILIES[path.parent.name][0] in ("gpt2", "opt")
    assert ("{input}" in (recipe.get("prompt_template") or "")) == is_base


@pytest.mark.parametrize("path", ADAPTERS, ids=name_of)
def test_the_target_modules_exist_in_the_architecture(path: Path) -> None:
    """Guards against a list copied from Llama: every module it names must be adapted, and nothing must be left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from stepladder.model import build

    recipe = load.load(str(path), [])
    kind, extra = FAMILIES[path.parent.name]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    sizes |= {} if kind in ("gpt2", "opt") else {"intermediate_size": 32, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, **({"vocab_size": 32} if kind == "gpt2" else sizes), **extra)
    model = build.attach_adapter(AutoModelForCausalLM.from_config(config), recipe)
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A" in name}
    named = recipe.get("lora_target_modules")
    if named != ["all-linear"]:
        assert adapted == set(named)
    else:
        assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=name_of)
def test_accelerate_reads_its_config(path: Path) -> None:
    """Guards against a key that the installed accelerate refuses, and a DeepSpeed file that is not there."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    named = (getattr(config, "deepspeed_config", None) or {}).get("deepspeed_config_file")
    assert not named or ROOT / named in DEEPSPEED_CONFIGS


@pytest.mark.parametrize("path", DEEPSPEED_CONFIGS, ids=name_of)
def test_deepspeed_knows_its_keys(path: Path) -> None:
    """Guards against a typo in a DeepSpeed file: DeepSpeed itself ignores what it does not know at the top level."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, DeepSpeedZeroConfig

    config = json.loads(path.read_text(encoding="utf-8"))
    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    assert set(config) - known - {ZERO_OPTIMIZATION} == set()
    fields = DeepSpeedZeroConfig.model_fields
    aliases = {field.alias for field in fields.values()}
    assert set(config[ZERO_OPTIMIZATION]) - set(fields) - aliases == set()
