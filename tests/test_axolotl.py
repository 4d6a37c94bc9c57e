"""Axolotl configurations become recipes: what every key turns into, and what a person sees."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT, script
from stepladder.errors import RecipeError
from stepladder.recipe import axolotl_config, axolotl_import, load
from stepladder.recipe.axolotl_config import DROPPED, TRANSLATED, UNSUPPORTED
from stepladder.recipe.axolotl_import import Translation

FIXTURES = ROOT / "tests/fixtures/axolotl"
CASES = [
    pytest.param(key, case, id=f"{key}-{number}")
    for number, case in enumerate(yaml.safe_load((FIXTURES / "keys.yml").read_text()))
    for key in case["keys"].split()
]


def translate(tmp_path: Path, content: dict[str, Any]) -> Translation:
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return axolotl_import.translate(axolotl_config.read_config(file))


def outcome(translation: Translation, key: str):
    (row,) = (row for row in translation.rows if row.key == key)
    return row.outcome


def configuration(key: str, case: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A configuration with the key of a case, and the path under which its row must stand."""
    entry = {"path": "d.jsonl", **case.get("also", {})}
    content: dict[str, Any] = {"base_model": "org/model", "datasets": [entry], **case.get("beside", {})}
    block, name = content, key
    if key.startswith("datasets[]."):
        block, name = entry, key.removeprefix("datasets[].")
        key = key.replace("[]", "[0]")
    while "." in name:
        outer, name = name.split(".", 1)
        block = block.setdefault(outer, {})
    if name.endswith("[]"):
        name, key = name[:-2], key.replace("[]", "[0]")
        block[name] = [case["value"]]
    else:
        block[name] = case["value"]
    return content, key


@pytest.mark.parametrize(("key", "case"), CASES)
def test_every_key(key: str, case: dict[str, Any], tmp_path: Path) -> None:
    """Guards each row of the importer's tables, and that what it makes is a recipe that loads."""
    content, path = configuration(key, case)
    result = translate(tmp_path, content)
    found = outcome(result, path)
    if "stop" in case:
        assert found.kind == UNSUPPORTED and found.changes_training
        assert re.search(case["stop"], found.reason), found.reason
    elif "drop" in case:
        assert (found.kind, found.recipe, found.block) == (DROPPED, {}, {}) and found.reason, found
    elif "spare" in case:
        assert found.kind == UNSUPPORTED and not found.changes_training and found.reason, found
    else:
        assert found.kind == TRANSLATED, found
        assert {name: result.recipe.get(name) for name in case.get("to", {})} == case.get("to", {})
        assert result.environment.items() >= case.get("env", {}).items()
        assert result.strategy == case.get("launch", result.strategy)
        assert result.target(next(row for row in result.rows if row.key == path))
    axolotl_import.write_recipe(result, tmp_path / "recipe.yaml")


def test_the_table_of_cases_is_whole() -> None:
    """Guards the guard: a new row without a case is found. `test_datasets` has the rows of `datasets`."""
    tested = {case.values[0] for case in CASES}  # type: ignore[attr-defined]
    rows = {key for key in axolotl_config.rows() if not key.startswith("test_datasets")}
    untested = {key for key in rows - tested if not key.endswith("*")}
    for family in (key for key in rows if key.endswith("*")):
        members = [key for key in tested - rows if key.startswith(family[:-1])]
        assert members, f"no member of {family}"
    assert not untested


# ---- the whole way, as a person walks it ----


def test_the_workshops_example(tmp_path: Path) -> None:
    """The seed's file: it stops at the format that is unknown, and --force makes the recipe without it."""
    recipe = tmp_path / "recipe.yaml"
    done = script("import_axolotl", FIXTURES / "seed.yml", "-o", recipe)
    assert done.code == 2 and not recipe.exists(), done
    assert "seed.yml:9:5: datasets[0].type: openhermes is not supported" in done.err and "--force" in done.err
    assert "Traceback" not in done.err
    assert re.search(r"datasets\[0\]\.shards +10 +translated +→ rows: 0\.1; .*not the same", done.out), done

    done = script("import_axolotl", FIXTURES / "seed.yml", "-o", recipe, "--force")
    assert done.code == 0, done
    assert f"python scripts/sft.py --recipe {recipe}" in done.out
    text = recipe.read_text()
    assert "# Left out: datasets[0].type: openhermes" in text
    for banner in ("model", "data", "method", "training", "saving and monitoring"):
        assert f"# ---- {banner} ----" in text
    assert load.load(str(recipe), []).values == {
        "model_name_or_path": "teknium/OpenHermes-2.5-Mistral-7B",
        "dtype": "auto",
        "datasets": [{"path": "teknium/openhermes", "rows": 0.1}],
        "test_split_size": 0.05,
        "max_length": 2048,
        "packing": True,
        "use_peft": True,
        "lora_r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj"],
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 3.0,
        "optim": "paged_adamw_8bit",
        "learning_rate": 0.0002,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "bf16": "auto",
        "gradient_checkpointing": True,
        "output_dir": "./qlora-out-hermes",
        # Axolotl's defaults
        "per_device_eval_batch_size": 1,
        "warmup_steps": 0.03,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 4,
    }


def test_qlora_under_deepspeed(tmp_path: Path) -> None:
    """Guards the launch command: strategy and W&B's variables stand in it, not in the recipe."""
    recipe = tmp_path / "qlora.yaml"
    done = script("import_axolotl", FIXTURES / "qlora_deepspeed.yml", "-o", recipe)
    assert done.code == 0, done
    command = (
        "WANDB_PROJECT=support-bot WANDB_ENTITY=techco accelerate launch --config_file "
        f"accelerate_configs/zero3_offload.yaml --num_processes 2 scripts/sft.py --recipe {recipe}"
    )
    assert command in done.out and f"#   {command}\n" in recipe.read_text()
    values = load.load(str(recipe), []).values
    assert values["datasets"] == [
        {"path": "fozziethebeat/alpaca_messages_2k_test"},
        {"path": "data/support.jsonl", "column_map": {"messages": "dialogue"}},
    ]
    assert values["lora_target_modules"] == ["all-linear"]
    assert values["load_in_4bit"] and values["use_bnb_nested_quant"] and values["bnb_4bit_quant_type"] == "nf4"
    assert "dtype" not in values, "quantization decides it"
    assert values["learning_rate"] == 0.0002 and values["warmup_steps"] == 0.1
    assert (values["eval_strategy"], values["eval_steps"], values["save_strategy"]) == ("steps", 0.0625, "epoch")
    assert (values["report_to"], values["run_name"]) == (["wandb"], "qlora-1")
    assert values["attn_implementation"] == "flash_attention_2"
    assert values["packing"] and values["eval_packing"] is False


def test_full_fine_tuning_under_fsdp(tmp_path: Path) -> None:
    """Guards the older spelling of FSDP's keys, and an evaluation set of its own."""
    recipe = tmp_path / "full.yaml"
    done = script("import_axolotl", FIXTURES / "fsdp.yml", "-o", recipe)
    assert done.code == 0, done
    assert "--config_file accelerate_configs/fsdp_offload.yaml" in done.out
    values = load.load(str(recipe), []).values
    assert (values["dataset_name"], values["dataset_train_split"]) == ("mhenrichsen/alpaca_2k_test", "train[:90%]")
    assert (values["eval_dataset_name"], values["dataset_test_split"]) == ("mhenrichsen/alpaca_2k_test", "train[90%:]")
    assert values["prompt_template"].endswith("### Instruction:\n{input}\n\n### Response:\n")
    assert values["lr_scheduler_type"] == "cosine_with_min_lr"
    assert values["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert values["gradient_checkpointing"] is True and values["dtype"] == "bfloat16"
    assert values["max_steps"] == 500 and "num_train_epochs" not in values
    assert (values["eval_strategy"], values["eval_steps"], values["save_steps"]) == ("steps", 100, 250)


def test_table_as_json(tmp_path: Path) -> None:
    """Guards what a program reads: every key with its line, and no secret."""
    file = tmp_path / "c.yml"
    file.write_text("base_model: m\ncomet_api_key: hunter2\nsequence_len: 512\n")
    done = script("import_axolotl", file, "-o", tmp_path / "r.yaml", "--json")
    assert done.code == 0 and "hunter2" not in done.out + (tmp_path / "r.yaml").read_text(), done
    facts = json.loads(done.out)
    assert facts["recipe"] == str(tmp_path / "r.yaml") and facts["command"].startswith("python scripts/sft.py")
    row = next(row for row in facts["keys"] if row["key"] == "sequence_len")
    assert row == {
        "key": "sequence_len",
        "value": 512,
        "outcome": "translated",
        "to": "max_length: 512",
        "reason": "",
        "changes_training": False,
        "where": f"{file}:3:1",
    }


def test_a_terminal_gets_colours(tmp_path: Path) -> None:
    """Guards the table for a person: a terminal gets colours and columns, a pipe gets plain lines."""
    screen, side = pty.openpty()
    words = ["scripts/import_axolotl.py", str(FIXTURES / "seed.yml"), "-o", str(tmp_path / "r.yaml"), "--force"]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm-256color"}
    )
    os.close(side)
    shown = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(screen)
    assert process.wait() == 0, shown
    assert b"\x1b[" in shown and b"Axolotl's key" in shown and b"lora_r" in shown


# ---- keys that go wrong ----


def test_a_slip_stops_and_names_the_right_key(tmp_path: Path) -> None:
    """Guards what Axolotl itself lets pass: a wrong key, at the top or in a block, changes the training."""
    file = tmp_path / "c.yml"
    file.write_text(
        "base_model: m\nlora_rnak: 8\ndatasets:\n  - path: d.jsonl\n    spilt: train\nspecial_tokens:\n  pad_tokn: x\n"
    )
    done = script("import_axolotl", file, "-o", tmp_path / "r.yaml")
    assert done.code == 2 and not (tmp_path / "r.yaml").exists(), done
    for where, near in (("2:1", "lora_r"), ("5:5", "split"), ("7:3", "pad_token")):
        assert re.search(rf"c\.yml:{where}: .*\n.*did you mean '{near}'", done.err), done
    done = script("import_axolotl", file, "-o", tmp_path / "r.yaml", "--force")
    assert done.code == 0 and "# Left out: lora_rnak: 8" in (tmp_path / "r.yaml").read_text(), done


def test_values_of_another_type_at_their_place(tmp_path: Path) -> None:
    """Guards the place and the words of a wrong value, in keys that are copied and keys that are computed."""
    file = tmp_path / "c.yml"
    file.write_text("base_model: m\nmicro_batch_size: two\n")
    done = script("import_axolotl", file, "-o", tmp_path / "r.yaml")
    assert done.code == 2 and f"{file}:2:1" in done.err and "'two' is not an allowed value" in done.err, done
    file.write_text("base_model: m\nval_set_size: some\n")
    done = script("import_axolotl", file, "-o", tmp_path / "r.yaml", "--force")
    assert done.code == 2 and f"{file}:2:1: val_set_size takes a number, found 'some'" in done.err, done


def test_contradictions_take_neither_side(tmp_path: Path) -> None:
    """Guards against the later of two keys winning without a word."""
    result = translate(tmp_path, {"base_model": "m", "flash_attention": True, "eager_attention": True})
    assert outcome(result, "flash_attention").kind == TRANSLATED
    assert outcome(result, "eager_attention").changes_training
    assert "flash_attention_2" in outcome(result, "eager_attention").reason


@pytest.mark.parametrize("types", [("alpaca", "chat_template"), ("alpaca", "alpaca:chat"), ("alpaca", "unheard_of")])
def test_sets_that_are_rendered_differently(types: tuple[str, str], tmp_path: Path) -> None:
    """Guards against one set's prompt text being put around the rows of another."""
    sets = [{"path": f"{number}.jsonl", "type": kind} for number, kind in enumerate(types)]
    result = translate(tmp_path, {"base_model": "m", "datasets": sets})
    assert all(outcome(result, f"datasets[{number}].type").changes_training for number in (0, 1))
    assert "prompt_template" not in result.recipe


@pytest.mark.parametrize(
    ("top", "templates", "template", "stopped"),
    [
        (None, ["chatml", None], None, [0]),  # the second is rendered by the model's own
        ("chatml", [None, "tokenizer_default"], None, ["", 1]),
        ("llama3", ["chatml", "chatml"], "chatml", []),
        ("chatml", [None, "chatml"], "chatml", []),
    ],
)
def test_sets_with_templates_of_their_own(top, templates, template, stopped, tmp_path: Path) -> None:
    """Guards against one set's chat template being put around the rows of another."""
    sets = [{"path": f"{n}.jsonl", "type": "chat_template", "chat_template": name} for n, name in enumerate(templates)]
    result = translate(tmp_path, {"base_model": "m", "datasets": sets, "chat_template": top})
    places = [f"datasets[{n}].chat_template" if n != "" else "chat_template" for n in stopped]
    assert sorted(row.key for row in result.rows if row.stops) == sorted(places)
    assert result.recipe.get("chat_template") == template


def test_merged_sets_in_their_own_order(tmp_path: Path) -> None:
    """Guards curriculum_sampling: Axolotl shuffles sets that it merges unless it is told not to."""
    sets = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
    content = {"base_model": "m", "datasets": sets, "curriculum_sampling": True}
    assert outcome(translate(tmp_path, content), "curriculum_sampling").changes_training
    kept = translate(tmp_path, content | {"shuffle_merged_datasets": False})
    assert kept.recipe["train_sampling_strategy"] == "sequential"


def test_the_best_checkpoint_by_default(tmp_path: Path) -> None:
    """Guards Axolotl's silent default: with saves and evaluations in step, its result is the best checkpoint."""
    content = {"base_model": "m", "val_set_size": 0.1, "save_steps": 100}
    implied = [row.key for row in translate(tmp_path, content | {"eval_steps": 50}).rows]
    assert "(load_best_model_at_end)" in implied
    assert "(load_best_model_at_end)" not in [row.key for row in translate(tmp_path, content | {"eval_steps": 60}).rows]


def test_a_templates_file(tmp_path: Path) -> None:
    """Guards chat_template_jinja as a path, relative to the configuration."""
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    result = translate(tmp_path, {"base_model": "m", "chat_template": "jinja", "chat_template_jinja": "t.jinja"})
    assert result.recipe["chat_template_path"] == str(tmp_path / "t.jinja")


def test_a_template_that_no_set_is_rendered_by(tmp_path: Path) -> None:
    """Guards a false stop: with sets of type alpaca alone, Axolotl trains nothing by its chat template."""
    sets = [{"path": "d.jsonl", "type": "alpaca"}]
    result = translate(tmp_path, {"base_model": "m", "datasets": sets, "chat_template_jinja": "{{ messages }}"})
    assert not [row for row in result.rows if row.stops] and "chat_template" not in result.recipe


def test_templates_of_one_name_render_one_text() -> None:
    """Guards the translation of Axolotl's template names by what its own templates render for two turns."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from stepladder.data import templates

    gemma = "<BOS><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    gemma4 = "<BOS><|turn>user\nHi?<turn|>\n<|turn>model\nYes.<turn|>\n"
    turns = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    qwen3 = f"{turns}<think>\n\n</think>\n\nYes.<|im_end|>\n"
    helpful = "You are a helpful assistant.<|im_end|>\n"
    cohere = (
        "<BOS><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Yes.<|END_OF_TURN_TOKEN|>"
    )
    rendered = {  # written down from Axolotl's own files, by the name there
        "chatml": f"{turns}Yes.<|im_end|>\n",
        "llama3": "<BOS><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
        **dict.fromkeys(("gemma", "gemma3", "gemma3n"), gemma),
        **dict.fromkeys(("gemma4", "gemma4_unified"), gemma4),
        **dict.fromkeys(("qwen3", "qwen3_5"), qwen3),
        **dict.fromkeys(("aya", "cohere"), cohere),
        "qwen_25": f"<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. {helpful}{turns}Yes.<|im_end|>\n",
        "qwen2_vl": f"<|im_start|>system\n{helpful}{turns}Yes.<|im_end|>\n",
        "deepseek_v3": "<BOS><｜User｜>Hi?<｜Assistant｜>Yes.<｜end▁of▁sentence｜>",
    }
    # those with another end, and with today's date
    assert axolotl_config.table()["templates"].keys() - rendered.keys() == {"phi_3", "phi_35", "llama3_2_vision"}
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    for name, text in rendered.items():
        template = templates.load_template(axolotl_config.table()["templates"][name])
        shown = render_jinja_template([messages], chat_template=template, bos_token="<BOS>")[0][0]
        assert shown == text, name


def test_plain_text_goes_with_any_rendering(tmp_path: Path) -> None:
    """Guards `completion` beside another type: its rows are rendered by neither template."""
    sets = [{"path": "a.jsonl", "type": "alpaca"}, {"path": "b.jsonl", "type": "completion"}]
    result = translate(tmp_path, {"base_model": "m", "datasets": sets})
    assert "### Instruction" in result.recipe["prompt_template"]
    assert [row.key for row in result.rows if row.stops] == []


def test_more_than_one_evaluation_set(tmp_path: Path) -> None:
    """Guards the account of sets that are not used, and of keys that only training sets have."""
    first = {"path": "e.jsonl", "split": "train", "field_messages": "turns", "name": "x"}
    training = {"path": "d.jsonl", "field_messages": "turns"}
    result = translate(
        tmp_path, {"base_model": "m", "datasets": [training], "test_datasets": [first, {"path": "f.jsonl"}]}
    )
    assert result.recipe["eval_dataset_name"] == "e.jsonl" and result.recipe["column_map"] == {"messages": "turns"}
    assert outcome(result, "test_datasets[0].field_messages").kind == DROPPED
    assert outcome(result, "test_datasets[1].path").kind == UNSUPPORTED
    assert not outcome(result, "test_datasets[1].path").changes_training


def test_comments_stay_comments(tmp_path: Path) -> None:
    """Guards the recipe's head: a value with a line break must not become a key of the recipe."""
    content = {"base_model": "m", "wandb_project": "a\nmax_steps: 1", "lora_rnak": "b\nmax_steps: 2"}
    result = translate(tmp_path, content)
    axolotl_import.write_recipe(result, tmp_path / "r.yaml")
    assert load.load(str(tmp_path / "r.yaml"), []).values == result.recipe


def test_deepspeeds_own_file_is_read(tmp_path: Path) -> None:
    """Guards against a name that says another stage than the file."""
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert translate(tmp_path, {"base_model": "m", "deepspeed": "zero3.json"}).strategy == "zero2"
    (tmp_path / "zero3.json").write_text("{")
    with pytest.raises(RecipeError, match=r"zero3\.json cannot be read"):
        translate(tmp_path, {"base_model": "m", "deepspeed": "zero3.json"})


def test_axolotls_defaults_are_written_out(tmp_path: Path) -> None:
    """Guards a key that is not set: TRL's default in its place would train something else."""
    result = translate(tmp_path, {"base_model": "m", "adapter": "lora"})
    assert result.recipe == {
        "model_name_or_path": "m",
        "use_peft": True,
        "max_length": 512,
        "lora_dropout": 0.0,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "gradient_checkpointing": False,
        "dtype": "bfloat16",
        "save_strategy": "epoch",
        "save_total_limit": 4,
    }
    yields = translate(tmp_path, {"base_model": "m", "lr_scheduler": "constant", "save_strategy": "no"})
    assert not {"warmup_steps", "save_total_limit"} & yields.recipe.keys()


@pytest.mark.parametrize("value", [[], {}, [1], {"a": 1}, [{"a": [1]}], "2e-4", "x", -1, 0.5, True, "", None, 2**70])
def test_no_value_of_any_key_is_a_crash(value: Any, tmp_path: Path) -> None:
    """Guards the tables' functions: whatever stands at a key is accounted for, or refused in words."""
    for key in sorted({case.values[0] for case in CASES}):  # type: ignore[attr-defined]
        content, path = configuration(key, {"value": value})
        try:
            result = translate(tmp_path, {"base_model": "m", **content})
        except RecipeError:
            continue
        assert any(row.key.startswith(path.removesuffix("[0]")) for row in result.rows), key


# ---- files that go wrong ----


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["there is no file"]),
        ("", ["the file is empty"]),
        ("- base_model: m\n", ["no block"]),
        ("base_model: [m\n", [":2:", "invalid YAML"]),
        ("base_model: m\n\tadapter: lora\n", [":2:", "tab"]),
        ("base_model: m\nadapter: lora\nadapter: qlora\n", [":3:1", "'adapter' stands twice"]),
        ("model_name_or_path: m\nmax_steps: 3\n", ["no Axolotl configuration", "needs no import"]),
        ("base_modle: m\n", ["no Axolotl configuration", "write base_model for base_modle"]),
        ("base_model: m\ndatasets: rows.jsonl\n", [":2:1", "a list of blocks"]),
        ("base_model: m\nval_set_size: 2000-13-40\n", [":2:1", "val_set_size"]),
    ],
)
def test_bad_files(content: str | None, parts: list[str], tmp_path: Path) -> None:
    """Guards the messages for a file that cannot be imported: exit code 2, no traceback, nothing written."""
    file = tmp_path / "config.yml"
    if content is not None:
        file.write_text(content)
    done = script("import_axolotl", file, "-o", tmp_path / "recipe.yaml", "--force")
    assert done.code == 2 and "Traceback" not in done.err and done.out == "", done
    assert all(part in done.err for part in [str(file), *parts]), done
    assert {p.name for p in tmp_path.iterdir()} <= {"config.yml"}


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    """Guards a person's own recipe, and the configuration itself."""
    file, recipe = tmp_path / "c.yml", tmp_path / "r.yaml"
    file.write_text("base_model: m\n")
    recipe.write_text("mine: yes\n")
    done = script("import_axolotl", file, "-o", recipe)
    assert done.code == 2 and "--overwrite" in done.err and recipe.read_text() == "mine: yes\n", done
    done = script("import_axolotl", file, "-o", file, "--overwrite")
    assert done.code == 2 and file.read_text() == "base_model: m\n", done
    done = script("import_axolotl", file, "-o", tmp_path)
    assert done.code == 2 and "is a folder" in done.err, done
    done = script("import_axolotl", file, "-o", recipe, "--overwrite")
    assert done.code == 0 and "model_name_or_path: m" in recipe.read_text(), done


def test_a_library_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards imports under another TRL: a key that it lacks is accounted for, not written."""
    keys = {name: key for name, key in axolotl_import.known_keys().items() if name != "neftune_noise_alpha"}
    monkeypatch.setattr(axolotl_import, "known_keys", lambda: keys)
    result = translate(tmp_path, {"base_model": "m", "neftune_noise_alpha": 5})
    assert outcome(result, "neftune_noise_alpha").changes_training
    assert "neftune_noise_alpha" not in result.recipe
