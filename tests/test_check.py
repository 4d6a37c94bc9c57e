"""scripts/check.py as a person runs it: right or wrong, where values come from, what keys do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, Done, run, script
from stepladder import requirements
from stepladder.errors import LaunchError

AXOLOTL = """\
base_model: teknium/OpenHermes-2.5-Mistral-7B
datasets:
  - path: teknium/openhermes
    type: openhermes
    shards: 10
val_set_size: 0.05
sequence_len: 2048
adapter: lora
lora_rnak: 32
num_epochs: 3
optimizer: paged_adamw_8bit
"""


def check(*words: Any, **env: str) -> Done:
    """`python scripts/check.py …`, its output not a terminal's whatever the surrounding environment forces."""
    return script("check", *words, **{"FORCE_COLOR": "", "TTY_COMPATIBLE": "0", **env})


@pytest.fixture
def child(write_recipe: Callable[..., Path]) -> Path:
    """A recipe that extends another, one key each, and one that both set."""
    parent = write_recipe("parent", model_name_or_path="models/x", use_peft=True, lora_r=8, learning_rate=0.001)
    return write_recipe("child", extends=str(parent), lora_r=32)


def row(done: Done, key: str) -> list[str]:
    """The line of `--show` for a key, as its columns."""
    (line,) = [line for line in done.out.splitlines() if line.startswith(f"{key} ")]
    return re.split(r"\s{2,}", line)


def shortened(origin: str) -> str:
    """As a line of 110 columns shows it: at most 44 of them, a long path without its beginning."""
    label = "parent " if origin.startswith("parent ") else ""
    place, room = origin.removeprefix(label), 44 - len(label)
    return label + (place if len(place) <= room else "…" + place[-room + 1 :])


def test_a_right_recipe(smollm2: Path) -> None:
    """Guards the pre-flight as a whole: each of its checks is made, and says what it found."""
    done = check("--recipe", "lora")
    assert done.code == 0 and "✘" not in done.out and len(done.out.splitlines()) < 25, "one screen"
    names = [line.split()[1] for line in done.out.splitlines() if line.startswith("✔")]
    assert names == ["recipe", "versions", "accounts", "model", "data", "template", "strategy", "memory", "disk"], done
    assert "72 rows, 24 held out" in done.out and "68% of all are trained" in done.out, done
    assert re.search(r"memory +\d+\.\d of \d+\.\d GiB of (cpu|\w+): micro-batch 8, checkpointing off", done.out), done


def test_everything_wrong_is_on_one_screen(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Guards the night in the queue: a pre-flight that stops at the first fault sends people there for each."""
    recipe = write_recipe("all", extends=str(ROOT / "recipes/models/llama-3.1-8b/full.yaml"), push_to_hub=True,
                          dataset_name=str(tmp_path / "nowhere.jsonl"), output_dir=str(tmp_path))  # fmt: skip
    words = ("--recipe", recipe, "--gpus", 1, "--gpu", "t4", "--strategy", "zero9")
    done = check(*words, "--json", HF_TOKEN="", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    wrong = {line["name"]: line for line in json.loads(done.out)["checks"] if not line["right"]}
    assert done.code == 2 and not wrong.keys() ^ {"accounts", "data", "strategy"}, done
    assert f"{recipe}:" in wrong["accounts"]["where"] and "hf auth login" in wrong["accounts"]["help"]
    assert "zero3" in wrong["strategy"]["help"], "what there is"
    done = check(*words[:-1], "single", HF_TOKEN="", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.code == 2 and "✘ memory" in done.out and "--strategy fsdp_offload" in done.out, done
    assert "Traceback" not in done.err, done


def test_a_tracker_that_is_not_installed(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the start of a run whose tracker would end it with a traceback."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="report_to: trackio takes trackio, which is not installed"):
        requirements.versions(settings(report_to=["none", "trackio"]))


def test_an_optimizer_that_is_not_installed(settings) -> None:
    """Guards the first step of a run with one of 18 optimizers, where Transformers would import it."""
    requirements.versions(settings(optim="adamw_8bit"))
    with pytest.raises(LaunchError, match="optim: schedule_free_adamw takes schedulefree, which is not installed"):
        requirements.versions(settings(optim="schedule_free_adamw"))


def test_library_versions_outside_the_bounds(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards both bounds of pyproject.toml: what is older than the code needs is refused, what is newer than the suite
    has seen runs and is named."""
    real, pretended = importlib.metadata.version, {}
    monkeypatch.setattr("importlib.metadata.version", lambda name: pretended.get(name) or real(name))
    assert "untested" not in requirements.versions(settings())
    pretended["transformers"] = "99.0"
    assert "; transformers 99.0 is untested: Stepladder was tested with" in requirements.versions(settings())
    pretended["trl"] = "0.9"
    with pytest.raises(LaunchError, match=r"trl >=1\.16 is needed, and 0\.9 is here"):
        requirements.versions(settings())


def test_a_compiler_that_is_not_installed(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the first step of a run with `torch_compile`, where PyTorch would look for it."""
    compiled = settings(torch_compile=True)
    assert requirements.compiler(compiled).endswith("g++, for torch_compile")
    monkeypatch.setenv("CXX", "nowhere++")
    with pytest.raises(LaunchError, match=r"a C\+\+ compiler \(nowhere\+\+\) is not installed"):
        requirements.compiler(compiled)
    assert requirements.compiler(settings(torch_compile=True, torch_compile_backend="eager")) == "none needed"
    assert requirements.compiler(settings()) == "none needed"


def test_a_full_disk_is_seen_before_the_run(settings, tmp_path: Path) -> None:
    """Guards the first checkpoint of a long run, which would find no room."""
    few = settings(save_strategy="steps", save_total_limit=2, output_dir=str(tmp_path))
    assert requirements.disk(few, tmp_path / "run", 2**20, 2**21, 2**20).startswith(
        "3 checkpoints and the result take 10 MiB"
    )
    with pytest.raises(LaunchError, match=r"3 checkpoints and the result take .* GiB, and .* free"):
        requirements.disk(few, tmp_path / "run", 2**50, 0, 0)
    none = settings(save_strategy="no")
    assert requirements.disk(none, tmp_path, 2**20, 2**21, 2**20).startswith("the result takes 1 MiB")


def test_a_folder_that_cannot_be_written_is_seen_before_the_run(settings, tmp_path: Path, monkeypatch) -> None:
    """Guards check.py, which called a place right that sft.py then refused."""
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="file/run cannot be written"):
        requirements.disk(settings(), tmp_path / "file/run", 1, 1, 1)
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # as for another user than root
    with pytest.raises(LaunchError, match="run cannot be written") as error:
        requirements.disk(settings(), tmp_path / "run", 1, 1, 1)
    assert error.value.why == f"{tmp_path} cannot be written by this user"


def test_a_typo_exits_2_at_its_place(tmp_path: Path) -> None:
    """Guards the promise of the whole room: no wrong key survives, and all of a file's are told at once."""
    file = tmp_path / "r.yaml"
    file.write_text("use_peft: true\nlora_rnak: 8\n  \nlearing_rate: 5.0\n")
    for view in ((), ("--show",), ("--explain",), ("--json",)):
        done = check("--recipe", file, *view)
        assert done.code == 2 and "Traceback" not in done.err and not done.out, done
        assert f"{file}:2:1: unknown key 'lora_rnak'" in done.err and "'lora_r'" in done.err, done
        assert f"{file}:4:1: unknown key 'learing_rate'" in done.err and "'learning_rate'" in done.err, done


def test_a_typo_on_the_command_line() -> None:
    done = check("--recipe", "lora", "--lora_rnak", 8)
    assert done.code == 2 and "command line --lora_rnak" in done.err and "'lora_r'" in done.err, done


def test_the_verdict_comes_without_the_heavy_libraries() -> None:
    """Guards the one second from return to verdict: torch alone takes several to import."""
    assert check("--recipe", "lora", "--show").code == 0  # what the libraries know is in the cache from here on
    done = run(sys.executable, "-X", "importtime", "scripts/check.py", "--recipe", "lora", "--explain")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.err.splitlines()}
    assert done.code == 0 and "stepladder.recipe.explain" in imported, done
    assert not imported & {"torch", "transformers", "trl", "datasets"}


def test_show_tells_where_each_value_comes_from(child: Path) -> None:
    """Guards the four origins: a default, a parent, the file itself, the command line."""
    done = check("--recipe", child, "--show", "--learning_rate", 0.01)
    assert done.code == 0 and "\x1b" not in done.out, done
    parent = child.with_name("parent.yaml")
    assert row(done, "model_name_or_path") == ["model_name_or_path", "models/x", shortened(f"parent {parent}:1")]
    assert row(done, "lora_r") == ["lora_r", "32", shortened(f"{child}:2")]
    assert row(done, "learning_rate") == ["learning_rate", "0.01", "command line"]
    assert row(done, "weight_decay") == ["weight_decay", "0", "default"]


def test_show_groups_as_the_banners_do() -> None:
    done = check("lora", "--show")
    banners = re.findall(r"^---- (.*) ----$", done.out, flags=re.MULTILINE)
    assert banners == ["model", "data", "method", "training", "saving and monitoring"]
    training = done.out.split("---- training ----")[1].split("----")[0]
    assert training.index("learning_rate") < training.index("weight_decay"), "what is set first, then defaults"
    assert row(done, "lora_r") == ["lora_r", "16", "recipes/lora.yaml:16"]


def test_show_as_json(child: Path) -> None:
    done = check("--recipe", child, "--show", "--json", "--seed=7")
    keys = {entry["key"]: entry for entry in json.loads(done.out)["keys"]}
    parent = str(child.with_name("parent.yaml"))
    assert (keys["lora_r"]["value"], keys["lora_r"]["source"], keys["lora_r"]["where"]) == (
        32,
        "recipe",
        f"{child}:2:1",
    )
    assert (keys["use_peft"]["source"], keys["use_peft"]["where"]) == ("parent", f"{parent}:2:1")
    assert (keys["seed"]["value"], keys["seed"]["source"]) == (7, "command line")
    assert keys["weight_decay"]["source"] == "default"


def test_explain_a_recipe() -> None:
    """Guards the seed's exercise as a command: what, the usual range, up and down, the choice that is made."""
    done = check("--recipe", "lora", "--explain", "--lora_r", 64)
    assert done.code == 0 and "\x1b" not in done.out, done
    lesson = done.out.split("\nlora_r: 64")[1].split("\nlora_alpha")[0]
    assert "rank" in lesson and "8 to 64" in lesson and "command line" in lesson.splitlines()[0], done
    assert re.search(r"higher .*doubles the trainable parameters", lesson) and re.search(r"lower ", lesson), done
    assert "▸ cosine" in done.out and "  linear" in done.out and "▸ linear" not in done.out, done
    assert max(map(len, done.out.splitlines())) <= 110


def test_explain_says_whose_words_it_uses(write_recipe: Callable[..., Path]) -> None:
    done = check("--explain", write_recipe(ddp_bucket_cap_mb=25))
    assert "(the help text of TRL and Transformers)" in done.out, done


def test_explain_the_blocks_of_a_mixture(write_recipe: Callable[..., Path]) -> None:
    """Guards the keys inside `datasets`, each with the values of all blocks."""
    recipe = write_recipe(datasets=[{"path": "a.jsonl", "split": "train"}, {"path": "b.jsonl"}])
    done = check("--explain", recipe)
    assert "datasets.path: [a.jsonl, b.jsonl]" in done.out and "datasets.split: train" in done.out, done


def test_explain_an_axolotl_file(tmp_path: Path) -> None:
    """Guards Axolotl's own names, the keys in its blocks, and a key that Axolotl would silently drop."""
    file = tmp_path / "config.yml"
    file.write_text(AXOLOTL)
    done = check("--explain", file)
    assert done.code == 0, done
    for head in ("base_model: teknium/", "datasets.shards: 10", "sequence_len: 2048", "num_epochs: 3"):
        assert f"\n{head}" in "\n" + done.out, done
    assert "▸ paged_adamw_8bit" in done.out and "▸ lora" in done.out, done
    typo = done.out.split("\nlora_rnak: 32")[1].split("\nnum_epochs")[0]
    assert "did you mean 'lora_r'" in typo, done
    facts = json.loads(check("--explain", file, "--json").out)
    assert facts["axolotl"] == str(file) and facts["keys"][0]["key"] == "base_model"


@pytest.mark.parametrize("words", [(), ("--show",), ("--explain", "--lora_r", "8")])
def test_an_axolotl_file_is_no_recipe(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Guards against thirty unknown-key errors where one sentence helps."""
    file = tmp_path / "config.yml"
    file.write_text(AXOLOTL)
    done = check("--recipe", file, *words)
    assert done.code == 2 and "Axolotl" in done.err and "import_axolotl.py" in done.err, done
    assert "unknown key" not in done.err and "Traceback" not in done.err, done


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "no recipe given"),
        (("--recipe", "lorra"), "'lora'"),
        (("--recipe", "lora", "sft"), "unexpected word 'sft'"),
        (("--show", "--explain", "lora"), "not allowed with"),
    ],
)
def test_bad_input(words: tuple[str, ...], part: str) -> None:
    done = check(*words)
    assert done.code == 2 and part in done.err and "Traceback" not in done.err, done


def test_colours_on_a_terminal_only(tmp_path: Path) -> None:
    """Guards the terminal's side: a person sees bold and dim, a pipe plain text (as the other tests see)."""
    done = check("--recipe", "lora", "--show", FORCE_COLOR="1", TTY_COMPATIBLE="1", TERM="xterm-256color", COLUMNS="80")
    assert "\x1b[" in done.out, done
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    assert max(map(len, plain.splitlines())) <= 80, done
