"""An adapter, or a run's result, as `model_name_or_path`: training goes on from it, or says why it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, manifest, metrics, run, script
from stepladder.errors import ModelError, StepladderError
from stepladder.model import adapter_recipe, build, pretrained, start
from stepladder.recipe import explain
from stepladder.recipe import load as recipe_load

pytestmark = pytest.mark.proof

KEYS = {
    "learning_rate": 5e-3, "max_steps": 3, "max_length": 128, "global_batch_size": 4, "bf16": False,
    "per_device_train_batch_size": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3,
    "eval_on_start": True, "save_strategy": "steps", "save_steps": 1, "train_on": "everything",
    "gradient_checkpointing": False, "lora_dropout": 0.0,
}  # fmt: skip
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
HUB = "someone/adapter"


def evaluations(folder: Path) -> list[float]:
    return [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]


def plain_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """An adapter that PEFT alone has made and saved, with noise in place of its zeros."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    keys = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**keys))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def reference(base: Path, folder: Path, rows: Path) -> float:
    """The loss of all tokens of the rows, by PEFT and Transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def commands(folder: Path, tiny: Path, rows: Path, runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Command lines of sft.py by the name of each run; a model that is a run's name is that run's folder."""
    found = []
    for name, keys in runs.items():
        recipe = folder / f"{name}.json"
        model = keys.get("model_name_or_path", str(tiny))
        values = {"dataset_name": str(rows), "eval_dataset_name": str(rows), **KEYS, **keys}
        values["model_name_or_path"] = str(folder / model) if model in runs or (folder / model).is_dir() else model
        if not values.get("use_peft"):
            del values["lora_dropout"]
        recipe.write_text(json.dumps(values))
        found.append(["--recipe", str(recipe), "--output_dir", str(folder / name)])
    return found


@pytest.fixture(scope="module")
def runs(tiny: Path, learnable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that start from each other's results, in one process; `first` and `full` start from the tiny model."""
    folder = tmp_path_factory.mktemp("start")
    plain_adapter(tiny, folder / "plain", rank_pattern={"q_proj": 2}, use_rslora=True, layers_to_transform=[0, 2])
    repository = folder / "hub" / f"models--{HUB.replace('/', '--')}"
    plain_adapter(tiny, repository / "snapshots/abc", task_type="CAUSAL_LM", target_modules=r".*\.(k|o)_proj")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    on = {"use_peft": True}
    words = commands(
        folder,
        tiny,
        learnable,
        {
            "first": LORA,
            "second": {"model_name_or_path": "first", **on, "lora_target_modules": "all-linear"},
            "dora": {**LORA, "use_dora": True, "lora_modules_to_save": ["norm", "embed_tokens"]},
            "dora_on": {"model_name_or_path": "dora", **on},
            "bits": {**LORA, "load_in_4bit": True},
            "bits_on": {"model_name_or_path": "bits", **on, "load_in_4bit": True},
            "plain_on": {"model_name_or_path": "plain", **on},
            "hub_on": {"model_name_or_path": HUB, **on},
            "full": {},
            "full_on": {"model_name_or_path": "full"},
        },
    )
    again = [words[1][0], words[1][1], "--output_dir", str(folder / "resumed")]
    as_resolved = ["--recipe", str(folder / "plain_on/recipe.yaml"), "--output_dir", str(folder / "repeated")]
    listed = [*words, {"cut": [str(folder / "second"), str(folder / "resumed"), 2]}, again, as_resolved]
    (folder / "commands.json").write_text(json.dumps(listed))
    done = run(sys.executable, ROOT / "tests/in_turn.py", folder / "commands.json", HF_HUB_CACHE=str(folder / "hub"))
    assert done.code == 0, done
    assert set(json.loads((folder / "commands.json.codes").read_text())) == {0}, done
    return folder


@pytest.mark.parametrize("pair", ["first second", "dora dora_on", "bits bits_on", "full full_on"])
def test_a_run_begins_where_the_one_before_it_ended(pair: str, runs: Path) -> None:
    """Guards against a first training that is thrown away: the loss before the first step is the last one, not the
    base's, for LoRA, DoRA with modules saved whole, QLoRA and full fine-tuning."""
    before, after = (evaluations(runs / name) for name in pair.split())
    assert after[0] == before[-1] != before[0]
    assert after[-1] < after[0]


@pytest.mark.parametrize(("name", "source"), [("plain_on", "plain"), ("hub_on", f"hub/models--{HUB}/snapshots/abc")])
def test_an_adapter_of_other_tools_begins_as_peft_has_it(
    name: str, source: str, runs: Path, tiny: Path, learnable: Path
) -> None:
    """Guards rank patterns, rsLoRA, chosen layers and a regular expression: the loss is PEFT's own before a step."""
    folder = runs / source.replace(HUB, HUB.replace("/", "--"))
    assert evaluations(runs / name)[0] == pytest.approx(reference(tiny, folder, learnable), abs=2e-5)


def test_the_resolved_recipe_has_the_adapters_values(runs: Path, tiny: Path) -> None:
    """Guards a run.json that says rank 16, TRL's default, of an adapter of rank 3; the recipe repeats the run."""
    facts, config = manifest(runs / "plain_on"), json.loads((runs / "plain_on/adapter_config.json").read_text())
    recipe = facts["recipe"]
    assert (recipe["lora_r"], recipe["lora_alpha"], recipe["use_rslora"]) == (3, 7, True)
    assert recipe["lora_target_modules"] == ["q_proj", "v_proj"]
    assert facts["starts_from"] == {"base": str(tiny), "adapter": str(runs / "plain")}
    assert config["base_model_name_or_path"] == str(tiny) and config["rank_pattern"] == {"q_proj": 2}
    assert evaluations(runs / "repeated") == evaluations(runs / "plain_on")
    card = (runs / "second/README.md").read_text()
    assert f"base_model: {tiny}" in card and f"the adapter `{runs / 'first'}`" in card
    assert manifest(runs / "second")["starts_from"]["step"] == 3


def test_it_resumes_and_runs_on_several_ranks(runs: Path, tiny: Path, learnable: Path, tmp_path: Path) -> None:
    """Guards the checkpoint of a run that began from an adapter, and two ranks that each load it."""
    resumed, straight = metrics(runs / "resumed"), metrics(runs / "second")
    assert [row["loss"] for row in resumed if "loss" in row] == [row["loss"] for row in straight if "loss" in row]
    assert evaluations(runs / "resumed")[-1] == evaluations(runs / "second")[-1]
    assert manifest(runs / "resumed")["resumed"][0]["step"] == 2
    words = ["--recipe", str(runs / "second.json"), "--output_dir"]
    twice = [[*words, str(tmp_path / "ddp")], {"cut": [str(tmp_path / "ddp"), str(tmp_path / "again"), 2]}]
    (tmp_path / "commands.json").write_text(json.dumps([*twice, [*words, str(tmp_path / "again")]]))
    accelerate = [Path(sys.executable).with_name("accelerate"), "launch", "--main_process_port", "0"]
    ddp = ["--config_file", ROOT / "accelerate_configs/ddp.yaml", "--num_processes", 2]
    done = run(*accelerate, *ddp, ROOT / "tests/in_turn.py", tmp_path / "commands.json")
    assert done.code == 0 and json.loads((tmp_path / "commands.json.codes").read_text()) == [0, 0], done
    for name in ("ddp", "again"):
        assert manifest(tmp_path / name)["world_size"] == 2
        assert evaluations(tmp_path / name)[0] == pytest.approx(evaluations(runs / "second")[0], abs=1e-5)
        assert evaluations(tmp_path / name)[-1] == pytest.approx(evaluations(runs / "second")[-1], abs=1e-5)


def test_what_comes_out_is_one_adapter_on_the_base(runs: Path, tiny: Path, learnable: Path, tmp_path: Path) -> None:
    """Guards generate.py, compare.py and merge.py on a second generation: it stands on the base, not on the first."""
    last = evaluations(runs / "second")[-1]
    assert reference(tiny, runs / "second", learnable) == pytest.approx(last, abs=2e-5)
    model, _ = pretrained.load_for_inference(str(runs / "second"))
    assert model.peft_config["default"].base_model_name_or_path == str(tiny)
    done = script("merge", "--adapter", runs / "second", "--output_dir", tmp_path / "merged")
    assert done.code == 0 and json.loads((tmp_path / "merged/merge.json").read_text())["base"] == str(tiny), done
    asked = script("generate", "--model", runs / "plain_on", "--prompt", "Hello", "--max_new_tokens", "4")
    assert asked.code == 0, asked


def test_plan_and_check_know_the_adapter(runs: Path) -> None:
    """Guards a plan that is traced from the folder of the adapter, which has no config.json."""
    recipe = runs / "plain_on.json"
    done = script("plan", "--recipe", recipe, "--gpus", 1, "--lora_r", 99)
    assert done.code == 2 and "lora_r: 99" in done.err and "has 3" in done.err, done
    shown = script("check", "--recipe", recipe, "--json")
    lines = {line["name"]: line for line in json.loads(shown.out)["checks"]}
    assert all(line["right"] for line in lines.values()), lines
    assert "an adapter that is trained on; its base is" in lines["model"]["said"]
    assert any("keeps its layers_to_transform: [0, 2], rank_pattern" in n for n in json.loads(shown.out)["notes"])
    settled = adapter_recipe.settle(recipe_load.load(str(recipe), []))
    entry = next(entry for entry in explain.of_recipe(settled) if entry.key == "lora_r")
    assert entry.value == 3 and entry.where == f"{runs / 'plain'}/adapter_config.json"


# ---- what is refused ----


@pytest.fixture
def made(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A LoRA adapter of rank 2 on the tiny model's queries; keywords change its configuration, None removes a field."""
    template = json.loads((ROOT / "tests/fixtures/adapter_config.json").read_text())

    def make(name: str = "adapter", **fields: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {**template, "base_model_name_or_path": str(tiny), **fields}
        (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        tensors = {}
        for layer in range(3):
            place = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{place}.lora_A.weight"] = torch.ones(2, 32)
            tensors[f"{place}.lora_B.weight"] = torch.full((32, 2), 0.01)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


def settle(folder: Path | str, *words: str) -> Any:
    """The recipe that trains on a folder, as sft.py has it before torch is imported."""
    overrides = ["--model_name_or_path", str(folder), *words]
    return adapter_recipe.settle(recipe_load.load(str(ROOT / "tests/fixtures/bare.yaml"), overrides))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--lora_r", "8"], ["command line --lora_r", "lora_r: 8", "has 2", "lora_r: 2", "scripts/merge.py --adapter"]),
        (["--lora_alpha", "3"], ["lora_alpha: 3", "has 4"]),
        (["--lora_target_modules", "k_proj"], ['["k_proj"]', '["q_proj"]']),
        (["--lora_target_parameters", "experts.w"], ["lora_target_parameters", "has none"]),
        (["--lora_modules_to_save", "lm_head"], ["lora_modules_to_save", "has none"]),
        (["--use_dora", "true"], ["use_dora: true", "has false"]),
        (["--use_rslora", "true"], ["use_rslora: true", "has false"]),
        (["--peft_type", "prompt"], ["peft_type: prompt", "is LoRA"]),
        (["--model_revision", "v2"], ["model_revision: v2", "at main"]),
        (["--use_peft", "false"], ["use_peft: false", "is an adapter", "scripts/merge.py --adapter"]),
        (["--lora_r", "8", "--lora_alpha", "3"], ["lora_r: 8", "lora_alpha: 3"]),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_a_key_that_contradicts_the_adapter_is_refused(words: list[str], parts: list[str], made) -> None:
    """Guards both values and the place; what agrees with the adapter, and another dropout, pass."""
    folder = made()
    with pytest.raises(StepladderError) as caught:
        settle(folder, *words)
    assert all(part in caught.value.render() for part in [*parts, str(folder)]), caught.value.render()


def test_what_agrees_passes(made) -> None:
    """Guards against a refusal of the adapter's own values; dropout belongs to each training."""
    words = ["--lora_r", "2", "--lora_alpha", "4", "--lora_target_modules", "q_proj", "--use_dora", "false"]
    found = settle(made(), *words, "--lora_dropout", "0.3")
    assert (found.get("lora_dropout"), found.get("lora_target_modules")) == (0.3, ["q_proj"])
    pattern = settle(made("pattern", target_modules=".*q_proj"), "--lora_target_modules", "q_proj")
    assert pattern.get("lora_target_modules") == ["q_proj"]  # compared where the model is


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"peft_type": "LOHA"}, "is LOHA"),
        ({"peft_type": "PREFIX_TUNING"}, "train it again"),
        ({"peft_type": None}, "is None"),
        ({"task_type": "SEQ_CLS"}, "for SEQ_CLS"),
        ({"bias": "all"}, "the base's own biases"),
        ({"lora_bias": True}, "has lora_bias: true"),
        ({"init_lora_weights": "pissa_niter_4"}, "began by changing the base's own weights"),
        ({"trainable_token_indices": [3]}, "holds no rows of the embeddings"),
        ({"trainable_token_indices": [-3]}, "trainable_token_indices cannot be [-3]"),
        ({"layer_replication": [[0, 3]]}, "has layer_replication"),
        ({"a_field_of_tomorrow": {"x": 1}}, "has a_field_of_tomorrow"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": ["a"]}, "names no base model"),
        ({"base_model_name_or_path": "/nowhere/model"}, "there is no model at '/nowhere/model'"),
        ({"r": None}, "has no rank"),
        ({"r": "16"}, 'r cannot be "16"'),
        ({"r": 0}, "r: 0 is no value"),
        ({"r": 10**9}, "have rank 2, and its configuration says r: 1000000000"),
        ({"r": True}, "r cannot be true"),
        ({"lora_alpha": 2.5}, "lora_alpha: 2.5 is no value"),
        ({"lora_dropout": -1}, "lora_dropout: -1 is no value"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"target_modules": [1, "q_proj"]}, "target_modules"),
        ({"use_dora": "yes"}, 'use_dora cannot be "yes"'),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_trained_on_is_refused(fields: dict, part: str, made) -> None:
    """Guards other kinds of adapters, fields of another PEFT and hostile values: none is dropped without a word."""
    folder = made(**fields)
    with pytest.raises(ModelError) as caught:
        settle(folder)
    assert part in caught.value.render() and str(folder) in caught.value.render(), caught.value.render()


def test_half_of_an_adapter_is_refused(made, tiny: Path) -> None:
    """Guards a configuration that was cut off, weights that were, pickled ones, and whole weights among them."""

    def refused(folder: Path, part: str) -> None:
        with pytest.raises(ModelError) as caught:
            settle(folder)
        assert part in caught.value.render(), caught.value.render()

    cut = made("cut")
    (cut / "adapter_config.json").write_text('{"r": 2, "base_mo')
    refused(cut, "adapter_config.json cannot be used: Unterminated string")
    half = made("half")
    (half / "adapter_model.safetensors").write_bytes((half / "adapter_model.safetensors").read_bytes()[:-9])
    refused(half, "truncated or damaged")
    pickled = made("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, "safetensors only")
    stale = made("stale")
    shutil.copy(tiny / "model.safetensors", stale)
    (stale / "adapter_model.safetensors").unlink()
    refused(stale, "lacks adapter_model.safetensors")
    grown = made("grown")
    tensors = load_file(grown / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.model.embed_tokens.weight": torch.ones(4, 4)}, grown / "adapter_model.safetensors"
    )
    refused(grown, "holds weights of the base itself: base_model.model.model.embed_tokens.weight")
    refused(made("second", base_model_name_or_path=str(made("base"))), "is an adapter too")


def test_a_run_that_is_not_finished_and_a_checkpoint_are_refused(made, tmp_path: Path) -> None:
    """Guards half of a result, one that was found wrong, and a checkpoint, which is no model."""
    folder = made()
    for status in ("running", "failed", "preempted"):
        (folder / "run.json").write_text(json.dumps({"status": status}))
        with pytest.raises(ModelError, match=f"no finished run: run.json says {status}"):
            settle(folder)
    (folder / "run.json").write_text(json.dumps({"status": "finished", "recipe": {"load_in_4bit": True}}))
    assert any("was trained on a base in 4 bits" in note for note in settle(folder).notes)
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2/COMPLETE.json").write_text("{}")
    with pytest.raises(ModelError, match="is a checkpoint, which resumes its own run") as caught:
        settle(folder / "checkpoint-2")
    assert str(folder) in caught.value.help


def test_a_relative_base_is_found_from_elsewhere(made, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """Guards `models/x` in an adapter's configuration, which is a path of the folder that training was started in."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/base").symlink_to(tiny)
    folder = made("runs/a", base_model_name_or_path="models/base")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert start.resolve_model(str(folder)).base == str(tmp_path / "models/base")
    monkeypatch.chdir(tmp_path)
    assert start.resolve_model("runs/a").base == "models/base"


def test_torch_is_not_needed_to_refuse(made) -> None:
    """Guards the second in which a wrong start is told: no import of torch before it."""
    code = (
        "import sys\nfrom stepladder.errors import StepladderError\nfrom stepladder.model import adapter_recipe\n"
        "from stepladder.recipe import load\n"
        f"recipe = load.load('tests/fixtures/bare.yaml', ['--model_name_or_path', {str(made())!r}, '--lora_r', '8'])\n"
        "try:\n    adapter_recipe.settle(recipe)\n"
        "except StepladderError:\n    sys.exit('torch' in sys.modules)\nsys.exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("change", "keys", "part"),
    [
        ("missing", {}, "missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("extra", {}, "unexpected: base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"),
        ("shape", {}, "of another shape"),
        ("nan", {}, "not finite"),
        ("pattern", {}, "rank_pattern cannot be"),
        ("", {"lora_target_modules": ["all-linear"]}, "the adapter has none for model.layers.0.mlp.down_proj"),
        (
            "",
            {"lora_target_modules": [r".*\.[01]\..*q_proj"]},
            "the adapter has one for model.layers.2.self_attn.q_proj",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(
    change: str, keys: dict, part: str, made, tiny: Path, settings
) -> None:
    """Guards PEFT's silence: it warns of missing tensors, and drops those that have no place."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = made()
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    match change:
        case "missing":
            del tensors[first]
        case "extra":
            tensors["base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"] = torch.ones(2, 32)
        case "shape":
            tensors[first] = torch.ones(3, 32)
        case "pattern":
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_proj": "x"}}))
        case "nan":
            tensors[first][0, 0] = float("nan")
    save_file(tensors, file)
    recipe = settings(model_name_or_path=str(folder), use_peft=True, **keys)
    with pytest.raises(ModelError) as caught:
        build.attach_adapter(AutoModelForCausalLM.from_pretrained(tiny), recipe, AutoTokenizer.from_pretrained(tiny))
    assert part in caught.value.render(), caught.value.render()


def test_a_tokenizer_with_tokens_that_the_base_lacks_is_refused(made, tiny: Path) -> None:
    """Guards embeddings that would stay random: the adapter holds none for the tokens that its tokenizer has added."""
    from transformers import AutoTokenizer

    folder = made()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    assert pretrained.load_tokenizer_for(settle(folder)).chat_template == tokenizer.chat_template
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="tokenizer has 1,025 tokens"):
        pretrained.load_tokenizer_for(settle(folder))


def test_the_base_of_an_adapter_is_not_overwritten(made, tiny: Path, learnable: Path, tmp_path: Path) -> None:
    """Guards `--overwrite` of a run whose result is the base of the adapter that the new run starts from."""
    old = tmp_path / "old"
    shutil.copytree(tiny, old)
    (old / "run.json").write_text(json.dumps({"status": "finished", "recipe": {}}))
    folder = made(base_model_name_or_path=str(old))
    words = ["--recipe", ROOT / "tests/fixtures/bare.yaml", "--dataset_name", learnable, "--output_dir", old]
    done = script("sft", *words, "--model_name_or_path", folder, "--overwrite")
    assert done.code == 2 and f"{old} lies in {old}, whose run --overwrite replaces" in done.err, done
    assert (old / "model.safetensors").is_file() and "Traceback" not in done.err
