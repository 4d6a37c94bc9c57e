"""The mistakes that people make, through the command line: exit code 2, one message, no traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from conftest import ROOT, launch, run, script

GOOD = {"input": "What is the answer to it all?", "output": "Forty-two, as everybody knows."}


def refused(done, *parts: str) -> None:
    assert done.code == 2, done
    assert "Traceback" not in done.err + done.out, done
    for part in parts:
        assert part in done.err, done


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "good.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    return file


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--allow_change", "learning_rat"), ("--allow_change: unknown key 'learning_rat'", "'learning_rate'")),
        (("--callback", "none.py"), ("--callback none.py: there is no such file",)),
    ],
    ids=["a change of no key", "a callback that is not there"],
)
def test_flags_that_are_used_late_are_checked_first(words, parts, tiny, data, write_recipe, tmp_path) -> None:
    """Guards minutes of loading, and a change that is allowed under a wrong name and so is refused after them."""
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name=str(data))
    refused(script("sft", "--recipe", recipe, "--output_dir", tmp_path / "run", *words), *parts)
    assert not (tmp_path / "run").exists()


def test_submit_outside_the_repository(tmp_path: Path) -> None:
    """Guards a copy of scripts and recipes without slurm/: it was a traceback."""
    for name in ("recipes", "data", "models", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = run("env", "-C", tmp_path, sys.executable, ROOT / "scripts/submit.py", "--recipe", "lora", "--dry_run")
    refused(done, "there is no slurm/sft.sbatch here")


def test_no_recipe() -> None:
    refused(script("sft"), "no recipe given", "--recipe")


def test_missing_recipe_names_the_near_one() -> None:
    refused(script("sft", "--recipe", "qlorra"), "there is no recipe 'qlorra'", "'qlora'")


def test_invalid_yaml_at_its_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("max_steps: 3\nlearning_rate: [1, 2\n")
    refused(script("sft", "--recipe", file), f"{file}:", "invalid YAML")


def test_unknown_key_at_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("max_steps: 3\nlearing_rate: 1.0e-4\n")
    refused(script("sft", "--recipe", file), f"{file}:2:1", "'learing_rate'", "'learning_rate'")


def test_missing_model(tiny, data, write_recipe) -> None:
    recipe = write_recipe(model_name_or_path="models/nothing-here", dataset_name=str(data))
    refused(script("sft", "--recipe", recipe), "models/nothing-here", "recipe.yaml:1:1")


def test_missing_data_file(tiny, write_recipe) -> None:
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name="data/techko.jsonl")
    refused(script("sft", "--recipe", recipe), "data/techko.jsonl")


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (["", ""], ["holds no rows"]),
        ([json.dumps(GOOD), '{"input": "half'], [":2", "invalid JSON"]),
        ([json.dumps({"frage": "Wie?", "antwort": "So."})], ["'frage'", "input"]),
        ([json.dumps({"input": "What is missing here?", "output": None})], [":1", "assistant"]),
    ],
    ids=["empty", "broken JSON", "unknown columns", "null"],
)
def test_bad_data_at_its_line(lines, parts, tiny, write_recipe, tmp_path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines) + "\n")
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name=str(file))
    refused(script("sft", "--recipe", recipe), str(file), *parts)


def test_a_global_batch_smaller_than_the_ranks(tiny, data, write_recipe) -> None:
    """Guards ranks that would never train a row; what only does not divide is filled up with empty ones."""
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name=str(data), global_batch_size=3)
    refused(script("sft", "--recipe", recipe, WORLD_SIZE="4"), "3", "4 ranks", "global_batch_size: 4")


def test_a_finished_run_is_kept(tiny, data, write_recipe, tmp_path) -> None:
    """Guards what already stands: neither a run nor any other folder is overwritten by mistake."""
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name=str(data))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "finished"}')
    refused(script("sft", "--recipe", recipe, "--output_dir", folder), "finished", "--overwrite")
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("years of work")
    refused(script("sft", "--recipe", recipe, "--output_dir", other, "--overwrite"), "no run folder")
    assert (other / "chapter1.tex").read_text() == "years of work"


def test_weights_in_a_pickle_are_refused(tmp_path, data, write_recipe) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    recipe = write_recipe(model_name_or_path=str(folder), dataset_name=str(data))
    refused(script("sft", "--recipe", recipe), "safetensors")


def test_a_mistake_on_several_ranks_is_told_by_one(tmp_path: Path) -> None:
    """Guards rank 0's monopoly on messages; torchrun's own closing report repeats the reason."""
    file = tmp_path / "r.yaml"
    file.write_text("learing_rate: 1.0e-4\n")
    done = launch("ddp", 2, "sft", "--recipe", file)
    assert done.code != 0
    said = done.err.split("Failures:")[0]
    assert said.count("unknown key 'learing_rate'") == 1, done
    assert "unknown key 'learing_rate'" in done.err.split("Root Cause")[1], done


def test_generate_and_compare_refuse_what_is_no_model(tmp_path: Path) -> None:
    refused(script("generate", "--model", tmp_path, "--prompt", "Hello there"), "no model")
    refused(
        script("compare", "--base", "models/none", "--tuned", "models/none", "--data", "data/techco_eval.jsonl"),
        "models/none",
    )
