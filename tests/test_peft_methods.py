"""PEFT's methods through `peft_kwargs`: one curve, resumed and merged, planned to the parameter, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft_methods
import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model, get_peft_model_state_dict
from peft_methods import Cell
from safetensors.torch import load_file, save_file
from test_merge import gpt2
from transformers import AutoModelForCausalLM

from conftest import collected, manifest, script
from stepladder.data import mixture
from stepladder.errors import CheckpointError, ModelError
from stepladder.evaluation.held_out import mean_loss, measure_losses
from stepladder.model import build, initial_factors, pretrained
from stepladder.model.start import ADAPTER
from stepladder.recipe import load

# Of the cells of docs/compatibility.md those whose code paths differ, in one process and sharded both ways.
TESTED = ("patterns", "layers", "loraplus", "ia3", "vera", "oft", "pissa", "olora")
SHARDED = [("zero3", "loraplus"), ("zero3", "vera"), ("zero3", "oft"), ("zero3", "pissa"), ("fsdp", "ia3"),
           ("fsdp", "vera"), ("fsdp", "vera_bf16"), ("fsdp", "oft"), ("fsdp", "pissa")]  # fmt: skip
SHARDING = ("single", "zero3", "fsdp")  # zero3 among the proofs
CELLS = [
    *(Cell(method, "single") for method in (*TESTED, "vera_bf16")),
    *(Cell(method, strategy) for strategy, method in SHARDED),
]


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    alone = [Cell(method, "single") for method in TESTED]
    peft_methods.run_all(list(dict.fromkeys(alone + collected(request, "cell"))), root)
    return root


def param(cell: Cell) -> Any:
    marks = [pytest.mark.proof] if cell.strategy == "zero3" or "vera_bf16" in cell.method else []
    return pytest.param(cell, id=f"{cell.method}-{cell.strategy}", marks=marks)


@pytest.mark.parametrize("cell", map(param, CELLS))
def test_a_method_has_one_curve_and_resumes(cell: Cell, trained: Path) -> None:
    """Guards the two promises for each method: the curve of one process, and the same bytes after an interruption."""
    found = peft_methods.judge(cell, trained)
    assert found["outcome"] == "equal" and found["resumes"], found


@pytest.mark.parametrize("method", TESTED)
def test_its_result_is_the_trained_model(method: str, trained: Path) -> None:
    """Guards the saved adapter on the original base, which PEFT loads by itself: it has the loss that training
    measured. PiSSA and OLoRA trained on a changed base."""
    folder = Cell(method, "single").folder(trained)
    facts = manifest(folder)
    model, tokenizer = pretrained.load_for_inference(str(folder))
    rows = mixture.from_name(facts["recipe"]["dataset_name"]).take(range(8))
    assert mean_loss(measure_losses(model, tokenizer, rows)) == pytest.approx(facts["saved"]["loss"], abs=1e-5)


@pytest.mark.parametrize("method", TESTED)
def test_it_merges_and_was_planned(method: str, trained: Path) -> None:
    """Guards the merge (IA³'s needs the whole model) and the plan, which traces few layers of a model otherwise."""
    error, streamed = peft_methods.merge_error(method, trained)
    assert error <= 1e-4 and streamed == (method != "ia3")
    assert peft_methods.plan_error(method, trained) == 0


def test_patterns_reach_the_modules_that_they_name(trained: Path) -> None:
    """Guards against a pattern that is accepted and lost: ranks in the file, by hand."""
    prefix = "base_model.model.model.layers"
    tensors = load_file(Cell("patterns", "single").folder(trained) / ADAPTER)
    ranks = {name: tensors[f"{prefix}.{name}.lora_A.weight"].shape[0] for name in
             ("0.self_attn.q_proj", "1.self_attn.q_proj", "2.mlp.down_proj")}  # fmt: skip
    assert ranks == {"0.self_attn.q_proj": 4, "1.self_attn.q_proj": 8, "2.mlp.down_proj": 16}
    layers = {name.removeprefix(f"{prefix}.").partition(".lora")[0]
              for name in load_file(Cell("layers", "single").folder(trained) / ADAPTER)}  # fmt: skip
    assert layers == {f"{n}.{m}" for n in (0, 2) for m in ("self_attn.q_proj", "mlp.down_proj")} | {
        "0.self_attn.v_proj"
    }


# ---- VeRA and OFT ----


def vera(tiny: Path, key: int = 0) -> Any:
    config = VeraConfig(r=8, target_modules=["q_proj", "down_proj"], projection_prng_key=key, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), config)


def test_the_projections_are_pefts_and_in_the_file(tiny: Path, trained: Path) -> None:
    """Guards VeRA's result by itself: PEFT's own projections of the default key, whole, under each strategy."""
    config = VeraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    expected = get_peft_model_state_dict(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config))
    made = [folder for folder in (Cell("vera", strategy).folder(trained) for strategy in SHARDING) if folder.is_dir()]
    assert Cell("vera", "fsdp").folder(trained) in made
    for folder in made:
        saved = load_file(folder / ADAPTER)
        assert saved.keys() == expected.keys()
        for part in ("vera_A", "vera_B"):
            assert torch.equal(saved[f"base_model.{part}"], expected[f"base_model.{part}"]), (folder, part)


def test_a_resumed_run_keeps_its_projections(tiny: Path, tmp_path: Path) -> None:
    """Guards VeRA where another version of torch draws other values from the key: the run's file decides, and a run
    without it is refused."""
    initial_factors.keep(vera(tiny, key=7), tmp_path, None, writes=True)
    model, expected = vera(tiny), vera(tiny, key=7)
    assert not torch.equal(model.base_model.vera_A["default"], expected.base_model.vera_A["default"])
    initial_factors.keep(model, tmp_path, tmp_path / "checkpoint-3", writes=True)
    ids = torch.arange(1, 21).reshape(2, 10)
    for each in (model, expected):
        torch.nn.init.constant_(each.base_model.model.model.layers[1].mlp.down_proj.vera_lambda_b["default"], 0.5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, expected.eval()(ids).logits, rtol=0, atol=0)
    (tmp_path / initial_factors.INITIAL).unlink()
    with pytest.raises(CheckpointError, match="initial_adapter"):
        initial_factors.keep(model, tmp_path, tmp_path / "checkpoint-3", writes=True)


@pytest.mark.parametrize("kind", ["vera", "oft"])
def test_several_are_merged_with_a_reason(kind: str, trained: Path, tmp_path: Path) -> None:
    """Guards `--weights`, which only LoRA has: a weight is refused, not left out."""
    folder = Cell(kind, "single").folder(trained)
    done = script("merge", "--adapter", folder, "--output_dir", tmp_path / "out", "--weights", "0.5")
    assert done.code == 2 and "only LoRA has a weight" in done.err and "Traceback" not in done.err, done


# ---- LoRA+ ----


def test_loraplus_moves_b_by_the_ratio(tiny: Path, learnable: Path, tmp_path: Path) -> None:
    """Guards the ratio by one step of plain gradient descent: B, which begins at zero, moves by 4 times as far, and A,
    whose gradient is zero while B is, stays where it began."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model_name_or_path: {tiny}\ndataset_name: {learnable}\nmax_length: 128\nuse_peft: true\nlora_dropout: 0.0\n"
        "optim: sgd\nlearning_rate: 0.01\nlr_scheduler_type: constant\nmax_steps: 1\nglobal_batch_size: 2\n"
        "per_device_train_batch_size: 2\nmax_grad_norm: 0\nbf16: false\ngradient_checkpointing: false\nuse_cpu: true\n"
    )
    found = []
    for words in ([], ["--loraplus_lr_ratio", "4"]):
        folder = tmp_path / str(len(words))
        done = script("sft", "--recipe", recipe, "--output_dir", folder, *words)
        assert done.code == 0, done
        found.append(load_file(folder / ADAPTER))
    for name, tensor in found[0].items():
        times = 4 if "lora_B" in name else 1
        torch.testing.assert_close(found[1][name], times * tensor, rtol=1e-5, atol=1e-9)


# ---- what a model does not have ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peft_kwargs", "{rank_pattern: {nope: 4}}"], "rank_pattern: nope has no effect"),
        (["--peft_kwargs", "{alpha_pattern: {q_proj: 4, layers.0.self_attn.q_proj: 8}}"], "an earlier pattern"),
        (["--peft_kwargs", "{layers_to_transform: [0, 7]}"], "layers_to_transform: 7"),
        (["--peft_kwargs", "{layers_to_transform: [7]}"], "does not fit"),
        (["--peft_kwargs", "{exclude_modules: [lm_head]}"], "exclude_modules: lm_head"),
        (["--peft_kwargs", "{init_lora_weights: pissa}", "--lora_r", "64"], "32 at most"),
        (["--peft_type", "ia3", "--peft_kwargs", "{target_modules: [q_proj, nope]}"], "target_modules: nope"),
        (
            ["--peft_type", "ia3", "--peft_kwargs", "{target_modules: [q_proj], feedforward_modules: [down_proj]}"],
            "should be a subset",
        ),
        (
            ["--peft_kwargs", "{init_lora_weights: gaussian}", "--lora_target_modules", "embed_tokens", "q_proj"],
            "init_lora_weights: gaussian",
        ),
        (["--peft_type", "oft", "--peft_kwargs", "{oft_block_size: 7}"], "4 or 8"),
        (
            ["--peft_type", "oft", "--peft_kwargs", "{oft_block_size: 64}"],
            "16 or 32",
        ),
        (
            ["--peft_type", "oft", "--peft_kwargs", "{oft_block_size: 8, target_modules: [embed_tokens]}"],
            "cannot change model.embed_tokens",
        ),
        (["--peft_type", "vera", "--peft_kwargs", "{target_modules: [lm_head, q_proj]}"], "cannot change lm_head"),
        (["--peft_type", "vera", "--peft_kwargs", "{target_modules: [embed_tokens]}"], "does not fit"),
        (["--peft_kwargs", "{rank_pattern: {'(.+)+x': 4}}"], "rank_pattern: '(.+)+x' takes seconds"),
        (["--lora_modules_to_save", "("], "lora_modules_to_save: '(' is no regular expression"),
        (
            ["--peft_kwargs", "{layers_pattern: '(', layers_to_transform: 0}", "--lora_target_modules", "q_proj"],
            "layers_pattern: '(' is no regular expression",
        ),
        (["--loraplus_lr_ratio", "4", "--lora_target_modules", "embed_tokens", "q_proj"], "1e-6"),
    ],
)
def test_what_does_nothing_in_this_model_is_refused(words: list[str], said: str, tiny: Path, tmp_path: Path) -> None:
    """Guards against a pattern, layer or initialization that PEFT accepts and drops."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model_name_or_path: {tiny}\nuse_peft: true\n" + "lora_r: 8\n" * ("--peft_type" not in words))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with pytest.raises(ModelError) as error:
        build.attach_adapter(model, load.load(str(recipe), words))
    assert said in error.value.render(), error.value.render()


def test_it_is_refused_before_the_run_begins(tiny: Path, learnable: Path, tmp_path: Path) -> None:
    """Guards the command: one message, no traceback, no run folder."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model_name_or_path: {tiny}\ndataset_name: {learnable}\nmax_length: 128\nuse_peft: true\nlora_r: 8\n"
        "max_steps: 1\nglobal_batch_size: 2\nper_device_train_batch_size: 2\nbf16: false\nuse_cpu: true\n"
        "peft_kwargs:\n  rank_pattern: {nope: 4}\n"
    )
    done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / "out")
    assert done.code == 2 and f"{recipe}:12:3: peft_kwargs.rank_pattern: nope" in done.err, done
    assert "Traceback" not in done.err and not (tmp_path / "out" / "run.json").exists()


def test_an_adapter_with_such_a_pattern_is_refused(trained: Path, tmp_path: Path) -> None:
    """Guards merge.py and generate.py against a file from elsewhere: matching it would never end."""
    adapter = tmp_path / "adapter"
    shutil.copytree(Cell("loraplus", "single").folder(trained), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "(.+)+x"}))
    for words in (["merge", "--adapter", adapter, "--output_dir", tmp_path / "out"],
                  ["generate", "--model", adapter, "--prompt", "x"]):  # fmt: skip
        done = script(*words)
        assert done.code == 2 and "target_modules: '(.+)+x' takes seconds" in done.err, done
        assert f"{adapter}/adapter_config.json" in done.err and "Traceback" not in done.err, done


# ---- PiSSA and OLoRA ----


def test_oft_on_transposed_weights_is_refused(tmp_path: Path) -> None:
    """Guards GPT-2 (Conv1D), which PEFT's OFT does not take: a message, not a traceback."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model_name_or_path: x/y\nuse_peft: true\npeft_type: oft\npeft_kwargs: {oft_block_size: 4}\n")
    with pytest.raises(ModelError, match="does not fit"):
        build.attach_adapter(gpt2(), load.load(str(recipe), []))


def test_olora_on_transposed_weights_is_refused(tmp_path: Path) -> None:
    """Guards GPT-2: PEFT would decompose its weights the wrong way round."""
    recipe = tmp_path / "r.yaml"
    text = "model_name_or_path: x/y\nuse_peft: true\nlora_r: 4\nlora_target_modules: [c_proj]\npeft_kwargs: "
    recipe.write_text(text + "{init_lora_weights: olora}\n")
    with pytest.raises(ModelError, match="Conv1D"):
        build.attach_adapter(gpt2(), load.load(str(recipe), []))
    recipe.write_text(text + "{init_lora_weights: pissa}\n")
    model, ids = gpt2().eval(), torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = build.attach_adapter(model, load.load(str(recipe), [])).eval()(input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def decomposed(tiny: Path, kind: str) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=kind, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), config)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_the_conversion_is_pefts(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Guards the converted adapter against PEFT's own `path_initial_model_for_weight_conversion`."""
    model = decomposed(tiny, kind)
    initial_factors.keep(model, tmp_path, None, writes=True)
    model.peft_config["default"].init_lora_weights = True  # as PEFT asks for it
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = kind
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    expected = load_file(tmp_path / "peft" / ADAPTER)
    names = {name.replace(".default.", "."): name for name, _ in model.named_parameters()}
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name.replace(".default.", "."): t for name, t in initial_factors.convert(trained, names, tmp_path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_other_factors_are_put_right_on_resuming(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Guards a run that resumes where the decomposition comes out otherwise: base and first factors still add up to
    the original weights."""
    model = decomposed(tiny, kind)
    initial_factors.keep(model, tmp_path, None, writes=True)
    file = tmp_path / initial_factors.INITIAL
    first = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in load_file(file).items()}
    save_file(first, file, {initial_factors.CHECKSUM: initial_factors.checksum(first)})
    initial_factors.keep(model, tmp_path, tmp_path / "checkpoint-3", writes=True)
    original = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    name = "base_model.model.model.layers.1.mlp.down_proj"
    a, b = (first[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
    expected = original.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(layer.base_layer.weight + 2 * (b @ a), expected, atol=1e-5, rtol=0)


def test_a_resumed_run_without_its_first_factors_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Guards against a result that is saved for a base that nobody has: the file is missing, cut, or another's."""
    model = decomposed(tiny, "pissa")
    file = tmp_path / initial_factors.INITIAL
    for content in (None, b"", b"\x00" * 100):
        if content is not None:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match="initial_adapter"):
            initial_factors.keep(model, tmp_path, tmp_path / "checkpoint-3", writes=True)
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match="missing"):
        initial_factors.keep(model, tmp_path, tmp_path / "checkpoint-3", writes=True)
    initial_factors.keep(model, tmp_path, None, writes=True)
    damaged = bytearray(file.read_bytes())
    damaged[-2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="do not have the checksum"):
        initial_factors.keep(model, tmp_path, tmp_path / "checkpoint-3", writes=True)
    with pytest.raises(CheckpointError, match="began as a part"):  # --allow_change peft_kwargs
        initial_factors.keep(decomposed(tiny, "gaussian"), tmp_path, tmp_path / "checkpoint-3", writes=True)


def test_a_converted_adapter_trains_on(trained: Path, tmp_path: Path) -> None:
    """Guards the way from PiSSA on: its result is LoRA of twice the rank, which a second run takes."""
    first = Cell("pissa", "single").folder(trained)
    words = ["--recipe", trained / "olora.yaml", "--model_name_or_path", first, "--peft_kwargs", "{}"]
    words += ["--lora_r", "16", "--lora_alpha", "64", "--max_steps", "1", "--output_dir", tmp_path / "second"]
    done = script("sft", *words)
    assert done.code == 0 and "26,112 trainable" in done.out, done
