"""Each method under each shipped accelerate config, through the real command lines, on the tiny model.

The curves are compared with one plain process: a slice of the matrix of tests/same_curve.py, in
which each micro-batch and packing meets several methods and strategies.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import same_curve
from conftest import ROOT, launch, losses, manifest, script
from same_curve import METHODS, STRATEGIES, Cell
from stepladder.reporting import curves

STEPS = 7  # over two epoch ends: three steps an epoch, the last of each with 6 rows of 8


def slice_of(config: str, ranks: int) -> list[Cell]:
    """Two methods under a strategy; methods, packing and micro-batch change from one to the next."""
    if config == "hsdp":  # with accumulation, which it does in its own way
        return [Cell(method, config, ranks, 1, "unpacked") for method in ("full", "qlora")]
    first = STRATEGIES.index((config, ranks))
    methods, packings = list(METHODS), list(same_curve.PACKED)
    return [
        Cell(methods[(first + at) % 4], config, ranks, same_curve.MICRO[first % 3], packings[(first // 4 + at) % 2])
        for at in (0, 1)
    ]


def recipe_keys(method: str, model: Path, data: Path) -> dict:
    return same_curve.recipe_keys(method, model, data, steps=STEPS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return same_curve.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def runs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory):
    """The folder that holds a strategy's runs, made by one launch when the first of them is asked for."""
    folder = tmp_path_factory.mktemp("same-curve")
    same_curve.run_all([Cell(m, "plain", 1, 2, packed) for m in METHODS for packed in same_curve.PACKED],
                       folder, STEPS)  # fmt: skip
    done: set[tuple[str, int]] = set()

    def of(config: str, ranks: int) -> Path:
        if (config, ranks) not in done:
            same_curve.run_all(slice_of(config, ranks), folder, STEPS)
            done.add((config, ranks))
        return folder

    return of


CELLS = [cell for strategy in STRATEGIES for cell in slice_of(*strategy)]


SLOW = {cell: cell.ranks > 2 or "offload" in cell.config for cell in CELLS}  # half a minute each and more


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=cell.name, marks=[pytest.mark.proof] if SLOW[cell] else []) for cell in CELLS]
)
def test_the_same_curve(cell: Cell, runs, tiny: Path) -> None:
    """Guards against a strategy that runs but learns nothing, saves nothing, or trains something else.

    The tolerances are those of `reporting/curves.py`; the saved result, loaded in one process,
    has the logits of the plain process's, gives its answer, and not the base's.
    """
    folder = runs(cell.config, cell.ranks)
    found = same_curve.judged(cell, folder, STEPS)
    assert found["outcome"] == "equal", found

    run = folder / cell.name
    facts = manifest(run)
    assert (facts["strategy"], facts["world_size"], facts["global_batch_size"]) == (cell.config, cell.ranks, 8)
    assert facts["totals"]["steps"] == STEPS and len(facts["totals"]["peak_memory_bytes"]) == cell.ranks
    assert losses(run)[-1] < losses(run)[0] - 0.2
    assert same_curve.answer_of(run)[1] != same_curve.answer_of(tiny)[1]
    assert {file.stat().st_mode for file in run.glob("*.safetensors")} == {(run / "run.json").stat().st_mode}
    assert not list(run.glob("*.bin")), "a pickle in the result could run code where it is opened"


@pytest.mark.proof
def test_bf16_under_fsdp_keeps_the_loss_and_the_sums_in_fp32(smollm2: Path, tmp_path: Path) -> None:
    """Guards `gradients.sum_in_fp32`: without it the loss is rounded to 8 bits and the curves part by 1.2e-2."""
    cell = Cell("lora", "fsdp", 2, 2, "unpacked", "bf16")
    same_curve.run_all([cell.reference, cell], tmp_path, STEPS)
    found = same_curve.judged(cell, tmp_path, STEPS)
    assert found["outcome"] == "equal", found
    assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in losses(tmp_path / cell.name))


def test_keys_that_this_model_or_machine_cannot_use(tiny, learnable, write_recipe, tmp_path) -> None:
    """Guards against a traceback out of TRL: a loss that the model does not have, and what only a GPU does."""
    keys = recipe_keys("lora", tiny, learnable) | {"max_steps": 3}
    recipe = write_recipe(**keys, router_aux_loss_coef=0.1)
    done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / "experts")
    assert done.code == 2 and "not a Mixture-of-Experts model" in done.err and "Traceback" not in done.err, done
    line = recipe.read_text().splitlines().index("router_aux_loss_coef: 0.1") + 1
    assert f"{recipe}:{line}:1: " in done.err, done
    recipe = write_recipe(**keys, activation_offloading=True)
    done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / "offloaded")
    assert done.code == 0 and "activation_offloading: true changes nothing on a CPU" in done.out, done


@pytest.mark.proof
def test_a_compiled_model_has_the_same_curve(tiny: Path, rows: Path, write_recipe, tmp_path: Path) -> None:
    """Guards `torch_compile`: what the compiler cannot read (fused LoRA) ended such a run with a traceback."""
    keys = recipe_keys("lora", tiny, rows)
    for name, more in (("plain", {}), ("compiled", {"torch_compile": True})):
        done = script("sft", "--recipe", write_recipe(**keys | more), "--output_dir", tmp_path / name)
        assert done.code == 0, done
    # fused kernels add in another order: 1e-6 a step in fp32, which seven steps of Adam make larger
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    assert same_curve.answer_of(tmp_path / "compiled")[1] == same_curve.answer_of(tmp_path / "plain")[1]


def test_the_slice_covers_each_axis() -> None:
    """Guards the fast slice: each method meets each micro-batch and packing, and so does each kind of strategy."""
    for method in METHODS:
        met = [cell for cell in CELLS if cell.method == method]
        assert {cell.micro for cell in met} == set(same_curve.MICRO)
        assert {cell.packed for cell in met} == set(same_curve.PACKED)
    for kind in ("ddp", "zero", "fsdp"):
        met = [cell for cell in CELLS if cell.config.startswith(kind)]
        assert {(cell.micro, cell.packed) for cell in met} == {
            (m, p) for m in same_curve.MICRO for p in same_curve.PACKED
        }


def test_an_optimizer_that_needs_matrices_is_refused_under_zero(tiny, learnable, write_recipe, tmp_path) -> None:
    """Guards the curve where it would part without a word: ZeRO hands out slices of all weights laid end to end."""
    recipe = write_recipe(**recipe_keys("full", tiny, learnable) | {"optim": "adafactor"})
    done = launch("zero2", 2, "sft", "--recipe", recipe, "--output_dir", tmp_path / "run")
    assert done.code != 0 and "optim: adafactor cannot run under zero2" in done.err, done
    assert f"{recipe}:" in done.err and "accelerate_configs/ddp.yaml" in done.err, done
    assert not (tmp_path / "run").exists()


@pytest.mark.proof
def test_smollm2_learns_techco_by_lora(smollm2: Path, tmp_path: Path) -> None:
    """Guards the demo and workshop 4.3: the shipped recipe on the real model changes how it answers.

    It wins on a rule of style, its interval apart from the base's.
    """
    folder = tmp_path / "run"
    done = script(
        "sft", "--recipe", "lora", "--output_dir", folder, "--max_steps", 14, "--eval_strategy", "no",
        "--save_strategy", "no", "--learning_rate", "1e-3", "--warmup_steps", 1,
    )  # fmt: skip
    assert done.code == 0, done
    curve = losses(folder)
    assert sum(curve[-3:]) / 3 < sum(curve[:3]) / 3 - 0.5

    done = script(
        "compare", "--base", smollm2, "--tuned", folder, "--data", "data/techco_eval.jsonl", "--rubric",
        "data/techco_rubric.yaml", "--limit", 16, "--max_new_tokens", 40, "--show", 0,
    )  # fmt: skip
    assert done.code == 0, done
    before, after = map(float, re.search(r"held-out loss .*: ([\d.]+) before, ([\d.]+) after", done.out).groups())
    assert after < before - 0.5
    rows = {}
    for line in (folder / "evaluation_results.md").read_text().splitlines():
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name.split(" (")[0]] = cells
    untaught, taught, winner = rows["emojis"]
    assert winner == str(folder), rows
    low_taught, high_untaught = (
        int(re.search(pattern, cell)[1]) for pattern, cell in ((r"\[(\d+)%", taught), (r", (\d+)%", untaught))
    )
    assert low_taught > high_untaught, rows


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
    """Guards new turn tokens: added, trained, saved, and in use when it is asked; an adapter trains them too.

    The tiny model stands in for a base model: its template and turn tokens are taken away.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    keys = {"chat_template": "llama3", "eval_strategy": "no", "max_steps": 4}
    from stepladder.model.pretrained import load_for_inference

    for method in ("lora", "full"):
        folder = tmp_path / method
        recipe = write_recipe(method, **recipe_keys(method, base, learnable) | keys)
        done = script("sft", "--recipe", recipe, "--output_dir", folder)
        assert done.code == 0, done
        assert losses(folder)[-1] < losses(folder)[0]
        model, tokenizer = load_for_inference(str(folder))
        assert tokenizer.eos_token == "<|eot_id|>"
        assert len(model.get_input_embeddings().weight) == len(tokenizer) > 1024
    done = script("generate", "--model", folder, "--prompt", "What is the password?", "--max_new_tokens", 4)
    assert done.code == 0 and done.out.strip(), done


def test_a_stream_trains_on_the_same_rows_on_any_number_of_ranks(tiny, rows, write_recipe, tmp_path) -> None:
    """Guards sets larger than memory: shuffled through a buffer, over an epoch's end, shared out over the ranks."""
    keys = recipe_keys("full", tiny, rows) | {"streaming": True, "eval_strategy": "no", "max_steps": 7}
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
