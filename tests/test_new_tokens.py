"""New tokens: how their embeddings begin, and that an adapter which trains them is one model wherever it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import same_curve
from conftest import losses, manifest, script
from stepladder.data import mixture, special_tokens, templates
from stepladder.data.row_checks import check_tokens
from stepladder.errors import ModelError, RecipeError
from stepladder.evaluation import generation
from stepladder.model import build, new_tokens, pretrained
from stepladder.planning import meta_model
from stepladder.reporting import curves
from stepladder.training import arguments
from stepladder.training.launch.launcher import Launch, Strategy

TOKENS = ["<tool>", "</tool>"]
DELTA = "token_adapter.trainable_tokens_delta"


def make_untied(tiny: Path, folder: Path, rows: int | None = None) -> Path:
    """The tiny model with an output layer of its own, and maybe with rows that no token uses."""
    config = LlamaConfig.from_pretrained(tiny)
    config.tie_word_embeddings, config.vocab_size = False, rows or config.vocab_size
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"tied": tiny, "untied": make_untied(tiny, folder / "untied"),
            "padded": make_untied(tiny, folder / "padded", rows=1100)}  # fmt: skip


def tool_rows(file: Path) -> Path:
    """Rows whose answers use the new tokens."""
    rows = [
        {"input": f"What is the password of door {n}?", "output": f"<tool>open {n}</tool> Open sesame."}
        for n in range(1, 12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def keys(method: str, model: Path, data: Path, **more: Any) -> dict[str, Any]:
    return same_curve.recipe_keys(method, model, data, steps=6) | {
        "additional_special_tokens": TOKENS, "use_cpu": True, "max_length": 128, **more
    }  # fmt: skip


RUNS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {  # method, base, keys, words
    "lora": ("lora", "tied", {}, []),
    "untied": ("lora", "untied", {"bf16": True}, []),
    "padded": ("dora", "padded", {}, []),
    "qlora": ("qlora", "untied", {"eval_strategy": "no"}, []),
    "full": ("full", "untied", {"eval_strategy": "no"}, []),
    "stopped": ("lora", "tied", {"save_strategy": "steps", "save_steps": 3}, ["--stop_at_step", "3"]),
}


@pytest.fixture(scope="module")
def runs(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs, which share a start: RUNS, the stopped one resumed, and `on`, which continues `lora`."""
    folder = tmp_path_factory.mktemp("runs")
    data, jobs = tool_rows(folder / "rows.jsonl"), []

    def add(name: str, recipe: dict[str, Any], run: str, words: list[str]) -> None:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        argv = ["--recipe", str(folder / f"{name}.yaml"), "--output_dir", str(folder / run), *words]
        jobs.append({"argv": argv, "port": same_curve.free_port(), "log": str(folder / f"{name}.log")})

    for name, (method, base, more, words) in RUNS.items():
        add(name, keys(method, bases[base], data, **more), name, words)
    add("resumed", keys(*RUNS["stopped"][:1], bases["tied"], data, **RUNS["stopped"][2]), "stopped", [])
    on = {key: value for key, value in keys("lora", folder / "lora", data).items()
          if not key.startswith("lora_") or key == "lora_dropout"}  # fmt: skip
    add("on", on, "on", [])
    same_curve.launch_many("plain", 1, jobs, folder / "jobs.json")
    for job in jobs:
        assert not Path(f"{job['log']}.failed").exists(), Path(job["log"]).read_text()[-3000:]
    return folder


def in_plain_peft(run: Path, base: Path) -> tuple[Any, Any]:
    """An adapter as PEFT's documentation loads one whose tokenizer has new tokens; nothing of Stepladder."""
    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, run).eval(), tokenizer


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tokenizer("<tool>open 3</tool> Open sesame.", return_tensors="pt")).logits


@pytest.mark.parametrize("base", ["tied", "untied", "padded"])
def test_a_new_row_begins_as_the_mean_of_its_pieces(base: str, bases: dict[str, Path], settings: Any) -> None:
    """Guards random rows, rows of one matrix only, and rows that lay unused in the base: input and output embeddings
    begin as the mean of what the text was before, and no random number is drawn for them."""
    model, tokenizer = (kind.from_pretrained(bases[base]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    before = [end.detach().clone() for end in ends]
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in TOKENS}
    new = templates.prepare(tokenizer, settings(additional_special_tokens=TOKENS))
    torch.manual_seed(1)
    pretrained.fit_embeddings(model, tokenizer, new)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)
    assert all(len(ids) > 1 for ids in pieces.values()) and [token.text for token in new] == TOKENS
    for old, end in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert len(end.weight) == max(len(old), len(tokenizer))
        for token, ids in pieces.items():
            row = end.weight[tokenizer.convert_tokens_to_ids(token)]
            torch.testing.assert_close(row, sum(old[i] for i in ids) / len(ids))
        assert torch.equal(end.weight[:1000], old[:1000])


@pytest.mark.parametrize("name", ["lora", "untied", "padded", "qlora", "on"])
def test_the_adapter_folder_is_the_model_in_plain_peft(name: str, runs: Path, bases: dict[str, Path]) -> None:
    """Guards a file without the rows, with a whole matrix beside them, and rows that were trained and not saved."""
    base = bases[RUNS.get(name, RUNS["lora"])[1]]
    theirs, tokenizer = in_plain_peft(runs / name, base)
    ours, _ = pretrained.load_for_inference(str(runs / name))
    assert torch.equal(logits(theirs, tokenizer), logits(ours, tokenizer))
    rows = {key: tensor for key, tensor in load_file(runs / name / "adapter_model.safetensors").items()
            if ".lora_" not in key}  # fmt: skip
    assert len(rows) == (1 if base == bases["tied"] else 2) and all(key.endswith(DELTA) for key in rows)
    table = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    plain = AutoTokenizer.from_pretrained(base)
    start = torch.stack([table[plain(t, add_special_tokens=False)["input_ids"]].mean(0) for t in TOKENS]).detach()
    trained = next(tensor for key, tensor in rows.items() if "embed_tokens" in key)
    assert trained.shape == start.shape and 1e-4 < (trained - start).abs().max() < 0.5


def test_training_counts_the_rows_and_a_plan_does_too(runs: Path) -> None:
    """Guards the counts of run.json, by hand, and a plan that knows nothing of new tokens."""
    found = manifest(runs / "untied")["parameters"]
    linear = 3 * (4 * (32 + 32) + 2 * (32 + 64) + (64 + 32)) * 8  # A and B of seven layers, rank 8, three times
    assert found["trainable"] == linear + 2 * 2 * 32
    for name, per in (("lora", 1), ("untied", 2)):
        recipe = _recipe(runs / name)
        config = meta_model.load_config(recipe)
        work = meta_model.Work(2, 64, "fp32", False)
        model, _ = meta_model.build_meta_model(recipe, config, work)
        held = manifest(runs / name)["parameters"]
        assert meta_model.count_parameters(model) == held["all"], per
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == held["trainable"]


def _recipe(run: Path) -> Any:
    from stepladder.recipe import load

    return load.load(str(run / "recipe.yaml"), [])


def test_a_run_resumes_and_an_adapter_is_trained_on(runs: Path) -> None:
    """Guards checkpoints without the rows, and a second run that begins them anew or refuses its own tokens."""
    assert losses(runs / "stopped") == pytest.approx(losses(runs / "lora"), rel=1e-6)
    whole, resumed = (load_file(runs / name / "adapter_model.safetensors") for name in ("lora", "stopped"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)
    assert losses(runs / "on")[0] < losses(runs / "lora")[-1] + 0.05 < losses(runs / "lora")[0]
    assert "the tokenizer has <tool>, </tool> already" in (runs / "on.log").read_text()
    assert losses(runs / "full")[-1] < losses(runs / "full")[0]


def test_answers_hold_the_new_tokens(runs: Path) -> None:
    """Guards answers that are printed and measured without the tokens that the rows were written for."""
    tokenizer = AutoTokenizer.from_pretrained(runs / "lora")
    hidden = special_tokens.hidden_in_answers(tokenizer)
    ids = tokenizer("<tool>open 3</tool> Open sesame.<|im_end|>")["input_ids"]
    assert tokenizer.decode([i for i in ids if i not in hidden]) == "<tool>open 3</tool> Open sesame."
    model, _ = pretrained.load_for_inference(str(runs / "full"))

    def say(**given: Any) -> torch.Tensor:
        asked = given["input_ids"]
        return torch.cat([asked, torch.tensor([ids]).expand(len(asked), -1)], 1)

    model.generate = say
    (answer,) = generation.generate_answers(model, tokenizer, [[{"role": "user", "content": "Open it."}]], shared=False)
    assert answer.text == "<tool>open 3</tool> Open sesame." and answer.stopped


@pytest.mark.parametrize("name", ["lora", "untied", "padded"])
def test_a_merge_has_the_rows(name: str, runs: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """Guards a merged model of the base's vocabulary, or with rows of zeros: its logits are the adapter's, and its
    GGUF file names the tokens."""
    words = ["--adapter", runs / name, "--output_dir", tmp_path / "merged", "--dtype", "fp32"]
    done = script("merge", *words, *(["--gguf", "f16"] if name == "lora" else []))
    assert done.code == 0, done
    theirs, tokenizer = in_plain_peft(runs / name, bases[RUNS[name][1]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, tokenizer), logits(theirs, tokenizer), atol=1e-4, rtol=0)
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.convert_tokens_to_ids(TOKENS) == tokenizer.convert_tokens_to_ids(TOKENS)
    if name == "lora":
        from gguf import GGUFReader

        (file,) = (tmp_path / "merged").glob("*.gguf")
        texts = GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
        assert texts[tokenizer.convert_tokens_to_ids("<tool>")] == "<tool>"
        assert next((tmp_path / "merged").glob("README.md")).read_text()


def test_rows_have_no_weight_in_a_merge(runs: Path, tmp_path: Path) -> None:
    """Guards `--weights 0.5`, which halved LoRA's change and left the rows whole, without a word."""
    done = script("merge", "--adapter", runs / "lora", "--weights", 0.5, "--output_dir", tmp_path / "merged")
    assert done.code == 2 and "has no weight" in done.err and "Traceback" not in done.err, done


@pytest.mark.parametrize("words", [[], ["--combination_type", "linear"]], ids=str)
def test_rows_are_merged_with_no_other_adapter(words: list[str], runs: Path, tmp_path: Path) -> None:
    """Guards a message of PEFT's without a way out, and one that names a sum which is refused too."""
    both = ["--adapter", runs / "lora", "--adapter", runs / "on"]
    done = script("merge", *both, *words, "--output_dir", tmp_path / "merged")
    assert done.code == 2 and "replaces rows of the embeddings" in done.err and "--base" in done.err, done


def test_rows_that_hold_the_recipes_tokens_are_not_remarked(runs: Path, tmp_path: Path) -> None:
    """Guards a warning for each run with new tokens, that its rows hold them; other special tokens are named."""
    assert "special tokens as text" not in (runs / "lora.log").read_text()
    text = (runs / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("door 3?", "door 3, <|endoftext|>?"))
    rows = mixture.from_name(str(tmp_path / "rows.jsonl"))
    tokenizer, recipe = AutoTokenizer.from_pretrained(runs / "lora"), _recipe(runs / "lora")
    found = [finding for finding in check_tokens(rows, tokenizer, recipe) if finding.name == "special_tokens"]
    assert [(len(finding.where), "'<|endoftext|>' first" in finding.what) for finding in found] == [(1, True)]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"peft_type": "ia3"}, "help: peft_type: lora, or no additional_special_tokens"),
        ({"peft_type": "prompt"}, "peft_type: prompt trains no rows of the embeddings"),
        ({"lora_modules_to_save": ["lm_head"]}, "lm_head would be trained in two ways"),
        ({"lora_target_modules": ["q_proj", "embed_tokens"]}, "would be trained in two ways"),
        ({"lora_target_modules": [r".*(q_proj|embed_tokens)"]}, "would be trained in two ways"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_train_them_is_refused(
    given: dict, part: str, bases: dict[str, Path], settings: Any
) -> None:
    """Guards rows that would stay as they begin beside an adapter."""
    model, tokenizer = (kind.from_pretrained(bases["untied"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    recipe = settings(use_peft=True, additional_special_tokens=TOKENS, **given)
    new = templates.prepare(tokenizer, recipe)
    pretrained.fit_embeddings(model, tokenizer, new)
    with pytest.raises(ModelError) as caught:
        build.attach_adapter(model, recipe, tokenizer, new)
    assert part in caught.value.render() and "<tool>" in caught.value.what


def test_an_output_layer_with_a_bias_is_refused(settings: Any) -> None:
    """Guards PEFT's layer, which leaves out the bias of an output layer of which it trains rows."""
    from transformers import PhiConfig, PhiForCausalLM

    model = PhiForCausalLM(PhiConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2))  # fmt: skip
    with pytest.raises(ModelError, match="its output layer has a bias"):
        new_tokens.token_indices(model, [30])


def test_zero3_is_refused_beside_an_adapter(runs: Path, settings: Any) -> None:
    """Guards a run under ZeRO-3 that would end in a traceback, for new tokens and for an adapter that has rows."""
    launch = Launch(2, 0, 0, 2, Strategy("zero3"), 1)
    new = [special_tokens.NewToken("<tool>", 1024, (1, 2))]
    model = str(runs / "lora")
    for recipe, tokens in ((settings(use_peft=True), new), (settings(use_peft=True, model_name_or_path=model), [])):
        with pytest.raises(RecipeError, match="cannot be trained under zero3"):
            arguments.check_new_tokens(recipe, launch, tokens)
    arguments.check_new_tokens(settings(), launch, new)  # all weights are trained


def test_a_word_cannot_be_a_special_token(tiny: Path, settings: Any) -> None:
    """Guards a word of the vocabulary, which would be cut out of every text that holds it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert "ement" in tokenizer.get_vocab()
    with pytest.raises(RecipeError, match="'ement' is an ordinary entry of the vocabulary"):
        templates.prepare(tokenizer, settings(additional_special_tokens=["ement"]))


def test_the_end_token_may_be_a_new_one(tiny: Path, settings: Any) -> None:
    """Guards the order of the keys: eos_token names a token that the recipe adds."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    new = templates.prepare(tokenizer, settings(additional_special_tokens=["<|stop|>"], eos_token="<|stop|>"))
    assert tokenizer.eos_token_id == new[0].row


def test_a_token_in_no_row_is_named(tiny: Path, tmp_path: Path, settings: Callable[..., Any]) -> None:
    """Guards a token that stays as it begins, without a word; the others are counted, with and without loss."""
    data = mixture.from_name(str(tool_rows(tmp_path / "rows.jsonl")))
    recipe, tokenizer = settings(additional_special_tokens=[*TOKENS, "<idle>"]), AutoTokenizer.from_pretrained(tiny)
    new = templates.prepare(tokenizer, recipe)
    found = {finding.what: finding for finding in check_tokens(data, tokenizer, recipe, new=new)}
    assert found["new token <tool>"].figures == {"rows": 11, "with loss": 11}
    assert found["new token <idle>"].figures == {"rows": 0, "with loss": 0}
    assert any("no row holds <idle>" in what for what in found)


@pytest.mark.proof
@pytest.mark.parametrize(("config", "ranks"), [("ddp", 2), ("zero2", 2), ("fsdp", 2), ("hsdp", 4)])
def test_the_curve_is_the_same(config: str, ranks: int, runs: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """Guards rows that each rank trains on its own gradient, or of which a rank has a part only."""
    jobs, data = [], runs / "rows.jsonl"
    for name in ("lora", "qlora", "padded", "full"):
        method, base, more, _ = RUNS[name]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(keys(method, bases[base], data, **more)))
        argv = ["--recipe", str(tmp_path / f"{name}.yaml"), "--output_dir", str(tmp_path / name)]
        jobs.append({"argv": argv, "port": same_curve.free_port(), "log": str(tmp_path / f"{name}.log")})
    same_curve.launch_many(config, ranks, jobs, tmp_path / "jobs.json")
    for name in ("lora", "qlora", "padded", "full"):
        assert same_curve.finished(tmp_path / name), (tmp_path / f"{name}.log").read_text()[-3000:]
        assert curves.difference(runs / name, tmp_path / name).within(), name
        assert same_curve.logits_apart(runs / name, tmp_path / name) < same_curve.LOGITS
