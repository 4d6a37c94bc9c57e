"""A run that is resumed on another base, tokenizer, template or evaluation set is refused, or says so."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
from in_turn import cut
from test_run_folder import Starts

from conftest import losses, manifest, run
from stepladder.model import fingerprint
from stepladder.run import package_versions
from stepladder.training.inputs import Inputs

STEPS, CUT = 4, 2
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def flipped(content: bytes) -> bytes:
    """One bit of the last byte but eight is another one: in a safetensors file, the mantissa of a weight."""
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


def replaced(old: str, new: str) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return edit


def added(key: str, value: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | {key: value}).encode()


# What is edited between two starts: the file, how, the key that is named, and the part that is.
EDITS: dict[str, tuple[str, Callable[[bytes], bytes], str, str]] = {
    "weights": ("model/model.safetensors", flipped, "model_name_or_path", "model.safetensors"),
    "config": (
        "model/config.json", replaced('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "model_name_or_path", "config"
    ),
    "tokenizer": (
        "model/tokenizer.json", replaced('"add_prefix_space": false', '"add_prefix_space": true'),
        "model_name_or_path", "pre-tokenizer",
    ),
    "template": ("template.jinja", replaced("<|im_end|>\n", "<|im_end|> "), "chat_template_path", "chat template"),
    "evaluation": ("eval.jsonl", replaced("owl", "awl"), "eval_dataset_name", "evaluation rows"),
}  # fmt: skip
# What changes no curve.
HARMLESS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "touched": ("model/model.safetensors", lambda content: content),
    "saved again": ("model/config.json", added("transformers_version", "9")),
    "generation": ("model/generation_config.json", added("top_k", 7)),
    "padding side": (
        "model/tokenizer_config.json",
        lambda c: json.dumps(json.loads(c) | {"padding_side": "left"}).encode(),
    ),
}
FOLLOWED = {
    "followed rows": ("--allow_change", "eval_dataset_name"),
    "followed metric": (
        *("--metric_for_best_model", "mean_token_accuracy", "--greater_is_better", "false"),
        *("--allow_change", "metric_for_best_model", "--allow_change", "greater_is_better"),
    ),
}
FACTS: dict[str, dict[str, Any]] = {
    "an earlier version": {"packages": {"torch": "2.1.0"}},
    "inputs of another kind": {"inputs": [1]},
    "an input of another kind": {"inputs": {"model": "x"}},
    "a hash of another kind": {"inputs": {"model": {"config.json": 7}}},
    "packages of another kind": {"packages": 3},
}
PLATEAU = ("--lr_scheduler_type", "reduce_lr_on_plateau")
OWN = "own template"  # a run that uses the model's


@pytest.fixture(scope="module")
def starts(tiny, learnable, tmp_path_factory) -> Starts:
    """A finished run `whole`, and all starts of this file on copies of it that a kill has cut off."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny, folder / "model")
    shutil.copy(learnable, folder / "eval.jsonl")
    (folder / "template.jinja").write_text(TEMPLATE)
    keys = {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(learnable),
        "eval_dataset_name": str(folder / "eval.jsonl"), "chat_template_path": str(folder / "template.jinja"),
        "max_steps": STEPS, "global_batch_size": 4, "per_device_train_batch_size": 4, "learning_rate": 0.3,
        "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "eval_strategy": "steps", "eval_steps": 1, "max_length": 192, "load_best_model_at_end": True,
    }  # fmt: skip
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(keys))
    plain = folder / "plain.json"
    plain.write_text(
        json.dumps({k: v for k, v in keys.items() if k not in ("chat_template_path", "load_best_model_at_end")})
    )
    first = Starts(folder, recipe)
    first.add("whole")
    first.add(OWN, "--recipe", plain)
    first.add("plateau", "--recipe", plain, *PLATEAU)
    first.run()
    assert set(first.codes.values()) == {0}, first.out

    rest = Starts(folder, recipe)

    def edited(name: str, file: str, edit: Callable[[bytes], bytes], *words: Any, source: str = "whole") -> None:
        """A start on a copy of a run while a file holds something else."""
        before, after = folder / f"{name}.before", folder / f"{name}.after"
        before.write_bytes((folder / file).read_bytes())
        after.write_bytes(edit(before.read_bytes()))
        cut(str(folder / source), str(folder / name), CUT)
        rest.commands += [{"copy": [str(after), str(folder / file)]}]
        rest.add(name, *words)
        rest.commands += [{"copy": [str(before), str(folder / file)]}]

    for name, (file, edit, key, _) in EDITS.items():
        edited(name, file, edit)
        edited(f"{name} allowed", file, edit, "--allow_change", key)
    for name, (file, edit) in HARMLESS.items():
        edited(name, file, edit)
    edited(f"{OWN} edited", "model/chat_template.jinja", lambda c: c + b" ", "--recipe", plain, source=OWN)
    moved = folder / "another model"
    shutil.copytree(folder / "model", moved)
    edited("moved", "eval.jsonl", bytes, "--model_name_or_path", moved, "--allow_change", "model_name_or_path")
    shutil.copy(learnable, folder / "other.jsonl")
    (folder / "other.jsonl").write_bytes(EDITS["evaluation"][1](learnable.read_bytes()))
    other = ("--eval_dataset_name", folder / "other.jsonl")
    edited("other rows", "eval.jsonl", bytes, "--recipe", plain, *other, source=OWN)
    edited("other rows decide", "eval.jsonl", bytes, *other)
    metric = ("--metric_for_best_model", "mean_token_accuracy", "--allow_change", "metric_for_best_model")
    edited("metric", "eval.jsonl", bytes, *metric)
    edited("more is better", "eval.jsonl", bytes, "--greater_is_better", "true",
           "--metric_for_best_model", "loss", "--allow_change", "greater_is_better",
           "--allow_change", "metric_for_best_model")  # fmt: skip
    for name, words in FOLLOWED.items():
        edited(name, EDITS["evaluation"][0], EDITS["evaluation"][1] if "rows" in name else bytes,
               "--recipe", plain, *PLATEAU, *words, source="plateau")  # fmt: skip
    died = "metric, again"  # as a start leaves it that was allowed to change the metric and died before its first save
    edited(died, "eval.jsonl", bytes, *metric[:2])
    recipe_then = manifest(folder / died)["recipe"] | {metric[0].strip("-"): metric[1]}
    (folder / died / "run.json").write_text(json.dumps(manifest(folder / died) | {"recipe": recipe_then}))
    for name, facts in FACTS.items():
        edited(name, "eval.jsonl", bytes)
        (folder / name / "run.json").write_text(json.dumps(manifest(folder / name) | facts))
    run_json = manifest(folder / "an earlier version")
    del run_json["inputs"], run_json["started_with"]
    (folder / "an earlier version/run.json").write_text(json.dumps(run_json))
    rest.run()
    return rest


def said(starts: Starts, name: str) -> str:
    """What the start of this name printed."""
    return dict(zip(starts.names, f"\n{starts.out}".split("\n$ sft.py ")[1:], strict=True))[name]


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_refused_and_named(name, starts) -> None:
    """Guards the curve against a file that was edited between two starts, under the name that the recipe has for it."""
    file, _, key, part = EDITS[name]
    assert starts.codes[name] == 2, said(starts, name)
    message = said(starts, name)
    assert f"was begun with another content of {key}" in message and part in message
    assert f"--allow_change {key}" in message and str(starts.folder / file.partition("/")[0]) in message
    assert manifest(starts.folder / name) == manifest(starts.folder / "whole") | {"status": "running"}


@pytest.mark.parametrize("name", EDITS)
def test_an_allowed_edit_is_a_note_and_recorded(name, starts) -> None:
    """Guards `--allow_change` of a content: the run goes on, and run.json holds what it goes on with."""
    _, _, key, _ = EDITS[name]
    assert starts.codes[f"{name} allowed"] == 0, said(starts, f"{name} allowed")
    assert f"which --allow_change {key} allows: " in said(starts, f"{name} allowed")
    before, now = (manifest(starts.folder / folder)["inputs"] for folder in ("whole", f"{name} allowed"))
    assert [thing for thing in before if before[thing] != now[thing]] != []
    assert "chosen again" in said(starts, f"{name} allowed") or name != "evaluation"


@pytest.mark.parametrize("name", [*HARMLESS, "moved"])
def test_what_changes_no_curve_changes_none(name, starts) -> None:
    """Guards against refusals of a file that was touched, saved again by another version, or moved."""
    assert starts.codes[name] == 0, said(starts, name)
    assert "changed since" not in said(starts, name) and "chosen again" not in said(starts, name)
    assert losses(starts.folder / name) == losses(starts.folder / "whole")


def test_the_models_own_template(starts) -> None:
    """Guards a template that no key of the recipe names: it belongs to the model."""
    name = f"{OWN} edited"
    assert starts.codes[name] == 2, said(starts, name)
    assert "another content of model_name_or_path" in said(starts, name)
    assert "chat template (model_name_or_path" in said(starts, name)


def test_evaluation_rows_that_the_recipe_changes(starts) -> None:
    """Guards the freedom to evaluate on other rows, which ends where the best step is chosen by them."""
    assert starts.codes["other rows"] == 0, said(starts, "other rows")
    assert "do not compare with those before" in said(starts, "other rows")
    assert starts.codes["other rows decide"] == 2
    assert "another content of eval_dataset_name" in said(starts, "other rows decide")


@pytest.mark.parametrize("name", ["metric", "metric, again", "more is better", "evaluation allowed"])
def test_the_best_step_is_chosen_anew(name, starts) -> None:
    """Guards the result against the value of another metric, which the coming ones may never pass."""
    assert starts.codes[name] == 0, said(starts, name)
    assert f"it is chosen again from the evaluations after checkpoint-{CUT}" in said(starts, name)
    assert manifest(starts.folder / name)["result_step"] > CUT


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_schedule_that_follows_the_evaluations(name, starts) -> None:
    """Guards a schedule that compares each evaluation with the best one so far: no key allows that to change."""
    assert starts.codes[name] == 2, said(starts, name)
    assert "reduce_lr_on_plateau derives each rate from" in said(starts, name)


def test_a_run_of_an_earlier_version(starts) -> None:
    """Guards runs that hold no inputs: they go on, a note says what could not be compared, and they hold them now."""
    name = "an earlier version"
    assert starts.codes[name] == 0, said(starts, name)
    assert "are those that the run began with is not known" in said(starts, name)
    assert "torch 2.1.0 → " in said(starts, name) and "since the run began" in said(starts, name)
    facts = manifest(starts.folder / name)
    assert facts["inputs"] == manifest(starts.folder / "whole")["inputs"]
    assert facts["started_with"] == {"torch": "2.1.0"}


@pytest.mark.parametrize("name", list(FACTS)[1:])
def test_damaged_inputs_are_one_message(name, starts) -> None:
    assert starts.codes[name] == 2, said(starts, name)
    assert "run.json cannot be used: its " in said(starts, name)


# ---- the hashes
def test_every_file_that_a_model_is_loaded_from(tiny, tmp_path) -> None:
    """Guards each kind of folder: one bit of any file that is loaded changes the hash, and no other file does."""
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    shared = {"config.json": "{}", "model.safetensors.index.json": json.dumps({"weight_map": shards})}
    base = tmp_path / "shards"
    adapter = {"adapter_config.json": json.dumps({"base_model_name_or_path": str(base), "r": 8})}
    folders: dict[str, dict[str, str]] = {
        "shards": {
            **shared,
            "model-1.safetensors": "1",
            "model-2.safetensors": "2",
            "old-model.safetensors": "other",
        },
        "single": {
            "config.json": "{}",
            "model.safetensors": "1",
            "consolidated.safetensors": "other",
            "a.py": "other",
        },
        "pickled": {"config.json": "{}", "pytorch_model.bin": "1", "README.md": "other"},
        "damaged index": {"model.safetensors.index.json": "[other", "model-1.safetensors": "1"},
        "adapter": {**adapter, "adapter_model.safetensors": "1", "README.md": "other"},
    }
    for name, files in folders.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
    for name, files in folders.items():
        before = fingerprint.hash_model(str(tmp_path / name))
        for file, content in files.items():
            (tmp_path / name / file).write_text(content.replace("}", ', "x": 1}', 1).replace("{,", "{") + " ")
            changed = fingerprint.hash_model(str(tmp_path / name)) != before
            assert changed == ("other" not in content), (name, file)
            (tmp_path / name / file).write_text(content)
            assert fingerprint.hash_model(str(tmp_path / name)) == before
    before = fingerprint.hash_model(str(tmp_path / "adapter"))
    assert {"adapter_config.json", "adapter_model.safetensors", "base/config.json"} <= before.keys()
    (base / "model-2.safetensors").write_text("3")
    after = fingerprint.hash_model(str(tmp_path / "adapter"))
    assert [part for part in before if before[part] != after[part]] == ["base/model-2.safetensors"]
    (tmp_path / "single/a.py").write_text("1")
    assert "a.py" in fingerprint.hash_model(str(tmp_path / "single"), with_code=True)
    loop = {"base_model_name_or_path": str(tmp_path / "adapter")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(loop))
    assert fingerprint.hash_model(str(tmp_path / "adapter"))


def test_a_large_file_is_sampled(tmp_path, monkeypatch) -> None:
    """Guards the time of a start: a large file is read in part; and guards that a part that changed is noticed."""
    reads: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, count, at: reads.append(count) or pread(handle, count, at))
    file = tmp_path / "model/model.safetensors"
    file.parent.mkdir()
    size = 64 << 20
    with file.open("wb") as out:
        out.truncate(size)
    before = fingerprint.hash_folder(file.parent)
    assert sum(reads) <= 3 << 20
    step = size // fingerprint.BLOCKS
    for at in (0, 9, fingerprint.HEAD_BYTES - 1, 17 * step - 1, size // 2 - 1, size - 1):
        for content, same in ((b"x", False), (b"\0", True)):
            with file.open("r+b") as out:
                out.seek(at)
                out.write(content)
            assert (fingerprint.hash_folder(file.parent) == before) is same, at
    with file.open("ab") as out:
        out.write(b"\0")
    assert fingerprint.hash_folder(file.parent) != before


def test_what_cannot_be_compared_is_a_note(settings, tmp_path) -> None:
    """Guards against silence where one of both starts does not know its base model or tokenizer."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    known, elsewhere = (
        Inputs(settings(model_name_or_path=str(model), **more), None, reads=True)
        for more in ({}, {"model_init_kwargs": {"subfolder": "x"}})
    )
    for before, inputs in (({}, known), ({"model": {}}, known), ({"model": known.found["model"]}, elsewhere)):
        inputs.notes.clear()
        inputs.resume({"inputs": before, "recipe": {}, "packages": package_versions()}, [], tmp_path)
        assert len(inputs.notes) == 1 and "is not known" in inputs.notes[0]
    known.notes.clear()
    known.resume({"inputs": known.found, "recipe": {}, "packages": package_versions()}, [], tmp_path)
    assert known.notes == []


def test_a_hub_model_by_its_commit(tmp_path) -> None:
    """Guards a name on the hub, under which other weights may come: the commit that the cache holds stands for them."""
    commits = {}
    for commit in ("a" * 40, "b" * 40):
        root = tmp_path / "hub/models--owner--name"
        (root / "snapshots" / commit).mkdir(parents=True)
        (root / "snapshots" / commit / "config.json").write_text("{}")
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs/main").write_text(commit)
        code = "from stepladder.model.fingerprint import hash_model; "
        code += "print(hash_model('owner/name', 'main'), hash_model('no/x'))"
        done = run(sys.executable, "-c", code, HF_HUB_CACHE=str(tmp_path / "hub"))
        commits[commit] = done.out.strip()
    assert commits == {commit: f"{{'commit': '{commit}'}} {{}}" for commit in commits}


def test_a_tokenizer_by_what_it_does(tiny) -> None:
    """Guards against a tokenizer that counts as another by its padding, its truncation or its template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    before = fingerprint.hash_tokenizer(tokenizer)
    tokenizer.padding_side, tokenizer.chat_template = "left", "x"
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert fingerprint.hash_tokenizer(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert [part for part, digest in fingerprint.hash_tokenizer(tokenizer).items() if digest != before[part]] == [
        "added tokens"
    ]
    tokenizer.eos_token = "<new>"
    assert fingerprint.hash_tokenizer(tokenizer)["special tokens"] != before["special tokens"]
