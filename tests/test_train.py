"""Each technique under each shipped accelerate config, through the real command lines, on the tiny model.

The curves are compared with one plain process. The rows do not divide the global batch, so each
run goes over two epoch ends; micro-batch and packing vary over the pairs, so that each value of
each axis meets several of the others.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, launch, losses, manifest, script
from stepladder.evaluation import curves

TECHNIQUES = {
    "full": {},
    "lora": {"use_peft": True},
    "qlora": {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True},
    "dora": {"use_peft": True, "use_dora": True},
}
ADAPTER = {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
ROWS, STEPS = 22, 6  # three steps an epoch, the last of each with 6 rows of 8

# technique, accelerate config, ranks, micro-batch, packed
PAIRS = [
    *(("full", c, n, m, p) for c, n, m, p in [
        ("single", 1, 4, False), ("ddp", 2, 2, False), ("ddp", 4, 1, True), ("zero2", 2, 4, False),
        ("zero3", 2, 2, False), ("zero3_offload", 2, 1, False), ("fsdp", 2, 2, True), ("fsdp_offload", 2, 4, False),
    ]),
    *(("lora", c, n, m, p) for c, n, m, p in [
        ("single", 1, 1, False), ("ddp", 2, 1, False), ("zero2", 2, 2, False), ("zero3", 2, 4, False),
        ("zero3_offload", 2, 2, False), ("fsdp", 2, 1, False), ("fsdp_offload", 2, 2, False),
    ]),
    *(("qlora", c, n, m, p) for c, n, m, p in [
        ("single", 1, 4, False), ("ddp", 2, 2, False), ("zero2", 2, 1, False), ("zero3", 2, 2, False),
        ("zero3_offload", 2, 4, False), ("fsdp", 2, 4, False), ("fsdp_offload", 2, 1, False),
    ]),
    ("dora", "fsdp", 2, 2, False),
]  # fmt: skip
ZERO = {"zero2", "zero3", "zero3_offload"}


def recipe_keys(technique: str, model: Path, data: Path) -> dict:
    keys = TECHNIQUES[technique]
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "eval_dataset_name": str(data),
        **keys,
        **(ADAPTER if keys.get("use_peft") else {}),
        "learning_rate": 3e-3,
        "max_steps": STEPS,
        "max_length": 192,  # no row is cut: a set without any end of turn is refused
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,  # the same arithmetic on every machine that runs the tests
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of TechCo's rows, of different lengths, in a number that 8 does not divide."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join(Path("data/techco.jsonl").read_text().splitlines()[:ROWS]) + "\n")
    return file


@pytest.fixture(scope="module")
def base_answer(tiny: Path) -> str:
    return ask(tiny)


def ask(model: Path) -> str:
    """What the model in a folder answers, in this process: the tests compare many."""
    from stepladder.evaluation.generate import answers
    from stepladder.model.load import for_inference

    loaded, tokenizer = for_inference(str(model))
    return answers(loaded, tokenizer, [[{"role": "user", "content": "Where is my order?"}]], max_new_tokens=12)[0]


@pytest.fixture(scope="module")
def reference(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory):
    """The run of a technique in one plain process, by `python scripts/sft.py`, made when it is first asked for."""
    made: dict[tuple[str, bool], Path] = {}

    def of(technique: str, packed: bool) -> Path:
        if (technique, packed) not in made:
            folder = tmp_path_factory.mktemp(f"{technique}-{packed}")
            keys = recipe_keys(technique, tiny, rows) | ({"packing": True, "max_length": 384} if packed else {})
            (folder / "r.yaml").write_text(yaml.safe_dump(keys))
            done = script("sft", "--recipe", folder / "r.yaml", "--output_dir", folder / "run")
            assert done.code == 0, done
            made[technique, packed] = folder / "run"
        return made[technique, packed]

    return of


@pytest.mark.parametrize(("technique", "config", "ranks", "micro", "packed"), PAIRS)
def test_the_same_curve(
    technique, config, ranks, micro, packed, tiny, rows, base_answer, reference, write_recipe, tmp_path
) -> None:
    """Guards against a strategy that runs but learns nothing, saves nothing, or trains something else.

    The tolerances are those of `evaluation/curves.py`. ZeRO's may be ten times theirs for the
    adapters: DeepSpeed's own gradient norm is off by 6e-5, which clips a little differently.
    """
    keys = recipe_keys(technique, tiny, rows) | {"per_device_train_batch_size": micro}
    keys |= {"packing": True, "max_length": 384} if packed else {}
    folder = tmp_path / "run"
    done = launch(config, ranks, "sft", "--recipe", write_recipe(**keys), "--output_dir", folder)
    assert done.code == 0, done

    facts = manifest(folder)
    assert facts["status"] == "finished"
    assert (facts["strategy"], facts["world_size"], facts["global_batch_size"]) == (config, ranks, 8)
    assert facts["totals"]["steps"] == STEPS
    assert len(facts["totals"]["peak_memory_bytes"]) == ranks

    found = curves.difference(reference(technique, packed), folder)
    assert found.steps == STEPS
    assert found.within(10 if config in ZERO else 1), found
    assert losses(folder)[-1] < losses(folder)[0] - 0.5

    assert ask(folder) != base_answer
    assert not list(folder.glob("*.bin")), "a pickle in the result could run code where it is opened"


def test_smollm2_learns_techco_by_lora(smollm2: Path, tmp_path: Path) -> None:
    """Guards the demo: the shipped recipe on the real model changes how it answers."""
    folder = tmp_path / "run"
    done = script(
        "sft", "--recipe", "lora", "--output_dir", folder, "--max_steps", 12, "--eval_strategy", "no",
        "--learning_rate", "1e-3", "--warmup_steps", 1,
    )  # fmt: skip
    assert done.code == 0, done
    curve = losses(folder)
    assert sum(curve[-3:]) / 3 < sum(curve[:3]) / 3 - 0.5

    done = script("compare", "--base", smollm2, "--tuned", folder, "--data", "data/techco_eval.jsonl", "--show", 2)
    assert done.code == 0, done
    before, after = map(float, re.search(r"held-out loss .*: ([\d.]+) before, ([\d.]+) after", done.out).groups())
    assert after < before - 0.5
    done = script("generate", "--model", folder, "--prompt", "How do I track my order?", "--max_new_tokens", 24)
    assert done.code == 0, done
    base = script("generate", "--model", smollm2, "--prompt", "How do I track my order?", "--max_new_tokens", 24)
    assert done.out.strip() and done.out != base.out


def test_the_run_again_from_its_own_recipe_is_the_same(tiny, learnable, write_recipe, tmp_path) -> None:
    """Guards recipe.yaml: it must hold all that the run depends on, the command line's part too."""
    keys = recipe_keys("lora", tiny, learnable) | {"max_steps": 3}
    first, second = tmp_path / "first", tmp_path / "second"
    recipe = write_recipe(**keys)
    done = script("sft", "--recipe", recipe, "--output_dir", first, "--learning_rate", "0.02", "--seed=7")
    assert done.code == 0, done
    done = script("sft", "--recipe", first, "--output_dir", second)
    assert done.code == 0, done
    assert losses(first) == losses(second)
    assert manifest(first)["recipe_hash"] == manifest(second)["recipe_hash"]


def test_a_model_without_template_learns_a_new_one(tiny, learnable, write_recipe, tmp_path) -> None:
    """Guards new turn tokens: added, trained, saved, and in use when it is asked; an adapter refuses them.

    The tiny model stands in for a base model: its template and turn tokens are taken away.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    keys = {"chat_template": "llama3", "eval_strategy": "no", "max_steps": 4}
    folder = tmp_path / "run"
    adapter = write_recipe("adapter", **recipe_keys("lora", base, learnable) | keys)
    done = script("sft", "--recipe", adapter, "--output_dir", folder)
    assert done.code == 2 and "cannot learn new tokens" in done.err and "Traceback" not in done.err, done
    full = write_recipe("full", **recipe_keys("full", base, learnable) | keys)
    done = script("sft", "--recipe", full, "--output_dir", folder)
    assert done.code == 0, done
    assert losses(folder)[-1] < losses(folder)[0]
    from stepladder.model.load import for_inference

    model, tokenizer = for_inference(str(folder))
    assert tokenizer.eos_token == "<|eot_id|>"
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer) > 49152
    done = script("generate", "--model", folder, "--prompt", "What is the password?", "--max_new_tokens", 4)
    assert done.code == 0 and done.out.strip(), done


def test_a_stream_trains_on_the_same_rows_on_any_number_of_ranks(tiny, rows, write_recipe, tmp_path) -> None:
    """Guards sets larger than memory: shuffled through a buffer, over an epoch's end, shared out over the ranks."""
    keys = recipe_keys("full", tiny, rows) | {"streaming": True, "eval_strategy": "no", "max_steps": 5}
    keys |= {"global_batch_size": 2, "per_device_train_batch_size": 1}  # 11 steps an epoch: no remainder
    keys["dataset_name"] = str(rows)
    recipe = write_recipe(**keys)
    done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / "one")
    assert done.code == 0, done
    done = launch("ddp", 2, "sft", "--recipe", recipe, "--output_dir", tmp_path / "two")
    assert done.code == 0, done
    assert curves.difference(tmp_path / "one", tmp_path / "two").within(), done
    endless = write_recipe("endless", **{k: v for k, v in keys.items() if k != "max_steps"})
    done = script("sft", "--recipe", endless, "--output_dir", tmp_path / "three")
    assert done.code == 2 and "needs max_steps" in done.err and "Traceback" not in done.err, done


def test_the_seeds_axolotl_example_trains(tiny, tmp_path) -> None:
    """Guards the way from an Axolotl file to a run: imported, its model and data replaced, it trains here."""
    text = (ROOT / "tests/fixtures/axolotl/seed.yml").read_text()
    text = text.replace("teknium/OpenHermes-2.5-Mistral-7B", str(tiny)).replace(
        "teknium/openhermes", str(ROOT / "data/techco.jsonl")
    )
    config, recipe = tmp_path / "config.yml", tmp_path / "recipe.yaml"
    config.write_text(text)
    done = script("import_axolotl", config, "-o", recipe)
    assert done.code == 2 and "openhermes" in done.err + done.out, done
    done = script("import_axolotl", config, "-o", recipe, "--force")
    assert done.code == 0, done
    # A tenth of 72 rows, of which 5 % would be held out, is too few to train on: half of them do.
    half = recipe.read_text().replace("rows: 0.1", "rows: 0.5")
    recipe.write_text(half)
    done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / "run", "--max_steps", 2, "--bf16", "false",
                  "--max_length", 256)  # fmt: skip
    assert done.code == 0, done
    assert manifest(tmp_path / "run")["totals"]["steps"] == 2
