"""The explanations: complete for what is shipped, true to the installed libraries, and each worth reading."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, script
from stepladder.recipe import axolotl_config, explain, load, rules
from stepladder.recipe.schema import known_keys, own_keys

OURS = {key: said for group in explain.groups() for key, said in explain.explanations()[group].items()}
AXOLOTL = explain.explanations()[explain.AXOLOTL]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_key_of_a_shipped_recipe_is_explained_by_us(path: Path) -> None:
    """Guards against a recipe that uses a key for which --explain has only a library's help line."""
    entries = explain.of_recipe(load.load(str(path), []))
    assert [entry.key for entry in entries if entry.explanation.by != "Stepladder"] == []


def test_every_stepladder_key_is_explained() -> None:
    """Guards against a new key of ours without an explanation: no library documents it."""
    inner = {f"datasets.{key.name}" for key in known_keys()["datasets"].nested}
    assert ({key.name for key in own_keys("recipe")} | inner) - set(OURS) == set()


def test_the_seed_exercise_is_explained() -> None:
    """Guards the exercise that --explain answers: the keys that its Axolotl file sets."""
    exercise = "base_model datasets datasets.path datasets.type tokenizer_type sequence_len sample_packing lora_r"
    exercise += " lora_alpha lora_dropout lora_target_modules gradient_accumulation_steps micro_batch_size num_epochs"
    exercise += " optimizer learning_rate output_dir val_set_size adapter fp16 gradient_checkpointing"
    assert [key for key in exercise.split() if key not in AXOLOTL] == []


def test_an_explained_key_and_its_choices_exist() -> None:
    """Guards against an explanation that outlives its key, or teaches a key or value that would be refused."""
    for key, said in OURS.items():
        block, _, inner = key.partition(".")
        known = known_keys()[block]
        if inner:
            known = next(nested for nested in known.nested if nested.name == inner)
        switch = {"true", "false"} if "bool" in known.types else set()
        if switch and "str" not in known.types:
            assert set(said.choices) == switch, key
        elif known.choices:
            assert set(said.choices) <= {*known.choices, *switch}, key
        assert key not in rules.REFUSED, key


def test_an_explanation_teaches() -> None:
    """Guards against an entry that says nothing: two sentences at most, and a range or the choices."""
    for key, said in [*OURS.items(), *AXOLOTL.items()]:
        assert 1 <= len(re.findall(r"[.!?](?=\s|$)", said.what)) <= 2, key
        assert 20 <= len(said.what) <= 330, key
        assert said.usual or said.choices, key
        assert bool(said.up) == bool(said.down), key
        assert all(said.choices.values()), key


def test_axolotl_is_explained_in_its_own_words() -> None:
    """Guards against a shared explanation that sends an Axolotl user to a key that Axolotl would silently drop."""
    for key, said in AXOLOTL.items():
        text = " ".join([said.what, said.usual, said.up, said.down, *said.choices.values()])
        foreign = {word for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", text) if word in known_keys()}
        assert foreign - set(AXOLOTL) == set(), key


def test_the_importer_knows_what_is_explained() -> None:
    """Guards against two lists of Axolotl's keys that part: what --explain knows, import_axolotl.py accounts for."""
    rows = axolotl_config.rows()
    accounted = {re.split(r"[.\[]", key)[0] for key in rows} | {key.replace("[]", "") for key in rows}
    assert set(AXOLOTL) - accounted == set()


def test_a_key_without_our_explanation_has_the_librarys_help() -> None:
    """Guards the fallback: the words are the library's, said to be so, under a banner that fits."""
    said = explain.explanation("ddp_bucket_cap_mb")
    assert said.by == explain.LIBRARIES and "bucket_cap_mb" in said.what and said.group == "training"
    assert explain.explanation("hub_revision").group == "saving and monitoring"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not set"),
        (True, "true"),
        (5.0, "5"),
        (2e-5, "2e-05"),
        ("no", "'no'"),
        (["q_proj", "v_proj"], "[q_proj, v_proj]"),
        ("### User: {input}\n", '"### User: {input}\\n"'),
    ],
)
def test_values_are_shown_as_one_writes_them(value: object, text: str) -> None:
    """Guards against Python's spelling (True, ['a']) or a broken line in what a person copies into YAML."""
    assert explain.format_value(value) == text


def test_a_long_text_is_cut_in_tables_and_whole_as_json(tmp_path: Path) -> None:
    """Guards a template in the recipe: it must not bury the other keys, and a program reads all of it."""
    file, template = tmp_path / "r.yaml", "{% for m in messages %}\n{{ m.content }}{% endfor %}\n" * 100
    file.write_text(yaml.safe_dump({"chat_template": template}))
    done = script("check", "--recipe", file, "--show")
    assert done.code == 0 and f"… ({len(template):,} characters)" in done.out and len(done.out) < 12_000, done
    keys = json.loads(script("check", "--recipe", file, "--show", "--json").out)["keys"]
    assert next(entry["value"] for entry in keys if entry["key"] == "chat_template") == template


def test_defaults_without_effect_are_not_shown(tmp_path: Path) -> None:
    """Guards against a --show that lists lora_r beside full fine-tuning, or epochs beside max_steps."""
    file = tmp_path / "r.yaml"
    file.write_text("use_peft: false\nmax_steps: 3\nglobal_batch_size: 8\n")
    shown = {entry.key for entry in explain.defaults(load.load(str(file), []))}
    assert not shown & {"lora_r", "lora_alpha", "num_train_epochs", "gradient_accumulation_steps"}
    assert {"learning_rate", "model_name_or_path", "seed", "output_dir"} <= shown
