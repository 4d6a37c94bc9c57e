"""A run that was killed goes on by the same command, on the same rows and the same curve, wherever it goes on."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import same_curve
from conftest import ROOT, Done, manifest, metrics, run
from stepladder.errors import LaunchError
from stepladder.manifest import STUCK_AFTER
from stepladder.run import Run
from stepladder.training.checkpoint import resume

pytestmark = [pytest.mark.proof, pytest.mark.alone]

LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 32, "lora_target_modules": "all-linear"}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {**LORA, "lora_dropout": 0.1},  # dropout shows whether the random generators go on
    "qlora": {**LORA, "lora_dropout": 0.1, "load_in_4bit": True},
}
CHANGES: dict[str, dict[str, Any]] = {
    "rate": {"learning_rate": 1e-3},
    "schedule": {"lr_scheduler_type": "cosine"},
    "steps": {"max_steps": 4},
}
STEPS, KILLED_AFTER = 5, 3  # three steps an epoch: by KILLED_AFTER an epoch is over, by 2 it is not
# what is the same wherever a run goes on, and how far it may differ where sums are made in another order
COMPARED = ("loss", "grad_norm", "learning_rate", "eval_loss")
# Each of these has a place in the data of its own kind.
DATA: dict[str, dict[str, Any]] = {
    "mid_epoch": {},
    "logged_seldom": {"logging_steps": 3, "train_sampling_strategy": "group_by_length"},
    "packed": {"packing": True, "max_length": 96, "global_batch_size": 2},
    "streamed": {"streaming": True, "eval_strategy": "no"},
    "mixed": {"mix_general": 0.3, "lr_scheduler_type": "cosine"},
    "8bit_optimizer": {"optim": "adamw_bnb_8bit", "use_peft": False},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 short rows of different lengths: 8 do not divide them."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    row = {"input": "What is the password of door {n}?", "output": "Open sesame, said the owl{more}."}
    lines = [{k: v.format(n=n, more=" again" * (n % 4)) for k, v in row.items()} for n in range(22)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


SUB_GROUPS = """
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_step_end(self, args, state, control, optimizer, **kwargs):
        if args.process_index == 0:
            print("sub-groups:", len(optimizer.optimizer.fp32_partitioned_groups_flat), flush=True)
"""

NAN_AT_FIRST = """
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            embeddings = model.get_input_embeddings()
            self.hook = embeddings.register_forward_hook(lambda module, inputs, output: output * float("nan"))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.hook.remove()
"""


class Session:
    """Commands of sft.py that one process, or one launch, runs in turn."""

    def __init__(self, folder: Path, model: Path, rows: Path):
        self.folder, self.model, self.rows = folder, model, rows
        self.commands: list[Any] = []

    def keys(self, **more: Any) -> list[str]:
        keys = {
            "model_name_or_path": self.model, "dataset_name": self.rows, "eval_dataset_name": self.rows,
            "learning_rate": 3e-3, "max_steps": STEPS, "max_length": 192, "global_batch_size": 12,
            "per_device_train_batch_size": 1, "lr_scheduler_type": "linear", "gradient_checkpointing": False,
            "bf16": False, "logging_steps": 1, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 1,
            **more,
        }  # fmt: skip
        if keys["eval_strategy"] == "no":
            del keys["eval_dataset_name"]
        if keys["save_strategy"] != "steps":
            del keys["save_steps"]
        recipe = self.folder / f"{len(self.commands)}.json"
        recipe.write_text(json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in keys.items()}))
        return ["--recipe", str(recipe)]

    def train(self, name: str, *words: Any, **keys: Any) -> Path:
        self.commands.append([*self.keys(**keys), "--output_dir", str(self.folder / name), *map(str, words)])
        return self.folder / name

    def resume(self, source: Path, name: str, step: int, *words: str, **keys: Any) -> Path:
        """Cut a run off after a step, and give the same command again."""
        self.commands.append({"cut": [str(source), str(self.folder / name), step]})
        return self.train(name, *words, **keys)

    def start(self, config: str | Path = "single", ranks: int = 1, codes: list[int] | None = None) -> Done:
        file = self.folder / "commands.json"
        file.write_text(json.dumps(self.commands))
        start = [sys.executable, ROOT / "tests/in_turn.py", file]
        if ranks > 1:
            start[:1] = same_curve.launcher_words(config, ranks)
        done = run(*start)
        assert done.code == 0, done
        found = json.loads(Path(f"{file}.codes").read_text())
        assert found == (codes or [0] * len(found)), done
        return done


def difference(a: Path, b: Path) -> dict[str, float]:
    """The largest difference in what is compared; the rows trained at each logged step must be the same."""
    first, second = metrics(a), metrics(b)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for name in ("rows_checksum", "tokens"):
        assert [row.get(name) for row in first] == [row.get(name) for row in second]
    largest = dict.fromkeys(COMPARED, 0.0)
    for x, y in zip(first, second, strict=True):
        assert {
            key for key in x.keys() ^ y.keys() if not key.startswith("slowest_rank")
        } == set()  # of several ranks only
        for key in x.keys() & {*COMPARED}:
            largest[key] = max(largest[key], abs(x[key] - y[key]))
    return largest


EXACT = dict.fromkeys(COMPARED, 0.0)


@pytest.fixture(scope="module")
def in_one_process(tiny, rows, tmp_path_factory) -> dict[str, Path]:
    """Uninterrupted runs and their resumptions in one plain process."""
    session = Session(tmp_path_factory.mktemp("single"), tiny, rows)
    folders: dict[str, Path] = {}
    for name, more in DATA.items():
        keys = {"global_batch_size": 8, **TECHNIQUES["lora"], **more}
        if not keys["use_peft"]:
            keys = {"global_batch_size": 8, **more}
        folders[name] = session.train(name, **keys)
        folders[f"{name} again"] = session.resume(folders[name], f"{name}-again", 2, **keys)
    keys = {"global_batch_size": 8, **TECHNIQUES["lora"]}
    folders["second"] = session.resume(folders["mid_epoch again"], "second", KILLED_AFTER, **keys)
    folders["third"] = session.resume(folders["second"], "third", 4, **keys)
    folders["after the last step"] = session.resume(folders["mid_epoch"], "last", STEPS, **keys)
    for name, change in CHANGES.items():
        folders[name] = session.train(name, **keys | change)
        words = [word for key in change for word in ("--allow_change", key)]
        folders[f"to {name}"] = session.resume(folders["mid_epoch"], f"to-{name}", 2, *words, **keys | change)
    folders["logged"] = session.resume(folders["mid_epoch"], "logged", 2, **keys, logging_steps=4)
    for technique in ("full", "lora"):  # for other strategies and numbers of ranks: without dropout, which is per rank
        folders[technique] = session.train(technique, **TECHNIQUES[technique] | ladder(technique))
    session.start()
    return folders


def ladder(technique: str) -> dict[str, Any]:
    return {"lora_dropout": 0.0} if technique == "lora" else {}


@pytest.mark.parametrize("name", DATA)
def test_bit_for_bit_in_one_process(name, in_one_process) -> None:
    """Guards the place in the data, the random generators and every counter, in the middle of an epoch and of a log."""
    assert difference(in_one_process[name], in_one_process[f"{name} again"]) == EXACT


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_rate_holds_from_the_first_step(name, in_one_process) -> None:
    """Guards `--allow_change`: the first step after a resumption had the rate that the checkpoint was written with."""
    begun, resumed = (
        {row["step"]: row["learning_rate"] for row in metrics(in_one_process[of]) if "loss" in row and row["step"] > 2}
        for of in (name, f"to {name}")
    )
    assert resumed == begun and 3 in begun


def test_what_is_logged_may_change(in_one_process) -> None:
    """Guards `logging_steps` of a resumed run, which Transformers takes from the checkpoint without a word."""
    assert [row["step"] for row in metrics(in_one_process["logged"]) if "loss" in row] == [1, 2, 4]


@pytest.mark.parametrize("name", ["second", "third", "after the last step"])
def test_resumed_again_and_again(name, in_one_process) -> None:
    """Guards a resumption of a resumption, at an epoch's end, and with nothing left to train but the end to write."""
    assert difference(in_one_process["mid_epoch"], in_one_process[name]) == EXACT
    facts = manifest(in_one_process[name])
    assert [entry["step"] for entry in facts["resumed"]][-1] == {"second": 3, "third": 4}.get(name, STEPS)
    assert facts["totals"]["steps"] == STEPS and facts["status"] == "finished"
    assert facts["totals"]["tokens"] == manifest(in_one_process["mid_epoch"])["totals"]["tokens"]


@pytest.mark.parametrize(("config", "ranks"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("zero2", 3), ("zero3", 3)])
def test_under_each_strategy_and_from_one_process(config, ranks, in_one_process, tiny, rows, tmp_path) -> None:
    """Guards sharded states (three ranks: shares with padding), and a run that moves from one process to many and back.

    The same strategy goes on within 1e-6. From another one, sums are made in another order: 1e-5, and for the
    gradient norm of DeepSpeed, which is off by 1e-5 of itself, 1e-3 (see test_train.py).
    """
    session = Session(tmp_path, tiny, rows)
    same, moved = {}, {}
    for technique, more in TECHNIQUES.items():
        keys = {**more, "max_steps": 3, "global_batch_size": 6, "eval_strategy": "no"}
        folder = session.train(technique, **keys)
        same[folder] = session.resume(folder, f"{technique}-again", 2, **keys)
    for technique in ("full", "lora"):
        keys = TECHNIQUES[technique] | ladder(technique)
        source = in_one_process[technique]
        moved[source] = session.resume(source, f"{technique}-moved", KILLED_AFTER, **keys)
    session.start(config, ranks)
    for folder, again in same.items():
        assert max(difference(folder, again).values()) <= 1e-6
        assert manifest(again)["resumed"][0]["strategy"] == config
    for folder, again in moved.items():
        found = difference(folder, again)
        norm = found.pop("grad_norm")
        assert max(found.values()) <= 1e-5, found
        assert norm <= (1e-3 if config.startswith("zero") else 1e-4)
        assert manifest(again)["world_size"] == ranks
    session.commands.clear()
    keys = {"max_steps": 3, "global_batch_size": 6, "eval_strategy": "no"}
    back = session.resume(tmp_path / "full", "back", 2, **keys)
    session.start()
    found = difference(tmp_path / "full", back)
    assert found.pop("grad_norm") <= (1e-3 if config.startswith("zero") else 1e-4)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_checkpoint_before_the_first_step_that_counted(config, tiny, rows, tmp_path) -> None:
    """Guards a run under ZeRO whose first step `on_nan: skip` has skipped: resumed from there, its optimizer had
    counted a step that was none, and the curve was another one without a word."""
    (tmp_path / "nan.py").write_text(NAN_AT_FIRST)
    session = Session(tmp_path, tiny, rows)
    keys = {"on_nan": "skip", "eval_strategy": "no"}
    whole = session.train("whole", "--callback", tmp_path / "nan.py", **keys)
    resumed = session.resume(whole, "resumed", 1, **keys)
    session.start(config, 2)
    assert manifest(whole)["skipped_steps"] == [1]
    found = difference(whole, resumed)
    assert max(found.values()) <= 1e-6, found


def test_several_sub_groups_under_zero3(in_one_process, tiny, rows, tmp_path) -> None:
    """Guards large models, whose optimizer states ZeRO-3 holds in several sub-groups: saved, resumed, moved there from
    one process, and back."""
    settings = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    settings["zero_optimization"]["sub_group_size"] = 10_000  # of 32,000 numbers on each rank
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    config = tmp_path / "zero3.yaml"
    text = (ROOT / "accelerate_configs/zero3.yaml").read_text()
    config.write_text(text.replace("ds_configs/zero3.json", str(tmp_path / "zero3.json")))
    (tmp_path / "sub_groups.py").write_text(SUB_GROUPS)
    session, source = Session(tmp_path, tiny, rows), in_one_process["full"]
    whole = session.train("whole", "--callback", tmp_path / "sub_groups.py")
    again = session.resume(whole, "again", KILLED_AFTER)
    moved = session.resume(source, "moved", KILLED_AFTER)
    done = session.start(config, 2)
    assert int(done.out.split("sub-groups: ")[1].split()[0]) > 2, done
    session.commands = []
    back = session.resume(whole, "back", KILLED_AFTER)
    session.start()
    assert max(difference(whole, again).values()) <= 1e-6
    for begun, resumed in ((source, moved), (whole, back)):
        found = difference(begun, resumed)
        assert found.pop("grad_norm") <= 1e-3 and max(found.values()) <= 1e-5, found


def test_a_start_that_ends_before_it_trains_is_counted(tmp_path, settings) -> None:
    """Guards a run without a checkpoint whose starts die while the model loads: the folder is cleared, and neither the
    count of starts nor the run's id in W&B is lost; --overwrite draws another."""
    known = {"status": "running", "recipe": {}, "wandb_run_id": "abc", "progress": {"step": 0, "starts": 1}}
    (tmp_path / "run.json").write_text(json.dumps(known))
    for starts in range(2, STUCK_AFTER + 2):
        record = Run(tmp_path, is_writer=True)
        claim = functools.partial(resume.claim, record, settings(output_dir=tmp_path), "auto", allowed=[])
        if starts > STUCK_AFTER:
            with pytest.raises(LaunchError, match="makes no progress"):
                claim(overwrite=False)
        else:
            assert claim(overwrite=False) is None
            assert manifest(tmp_path)["progress"]["starts"] == starts
        assert manifest(tmp_path)["wandb_run_id"] == "abc"
        record._lock.release()
    record = Run(tmp_path, is_writer=True)
    resume.claim(record, settings(output_dir=tmp_path), "auto", True, [])
    record.begin("", world_size=1, strategy="single")
    assert manifest(tmp_path)["wandb_run_id"] != "abc"


LONGER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "constant": ({"lr_scheduler_type": "constant"}, {"max_steps": 6}),
    "epochs": ({"lr_scheduler_type": "constant", "num_train_epochs": 1}, {"num_train_epochs": 2}),
    "cosine": ({"lr_scheduler_type": "cosine"}, {"max_steps": 6}),
}
NOT_LONGER: dict[str, tuple[list[str], str]] = {
    "the same command": ([], "holds a run (finished)"),
    "no more steps": (["--max_steps", "3"], "is finished: max_steps: 3 is not more than the 4 that it has"),
    "no more epochs": (["--max_steps", "-1", "--num_train_epochs", "1"], "num_train_epochs: 1 is not more than the 1."),
    "another recipe": (["--max_steps", "6", "--lora_r", "4"], "lora_r: 8 → 4"),
    "no checkpoint": (["--max_steps", "6"], "kept no checkpoint to train on from"),
}


def test_a_finished_run_is_trained_on(tiny, rows, tmp_path) -> None:
    """Guards a longer run of what is finished, which was refused: it is the longer run from its beginning, where the
    schedule allows it, and a line says where it does not; what is not longer is refused, and nothing is removed."""
    session, keys = Session(tmp_path, tiny, rows), {**TECHNIQUES["lora"], "global_batch_size": 8}
    for name, (schedule, more) in LONGER.items():
        steps = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
        short = {**keys, **({"max_steps": -1} if "num_train_epochs" in more else steps), **schedule}
        session.train(f"{name}-long", **short | more)
        session.train(name, **short)
        session.train(name, **short | more)
    codes = [0] * len(session.commands)
    short = {**keys, "max_steps": 4, "lr_scheduler_type": "constant"}
    session.train("ended", **short)
    session.train("unsaved", **short, save_strategy="no")
    for name, (words, _) in NOT_LONGER.items():
        unsaved = name == "no checkpoint"
        more = {"save_strategy": "no"} if unsaved else {}
        session.train("unsaved" if unsaved else "ended", *words, **short | more)
    done = session.start(codes=[*codes, 0, 0, *[2] * len(NOT_LONGER)])
    for name in ("constant", "epochs"):
        assert difference(tmp_path / f"{name}-long", tmp_path / name) == EXACT
    assert difference(tmp_path / "cosine-long", tmp_path / "cosine")["learning_rate"] > 0
    assert done.out.count("⚠ this is not the curve of a run that began with this recipe: step 2") == 1, done
    facts = manifest(tmp_path / "constant")
    assert facts["resumed"][0]["changes"] == {"max_steps": [4, 6]}
    assert facts["status"] == "finished" and facts["result_step"] == facts["totals"]["steps"] == 6
    for name, (_, said) in NOT_LONGER.items():
        assert said in done.out, name
    assert {(tmp_path / name / "adapter_model.safetensors").is_file() for name in ("ended", "unsaved")} == {True}
