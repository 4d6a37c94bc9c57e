"""Configuration files of other tools, given as a recipe: named, with lines that a recipe can begin with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT, script
from stepladder.errors import RecipeError
from stepladder.recipe import axolotl_config, foreign, load
from stepladder.recipe.schema import known_keys

# What people have: tool, file name, content, and the values that a recipe made of the message's lines must hold.
FILES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "LLaMA-Factory": (
        "LLaMA-Factory",
        "sft.yaml",
        """
        model_name_or_path: org/model
        stage: sft
        do_train: true
        finetuning_type: lora
        lora_rank: 8
        lora_target: q_proj,v_proj
        dataset: identity,alpaca_en_demo
        template: qwen3_nothink
        cutoff_len: 2048
        max_samples: 1000
        val_size: 0.0
        quantization_bit: 4
        plot_loss: true
        warmup_ratio: 0.1
        learning_rate: 1.0e-4
        bf16: true
        some_key_of_tomorrow: 3
        """,
        {
            "model_name_or_path": "org/model",
            "use_peft": True,
            "lora_r": 8,
            "lora_target_modules": ["q_proj", "v_proj"],
            "max_length": 2048,
            "load_in_4bit": True,
            "warmup_steps": 0.1,
            "learning_rate": 0.0001,
            "bf16": True,
        },
    ),
    "LLaMA-Factory as JSON": (
        "LLaMA-Factory",
        "train_lora.json",
        '{"stage": "sft", "do_train": true, "model_name_or_path": "org/model", "finetuning_type": "lora",'
        ' "lora_target": "all", "per_device_train_batch_size": 2, "max_grad_norm": 1.0, "fp16": true}',
        {
            "model_name_or_path": "org/model",
            "use_peft": True,
            "lora_target_modules": ["all-linear"],
            "per_device_train_batch_size": 2,
            "max_grad_norm": 1.0,
            "fp16": True,
        },
    ),
    "torchtune": (
        "torchtune",
        "lora.yaml",
        """
        output_dir: /tmp/out
        model:
          _component_: torchtune.models.llama3_1.lora_llama3_1_8b
          apply_lora_to_mlp: true
          lora_rank: 8
          lora_alpha: 16
        checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: org/model}
        dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset, packed: false}
        tokenizer: {max_seq_len: null}
        seed: null
        batch_size: 2
        epochs: 1
        optimizer: {_component_: torch.optim.AdamW, lr: 3e-4, weight_decay: 0.01}
        dtype: bf16
        enable_activation_checkpointing: true
        """,
        {
            "output_dir": "/tmp/out",
            "use_peft": True,
            "lora_r": 8,
            "lora_alpha": 16,
            "model_name_or_path": "org/model",
            "packing": False,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1.0,
            "learning_rate": 0.0003,
            "weight_decay": 0.01,
            "bf16": True,
            "gradient_checkpointing": True,
        },
    ),
    "litgpt": (
        "litgpt",
        "qlora.yaml",
        """
        checkpoint_dir: checkpoints/org/model
        out_dir: out/qlora
        precision: bf16-true
        quantize: bnb.nf4
        lora_r: 32
        lora_query: true
        lora_value: true
        data: {class_path: litgpt.data.Alpaca2k, init_args: {mask_prompt: false, val_split_fraction: 0.05}}
        train: {global_batch_size: 8, micro_batch_size: 2, epochs: 2, max_seq_length: 512, max_tokens: }
        eval: {interval: 100}
        optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.0002}}
        seed: 1337
        """,
        {
            "output_dir": "out/qlora",
            "bf16": True,
            "load_in_4bit": True,
            "lora_r": 32,
            "use_peft": True,
            "train_on": "everything",
            "test_split_size": 0.05,
            "global_batch_size": 8,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 2.0,
            "max_length": 512,
            "learning_rate": 0.0002,
            "seed": 1337,
        },
    ),
    "ms-swift as YAML": (
        "ms-swift",
        "sft.yaml",
        """
        model: org/model
        tuner_type: lora
        lora_rank: 8
        target_modules: all-linear
        dataset: ['org/rows#500']
        split_dataset_ratio: 0.0
        torch_dtype: bfloat16
        attn_impl: flash_attn
        eval_steps: 50
        max_length: 2048
        """,
        {
            "model_name_or_path": "org/model",
            "use_peft": True,
            "lora_r": 8,
            "lora_target_modules": ["all-linear"],
            "dtype": "bfloat16",
            "attn_implementation": "flash_attention_2",
            "max_length": 2048,
        },
    ),
    "ms-swift as a script": (
        "ms-swift",
        "train.sh",
        "# 22GB\nCUDA_VISIBLE_DEVICES=0 \\\nswift sft \\\n    --model org/model \\\n    --train_type lora \\\n"
        "    --dataset 'org/rows#500' \\\n              'org/more#500' \\\n    --learning_rate 1e-4 \\\n"
        "    --packing true \\\n    --system 'You are a helpful assistant.' \\\n    --warmup-ratio=0.05\n",
        {
            "model_name_or_path": "org/model",
            "use_peft": True,
            "learning_rate": 0.0001,
            "packing": True,
            "warmup_steps": 0.05,
        },
    ),
}


def write(folder: Path, name: str, content: str) -> Path:
    file = folder / name
    lines = content.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    file.write_text("\n".join(line[indent:] for line in lines) + "\n")
    return file


def refusal(file: Path) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load.load(str(file), [])
    return caught.value


@pytest.mark.parametrize("case", FILES)
def test_the_lines_of_the_message_are_a_recipe(case: str, tmp_path: Path) -> None:
    """Guards each table: the tool is named, and the lines that it prints load and mean what the file meant."""
    tool, name, content, values = FILES[case]
    error = refusal(write(tmp_path, name, content))
    assert tool in error.what and "unknown key" not in error.render()
    lines = error.help.splitlines()[1:]
    assert all(re.match(r"\w+: |# ", line) for line in lines), lines
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join([*lines, "dataset_name: rows.jsonl", "eval_strategy: epoch"]))
    loaded = load.load(str(recipe), []).values
    assert {key: loaded[key] for key in loaded if key not in ("dataset_name", "eval_strategy")} == values


def test_a_key_without_a_counterpart_is_named(tmp_path: Path) -> None:
    """Guards what the lines do not say: a key that is not in the table stands in the message."""
    _, name, content, _ = FILES["LLaMA-Factory"]
    assert "# no counterpart is known for some_key_of_tomorrow" in refusal(write(tmp_path, name, content)).help


def test_an_axolotl_configuration_is_sent_to_its_importer(tmp_path: Path) -> None:
    """Guards the command in the message, for sft.py and plan.py as for check.py."""
    error = refusal(write(tmp_path, "a.yml", "base_model: org/model\nadapter: lora\n"))
    assert "Axolotl" in error.what and "import_axolotl.py" in error.help


@pytest.mark.parametrize("file", ["accelerate_configs/zero2.yaml", "ds_configs/zero2.json"])
def test_a_file_of_the_launch_is_no_recipe(file: str) -> None:
    """Guards a mix-up of --recipe and --config_file."""
    assert "accelerate launch --config_file" in refusal(ROOT / file).help


def test_the_importer_names_the_tool_too(tmp_path: Path) -> None:
    """Guards import_axolotl.py against "no base_model" for a file that is no Axolotl configuration at all."""
    _, name, content, _ = FILES["LLaMA-Factory"]
    with pytest.raises(RecipeError, match="configuration of LLaMA-Factory"):
        axolotl_config.read_config(write(tmp_path, name, content))


def test_a_parent_of_another_tool(tmp_path: Path) -> None:
    """Guards `extends`: the file that is named is the one that is not a recipe."""
    _, _, content, _ = FILES["LLaMA-Factory"]
    write(tmp_path, "parent.yaml", content)
    error = refusal(write(tmp_path, "child.yaml", f"extends: {tmp_path}/parent.yaml\n"))
    assert "LLaMA-Factory" in error.what and error.where.endswith("parent.yaml")


def test_a_slip_in_a_recipe_is_still_a_slip(tmp_path: Path) -> None:
    """Guards recipes: one key of another tool's among ours is an unknown key, with its place."""
    error = refusal(write(tmp_path, "r.yaml", "dataset_name: a.jsonl\nlora_rank: 8\ntemplate: chatml\n"))
    assert "unknown key 'lora_rank'" in error.render() and "unknown key 'template'" in error.render()


@pytest.mark.parametrize("content", ["#!/bin/bash\necho hello\n", "#!/usr/bin/env python\nprint()\n"])
def test_a_script_of_no_known_tool(content: str, tmp_path: Path) -> None:
    """Guards scripts that start nothing known: one message, and no complaint of their YAML."""
    assert "script" in refusal(write(tmp_path, "run", content)).what


@pytest.mark.parametrize(
    "tail", ["--", "--model", "--model=", "--model --train_type", "--x 'open", "--é 1", "--a.b.c 2"]
)
def test_no_script_is_a_crash(tail: str, tmp_path: Path) -> None:
    """Guards the reading of flags: whatever follows the command is a key, a value, or nothing."""
    assert "ms-swift" in refusal(write(tmp_path, "run.sh", f"swift sft {tail}")).what


@pytest.mark.parametrize(
    "value", ["[]", "{}", "[1]", "{a: 1}", "[{a: [1]}]", "x", "-1", "true", "!!float x", "2025-13-40"]
)
def test_no_value_is_a_crash(value: str, tmp_path: Path) -> None:
    """Guards the tables: whatever stands at a key of theirs, the tool is named."""
    for name, tool in foreign.tools().items():
        keys = [key for key in tool.get("keys", {}) if "." not in key]
        content = "\n".join(f"{key}: {value}" for key in dict.fromkeys([*keys, *tool["alone"]]) if "*" not in key)
        if name not in ("torchtune", "litgpt", "DeepSpeed"):  # recognized by what stands inside a block
            assert name in refusal(write(tmp_path, "c.yaml", content)).what


def test_the_table_names_keys_that_exist() -> None:
    """Guards foreign.yaml against a slip, and against a mark that is a recipe's own key."""
    for name, tool in foreign.tools().items():
        assert not {*tool["alone"], *tool.get("together", ())} & known_keys().keys(), name
        for key, target in tool.get("keys", {}).items():
            for said in target.values() if isinstance(target, dict) else [target]:
                if said and " " not in said:
                    assert said in known_keys(), (name, key, said)
                elif isinstance(target, dict) and (written := re.match(r"(\w+): (.+)", said)):
                    assert written[1] in known_keys() and yaml.safe_load(said), (name, key, said)


def test_a_person_reads_one_message(tmp_path: Path) -> None:
    """Guards the command line: exit code 2, no traceback, no list of unknown keys."""
    _, name, content, _ = FILES["ms-swift as a script"]
    done = script("check", "--recipe", write(tmp_path, name, content), "--show")
    assert done.code == 2 and "ms-swift" in done.err and "Traceback" not in done.err, done
