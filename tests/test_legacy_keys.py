"""Recipes that people already have: written for TRL, alignment-handbook, open-r1 and older Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepladder.errors import RecipeErrors
from stepladder.recipe import legacy_keys, load
from stepladder.recipe.schema import known_keys

RECIPES = Path(__file__).parent / "fixtures/recipes"


def values_and_notes(name: str, *flags: str) -> tuple[dict[str, Any], list[str]]:
    recipe = load.load(str(RECIPES / name), list(flags))
    return recipe.values, [note.removeprefix(f"{RECIPES / name}:") for note in recipe.notes]


def faults(path: Path, text: str) -> list[str]:
    path.write_text(text)
    with pytest.raises(RecipeErrors) as caught:
        load.load(str(path), [])
    return [error.render().removeprefix(f"✘ recipe: {path}:") for error in caught.value.errors]


def test_a_mixture_of_the_handbooks() -> None:
    """Guards alignment-handbook's recipes: id, config and weight become path, name and rows; all else as it is."""
    values, notes = values_and_notes("handbook_mixture.yaml")
    assert values["datasets"] == [
        {"path": "example/chats", "name": "default", "split": "train_sft", "columns": ["messages"]},
        {"path": "example/code", "split": "train", "rows": 0.25},
    ]
    assert (values["test_split_size"], values["dtype"], values["max_length"]) == (1000, "bfloat16", 2048)
    assert values["warmup_steps"] == 0.1 and values["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    gone = {"dataset_mixture", "dataset_kwargs", "do_eval", "overwrite_output_dir", "warmup_ratio", "torch_dtype"}
    assert not gone & values.keys()
    assert sorted(note.split(": ")[0] for note in notes) == sorted(
        ["4:1", "8:1", "20:3", "24:1", "27:1", "39:1", "43:1", "54:1"]
    ), notes


def test_a_qlora_of_the_handbooks() -> None:
    """Guards a dtype that repeats what bf16 says: in a recipe with a quantized base it is no contradiction."""
    values, _ = values_and_notes("handbook_qlora.yaml")
    assert (
        values["load_in_4bit"]
        and values["dtype"] == "bfloat16"
        and values["lora_target_modules"] == ["q_proj", "v_proj"]
    )


def test_a_mixer_of_the_older_handbook() -> None:
    """Guards the older form: shares and splits become entries, the first test split is what is evaluated."""
    values, notes = values_and_notes("handbook_mixer.yaml")
    assert values["datasets"] == [
        {"path": "example/chats", "name": "default", "split": "train_sft"},
        {"path": "example/code", "name": "python", "split": "train_sft", "rows": 0.5},
    ]
    assert (values["eval_dataset_name"], values["dataset_test_split"]) == ("example/chats", "test_sft")
    assert (values["attn_implementation"], values["dataset_num_proc"]) == ("flash_attention_2", 12)
    assert any("evaluated is the test split of the first data set alone" in note for note in notes)


def test_a_recipe_of_open_r1() -> None:
    """Guards open-r1's recipes: its own jobs' keys are left out where they are empty, each with a note."""
    values, notes = values_and_notes("open_r1.yaml")
    assert values["packing_strategy"] == "bfd" and values["use_liger_kernel"] is True
    assert values["hub_revision"] == "main" and values["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    left_out = {"benchmarks", "callbacks", "system_prompt", "wandb_project", "per_device_eval_batch_size", "do_eval"}
    assert not left_out & values.keys()
    assert all(any(f"{name} is left out" in note for note in notes) for name in left_out)


def test_a_recipe_of_trl() -> None:
    """Guards TRL's own form, which needs no translation and gets no note."""
    values, notes = values_and_notes("trl.yaml")
    assert notes == [] and values["datasets"][1] == {
        "path": "json", "data_files": "data/more.json", "split": "train", "columns": ["text"]
    }  # fmt: skip
    assert values["lora_target_modules"] == ["all-linear"] and values["learning_rate"] == 0.0001


def test_keys_of_older_libraries() -> None:
    """Guards every kind of translation: a new name, a new value, a block, or nothing."""
    values, notes = values_and_notes("transformers_4.yaml")
    assert values == {
        "eval_strategy": "steps",
        "eval_steps": 50,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "train_sampling_strategy": "group_by_length",
        "use_cpu": True,
        "optim": "adamw_torch",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataset_text_field": "content",
    }
    assert len(notes) == 19 and all(note[0].isdigit() for note in notes)


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.iterdir()))
def test_the_translation_is_final(name: str, tmp_path: Path) -> None:
    """Guards the run folder's recipe: it is in today's words, so it loads to the same without a note."""
    recipe = load.load(str(RECIPES / name), [])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load.load(str(tmp_path), [])
    assert again.values == recipe.values and again.notes == []


def test_no_old_name_is_a_present_one() -> None:
    """Guards against hiding a key that the libraries have again, and against a translation to nothing."""
    keys, table = known_keys(), legacy_keys.table()
    old = {*table["renamed"], *table["switches"], *table["removed"], *legacy_keys.COMPUTED_KEYS} - {"dataset_kwargs"}
    assert not old & keys.keys()
    assert {*table["renamed"].values()} <= keys.keys()
    for name, values in table["renamed_values"].items():
        for before, after in values.items():
            assert after in keys[name].choices and (before not in keys[name].choices or before == "chunked_nll")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_seq_length: 5\nmax_length: 6", ["1:1: max_seq_length and max_length are both set"]),
        ("warmup_ratio: 0.1\nwarmup_steps: 6", ["1:1: warmup_ratio and warmup_steps are both set"]),
        ("warmup_ratio: 10", ["1:1: warmup_ratio is 10; it must be below 1"]),
        ("warmup_ratio: much", ["1:1: warmup_steps takes a number"]),
        ("save_safetensors: false", ["1:1: save_safetensors: False is not possible any more", "safetensors only"]),
        ("benchmarks: [math_500]", ["open-r1's own jobs", "scripts/compare.py"]),
        ("wandb_project: mine", ["project: NAME"]),
        ("num_processes: 4", ["accelerate launch"]),
        ("env:\n  CUDA_VISIBLE_DEVICES: 0", ["1:1: env", "export"]),
        ("model_name_or_path: a/b\ntokenizer_name_or_path: c/d", ["2:1: tokenizer_name_or_path names another"]),
        ("use_flash_attention_2: maybe", ["takes true or false"]),
        ("dataset_kwargs:\n  add_special_tokens: true", ["1:1: dataset_kwargs cannot be used"]),
        ("dataset_splits: [train]", ["1:1: dataset_splits is not possible any more", "dataset_train_split"]),
        ("dataset_mixer: a/b", ["1:1: dataset_mixer takes"]),
        ("dataset_mixture:\n  datasets:\n    - id: a\n      spilt: b", ["4:7: unknown key 'spilt' in datasets[0]"]),
        ("dataset_mixture:\n  datasets:\n    - id: a\n      weight: 1.5", ["4:7: datasets[0].rows is 1.5"]),
        ("dataset_mixture:\n  datasets:\n    - config: a", ["3:7: datasets[0] has no 'path'"]),
        ("dataset_mixture:\n  sed: 3", ["2:3: unknown key 'sed' in dataset_mixture", "'seed'"]),
        ("dataset_mixture: {datasets: [{id: a}]}\ndatasets: [{path: b}]", ["dataset_mixture and datasets are both"]),
    ],
)
def test_what_cannot_be_translated(text: str, parts: list[str], tmp_path: Path) -> None:
    """Guards against a translation that guesses: what has no present meaning is an error at its place."""
    found = "\n".join(faults(tmp_path / "recipe.yaml", text))
    assert all(part in found for part in parts), found


def test_old_names_on_the_command_line() -> None:
    """Guards habits: an old flag sets today's key, over the file's."""
    values, notes = values_and_notes(
        "trl.yaml", "--max_seq_length", "64", "--warmup_ratio=0.1", "--torch_dtype", "auto"
    )
    assert (values["max_length"], values["warmup_steps"], values["dtype"]) == (64, 0.1, "auto")
    assert notes[0] == "command line --max_seq_length: max_seq_length is called max_length today"
