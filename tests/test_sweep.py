"""A sweep is read strictly, draws and halves as it says, and its best run is named with what chance leaves of it."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from conftest import launch, losses, metrics, run, script
from same_curve import recipe_keys, write_rows
from stepladder import errors
from stepladder.cluster import job, local_sweep, sweep
from stepladder.evaluation.choice import choose_run
from stepladder.reporting import runs as logged_runs

RATES = [1e-2, 1e-3, 1e-6, 1e38]  # the last one ends in NaN
MANY = [*range(1, 1001)]
STEPS, STOPS = 12, (3, 6)


def write_sweep(folder: Path, text: str) -> Path:
    (folder / "sweep.yaml").write_text(text)
    return folder / "sweep.yaml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: lora\nlora_rank: 4\ngrid: {lora_r: [8]}", r"yaml:2:1: unknown key 'lora_rank'"),
        ("recipe: lora\ngrid:\n  lora_rr: [8]", r"yaml:3:3: unknown key 'lora_rr'"),
        ("recipe: lora\nrandom: 3\nrandom: 4\ngrid: {lora_r: [8]}", r"yaml:3:1"),
        ("recipe: lora\nhalving: {start: 9,\n  start: 8}\ngrid: {lora_r: [8, 16]}", r"yaml:3:3: 'start' stands twice"),
        ("recipe: lora\ngrid: {output_dir: [a, b]}", r"yaml:2:8: each run has a folder of its own"),
        ("recipe: lora\ngrid: {recipe: [a, b]}", r"yaml:2:8: unknown key 'recipe'\n.*\n.*help: remove it"),
        ("recipe: lora\ngrid: {lora_r: [8, 8]}", r"yaml:2:8: lora_r has a value twice"),
        ("recipe: lora\ngrid: {learning_rate: [1e-4, 0.0001]}", r"yaml:2:8: learning_rate has a value twice"),
        ("recipe: lora\ngrid: {run_name: [a/b, a_b]}", r"yaml:2:1: two runs of the grid would lie in run_name=a_b"),
        (
            "recipe: lora\nrandom: {runs: 3}\ngrid: {lora_r: [8, 16]}",
            "2:1: random draws 3 runs, and the grid has 2",
        ),
        ("recipe: lora\nrandom: 2\ngrid: {lora_r: [8, 16]}", r"yaml:2:1: random is 2, and names"),
        ("recipe: lora\nrandom: {runs: true}\ngrid: {lora_r: [8, 16]}", r"yaml:2:1: random is"),
        ("recipe: lora\nrandom:\ngrid: {lora_r: [8, 16]}", r"yaml:2:1: random is None"),
        ("recipe: lora\nrandom: {runs: 1, sed: 4}\ngrid: {lora_r: [8, 16]}", r"yaml:2:1: random is"),
        ("", "a recipe and a grid"),
        ("recipe: lora\noutput_dir: 4\ngrid: {lora_r: [8]}", r"yaml:2:1: output_dir is a folder's name"),
        (
            f"recipe: lora\ngrid: {{lora_r: {MANY}, lora_alpha: {MANY}}}",
            r"yaml:2:1: .* 1,000,000 comb",
        ),
        ("recipe: lora\nhalving: 60\ngrid: {lora_r: [8, 16]}", r"yaml:2:1: halving is 60, and names"),
        ("recipe: lora\nhalving: {start: 60, keep: half}\ngrid: {lora_r: [8, 16]}", r"yaml:2:1: halving is"),
        ("recipe: lora\nhalving: {start: 60, keep: 1.0}\ngrid: {lora_r: [8, 16]}", r"yaml:2:1: halving keeps 1.0"),
        ("recipe: lora\nhalving: {start: 60}\ngrid: {lora_r: [8]}", r"yaml:2:1: halving needs two runs"),
        ("recipe: lora\nhalving: {start: 6}\ngrid: {max_steps: [8, 16]}", r"yaml:3:8: max_steps varies"),
    ],
)
def test_a_wrong_sweep_names_file_and_line(text: str, said: str, tmp_path: Path) -> None:
    """Guards against a word that does nothing: the array would wait in the queue and vary something else."""
    with pytest.raises(errors.RecipeError, match=said):
        sweep.read_sweep(write_sweep(tmp_path, text))


def test_a_draw_is_of_the_grid_and_the_same_each_time(tmp_path: Path) -> None:
    """Guards elements that each read the file anew: without the seed's order two of them could be one run."""
    grid = "recipe: lora\ngrid: {lora_r: [4, 8, 16, 32], learning_rate: [1e-4, 3e-4, 1e-3]}\n"
    every = sweep.read_sweep(write_sweep(tmp_path, grid)).runs
    drawn = [
        sweep.read_sweep(write_sweep(tmp_path, f"{grid}random: {{runs: 5, seed: {seed}}}")).runs for seed in (1, 1, 2)
    ]
    assert len(every) == 12 and drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(words) for words in drawn[0]}) == 5 and all(words in every for words in drawn[0])


@pytest.mark.parametrize(
    ("runs", "start", "keep", "steps", "expected"),
    [
        (8, 60, 0.5, 480, [(8, 60), (4, 120), (2, 240), (1, None)]),
        (8, 60, 0.5, 100, [(8, 60), (4, None)]),
        (9, 10, 0.3333333333333333, 1000, [(9, 10), (3, 30), (1, None)]),
        (3, 10, 0.9, 1000, [(3, 10), (2, 12), (1, None)]),
    ],
)
def test_rungs_grow_as_their_runs_become_fewer(
    runs: int, start: int, keep: float, steps: int, expected: list, tmp_path: Path
) -> None:
    """Guards the ladder against ends that never come; by hand from Jamieson & Talwalkar's rule."""
    grid = f"grid: {{seed: {list(range(runs))}}}\nhalving: {{start: {start}, keep: {keep}}}"
    found = sweep.read_sweep(write_sweep(tmp_path, f"recipe: lora\nmax_steps: {steps}\n{grid}"))
    rungs = found.rungs(job.recipe_of(found.runs[0]))
    assert [(rung.runs, rung.stop) for rung in rungs] == expected
    assert [rung.before for rung in rungs] == [None, *(stop for _, stop in expected[:-1])]


HALVED = "recipe: lora\nhalving: {start: 60}\ngrid: {learning_rate: [1e-4, 3e-4, 1e-3, 3e-3]}"
LONG, OFTEN = ["--max_steps", "480"], ["--eval_strategy", "steps", "--eval_steps", "50"]
BEST = ["--load_best_model_at_end", "true", "--save_strategy", "steps", "--save_steps", "50"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["--max_steps", "50"], "halving starts at step 60, and max_steps is 50"),
        ([], "halving starts at step 60, and max_steps is -1"),
        ([*LONG, "--eval_strategy", "no"], "evaluates nothing"),
        ([*LONG, *OFTEN, *BEST], "has none by eval_steps"),
        ([*LONG, *OFTEN[:2], "--eval_steps", "20", "--eval_delay", "70", *BEST[:-1], "60"], "has none by eval_steps"),
        ([*LONG, "--save_only_model", "true"], "no checkpoint"),
        ([*LONG, "--early_stopping_patience", "2", *BEST[:2]], "early_stopping_patience may end one before it"),
        ([*LONG, "--learning_rate", "1e-4"], "--learning_rate is given twice"),
        ([*LONG, "--output_dir", "runs/one"], "--output_dir is given twice"),
    ],
)
def test_submit_refuses_what_cannot_be_halved(keys: list[str], said: str, tmp_path: Path) -> None:
    """Guards the queue: a rung that could not be compared, or gone on from, is refused before any of them waits."""
    found = sweep.read_sweep(write_sweep(tmp_path, HALVED))
    with pytest.raises(errors.RecipeError, match=re.escape(said)):
        found.rungs(job.recipe_of([*found.runs[0], *keys]))


def test_halving_needs_the_same_rows_for_all(tmp_path: Path) -> None:
    """Guards seeds, which draw other held-out rows: the lowest loss would be that of the easiest rows."""
    text = "recipe: lora\nmax_steps: 480\nhalving: {start: 60}\ngrid: {seed: [1, 2]}\n"
    split = "eval_dataset_name: null\ntest_split_size: 0.1"
    apart = sweep.read_sweep(write_sweep(tmp_path, text))
    assert len(apart.rungs(job.recipe_of(apart.runs[0]))) == 2
    drawn = sweep.read_sweep(write_sweep(tmp_path, text + split))
    with pytest.raises(errors.RecipeError, match=r"yaml:4:8: seed varies"):
        drawn.rungs(job.recipe_of(drawn.runs[0]))


def test_submit_prints_a_job_for_each_rung(tmp_path: Path) -> None:
    """Guards the order: a rung waits for all runs of the one before it, and has fewer."""
    done = script("submit", "--sweep", write_sweep(tmp_path, HALVED), "--max_steps", 480, "--dry_run")
    lines = [line for line in done.out.splitlines() if line.startswith("# sbatch")]
    assert done.code == 0 and len(lines) == 3, done
    for number, (line, last) in enumerate(zip(lines, (3, 1, 0), strict=True)):
        assert f"--array=0-{last}" in line and f"--rung {number}" in line
        assert ("--dependency=afterany:JOB" in line) == (number > 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "2"], "--gpus with --here"),
        (["--time", "1:00"], "--time with --here"),
        (["--nodes", "2"], "--nodes with --here"),
        (["--ranks", "2", "--strategy", "nothing"], "no accelerate_configs/nothing.yaml"),
    ],
)
def test_a_sweep_here_refuses_what_only_slurm_can_do(words: list[str], said: str, tmp_path: Path) -> None:
    """Guards against a flag without effect: nothing is asked for two GPUs where no queue is."""
    done = script("submit", "--sweep", write_sweep(tmp_path, HALVED), *LONG, "--here", *words)
    assert done.code == 2 and said in done.err, done


def test_a_sweep_here_prints_the_commands_that_it_runs(tmp_path: Path) -> None:
    """Guards the strategy: a sweep's own wins over the command line's, and several ranks have a launcher."""
    grid = "recipe: lora\ngrid: {learning_rate: [1e-4, 3e-4]}\n"
    done = script("submit", "--sweep", write_sweep(tmp_path, grid), "--here", "--dry_run")
    assert done.out.splitlines()[1].startswith("python scripts/sft.py --recipe lora --learning_rate 3e-4 --output_dir")
    file = write_sweep(tmp_path, f"strategy: zero2\n{grid}")
    done = script("submit", "--sweep", file, "--here", "--dry_run", "--ranks", 2, "--max_steps", 3)
    (line, _) = done.out.splitlines()
    assert "--config_file accelerate_configs/zero2.yaml --num_processes 2 scripts/sft.py" in line, done
    assert "--strategy" not in line and line.endswith("--max_steps 3")


def test_a_sweep_here_is_resumed_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards an evening's sweep: what is finished does not train again, a failed run does not end the others, and an
    interrupted one does."""
    text = f"recipe: lora\noutput_dir: {tmp_path}/out\ngrid: {{learning_rate: [1e-4, 3e-4, 1e-3]}}"
    found = sweep.read_sweep(write_sweep(tmp_path, text))
    rungs, begun, codes = found.rungs(job.recipe_of(found.runs[0])), [], [0, 1, 75]

    def train(command: list[str]) -> int:
        if "scripts/report.py" in command:
            begun.append("report")
            return 0
        folder = Path(command[command.index("--output_dir") + 1])
        begun.append(folder.name)
        code = codes.pop(0)
        folder.mkdir(parents=True, exist_ok=True)
        state = {0: "finished", 1: "failed", 75: "preempted"}[code]
        recipe = job.recipe_of(command[command.index("scripts/sft.py") + 1 :]).values
        (folder / "run.json").write_text(json.dumps({"status": state, "totals": {"steps": 9}, "recipe": recipe}))
        return code

    monkeypatch.setattr(local_sweep, "_run", train)
    with pytest.raises(SystemExit) as end:
        local_sweep.run_sweep(found, rungs, "single", 1, [])
    names = [folder.name for folder in found.folders]
    assert end.value.code == 75 and begun == names
    assert "ended with exit code 1" in capsys.readouterr().out
    begun.clear()
    codes[:] = [1, 0]
    with pytest.raises(errors.RunError, match=f"1 of the sweep's runs failed: {names[1]}"):
        local_sweep.run_sweep(found, rungs, "single", 1, [])
    assert begun == [*names[1:], "report"]
    begun.clear()
    codes[:] = [0]
    local_sweep.run_sweep(found, rungs, "single", 1, [])
    assert begun == [names[1], "report"]
    begun.clear()
    codes[:] = [1, 1, 1]
    with pytest.raises(errors.RunError, match=r"no run of .* has finished"):
        local_sweep.run_sweep(found, rungs, "single", 1, ["--lora_r", "4"])  # another recipe: sft.py says what differs
    assert begun == names


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_sweep_here_whatever_the_runs_exit_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards Ctrl-C while a run imports its libraries, and a launcher of several ranks, which ends with code 1 after a
    signal: the sweep went on with the next run."""
    text = f"recipe: lora\noutput_dir: {tmp_path}/out\ngrid: {{learning_rate: [1e-4, 3e-4]}}"
    found, begun = sweep.read_sweep(write_sweep(tmp_path, text)), tmp_path / "begun"
    code = f"open({str(begun)!r}, 'a').write('run '); import os, signal; os.kill(os.getppid(), signal.{name}); exit(1)"
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(local_sweep, "launch_command", lambda *_: command)
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(SystemExit) as end:
        local_sweep.run_sweep(found, found.rungs(job.recipe_of(found.runs[0])), "single", 1, [])
    assert end.value.code == 75 and begun.read_text() == "run "
    assert signal.getsignal(getattr(signal, name)) is before


@pytest.fixture(scope="module")
def halved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[sweep.Sweep, Path]:
    """A sweep of four learning rates, run rung by rung without Slurm; and a run that never stopped."""
    folder = tmp_path_factory.mktemp("halved")
    keys = recipe_keys("full", tiny, write_rows(folder / "rows.jsonl"))
    keys |= {"use_cpu": True, "max_steps": STEPS, "test_split_size": 6, "eval_strategy": "steps", "eval_steps": 12,
             "save_strategy": "no", "logging_steps": 1, "lr_scheduler_type": "cosine", "report_to": "none"}  # fmt: skip
    keys.pop("eval_dataset_name", None)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    content = {"recipe": str(folder / "recipe.yaml"), "output_dir": str(folder / "sweep"),
               "halving": {"start": STOPS[0]}, "grid": {"learning_rate": RATES}}  # fmt: skip
    found = sweep.read_sweep(write_sweep(folder, yaml.safe_dump(content)))

    def into(place: Path) -> list[str]:
        return [str(place) if word == str(found.folders[0]) else word for word in found.runs[0]]

    for number, rung in enumerate(found.rungs(job.recipe_of(found.runs[0]))):
        commands = [job._element(place, found.file, ["--rung", str(number)]) for place in range(rung.runs)]
        if number == 0:
            commands += [into(folder / "never_stopped"), [*into(folder / "padded"), "--padding_free", "false"]]
            commands.append([*into(folder / "short"), "--num_train_epochs", "0.01", "--stop_at_step", "99"])
            commands[-1] += ["--max_steps", "-1"]
        (folder / "commands.json").write_text(json.dumps([command for command in commands if command]))
        done = run(sys.executable, "tests/in_turn.py", folder / "commands.json")
        assert done.code == 0, done
        codes = json.loads((folder / "commands.json.codes").read_text())
        assert codes == [0, 0, 0, 1, 0, 0, 0] if number == 0 else set(codes) == {0}, done
        assert number or "step 1 is the run's last, so --stop_at_step 99 has no effect" in done.out, done
    return found, folder


def test_a_run_that_stays_has_the_curve_of_one_that_never_stopped(halved: tuple[sweep.Sweep, Path]) -> None:
    """Guards a rung as a stop: with max_steps instead, the learning rate would have fallen to 0 at each of them. And
    guards the choice: by loss at the rung's step, without the run that failed."""
    found, folder = halved
    first, second, last, failed = found.folders
    ended = [[row["step"] for row in metrics(one)][-1] for one in (first, second, last)]
    assert ended == [STEPS, STOPS[1], STOPS[0]]
    assert losses(first) == pytest.approx(losses(folder / "never_stopped"), rel=1e-6)
    rates = [
        [row["learning_rate"] for row in metrics(one) if "loss" in row] for one in (first, folder / "never_stopped")
    ]
    assert rates[0] == rates[1]
    assert [row["step"] for row in metrics(first) if "eval_loss" in row] == [*STOPS, STEPS]
    decision = json.loads((found.decision(1)).read_text())
    assert decision["kept"] == [first.name, second.name] and decision["held_out_loss"][failed.name] is None
    for stopped in (second, last):
        assert json.loads((stopped / "run.json").read_text())["reached_stop"] is True
        assert job.decide_requeue(stopped, 0)[0] == "finished"


def test_a_job_that_comes_back_after_its_stop_trains_nothing(halved: tuple[sweep.Sweep, Path]) -> None:
    """Guards the requeue of an element that had ended: it would go on to the end of the run."""
    found, _ = halved
    before = metrics(found.folders[2])
    done = script("sft", *found.runs[2], "--stop_at_step", STOPS[0])
    assert done.code == 0 and f"has reached step {STOPS[0]} already" in done.err, done
    assert metrics(found.folders[2]) == before


def test_a_decision_stands(halved: tuple[sweep.Sweep, Path]) -> None:
    """Guards elements of one rung that start one after the other: what the first one does moves no other."""
    found, _ = halved
    rung = found.rungs(job.recipe_of(found.runs[0]))[1]
    file = found.folders[0] / "metrics.jsonl"
    kept = file.read_text()
    file.write_text("")
    try:
        assert [sweep.find_run(found, rung, place)[:-2] for place in (0, 1)] == found.runs[:2]
    finally:
        file.write_text(kept)


def test_a_rung_without_runs_ends_the_chain_with_a_reason(tmp_path: Path) -> None:
    """Guards the chain against hours of an empty rung: each run's status is named. A place too many rests."""
    grid = "grid: {learning_rate: [1e-4, 3e-4, 1e-3, 3e-3]}\nhalving: {start: 60}"
    text = f"recipe: lora\nmax_steps: 480\neval_strategy: steps\noutput_dir: {tmp_path}/out\n{grid}"
    found = sweep.read_sweep(write_sweep(tmp_path, text))
    rung = found.rungs(job.recipe_of(found.runs[0]))[1]
    for folder in found.folders:
        folder.mkdir(parents=True)
        (folder / "run.json").write_text('{"status": "failed"}')
        (folder / "metrics.jsonl").write_text('{"step": 60, "eval_loss": null}\n{"step": 40, "eval_loss": 1.0}\n')
    with pytest.raises(errors.LaunchError, match=r"(?s)no run .* at step 60.*learning_rate=3e-3: failed"):
        sweep.find_run(found, rung, 0)
    (found.folders[2] / "metrics.jsonl").write_text('{"step": 60, "eval_loss": 1.0}\n')
    assert sweep.find_run(found, rung, 0)[:-2] == found.runs[2] and sweep.find_run(found, rung, 1) == []

    (other := tmp_path / "other.yaml").write_text(text.replace("1e-3", "2e-3"))
    with pytest.raises(
        errors.LaunchError, match="has a held-out loss at step 60"
    ):  # of the same folder: it decides for itself
        sweep.find_run(sweep.read_sweep(other), rung, 0)
    decision = found.decision(1)
    decision.write_text(decision.read_text().replace("1e-3", "2e-3"))
    with pytest.raises(errors.LaunchError, match="names learning_rate=2e-3, which is no run of"):
        sweep.find_run(found, rung, 0)

    (found.folders[0] / "run.json").unlink()
    assert found.split_folders() == (found.folders[1:], found.folders[:1]), "the report leaves out what never began"


def test_the_report_names_the_best_run(halved: tuple[sweep.Sweep, Path]) -> None:
    """Guards the last job: the verdict is printed and on the page, though a run failed and others were stopped."""
    found, folder = halved
    done = script("report", "--sweep", found.file, "--json")
    assert done.code == 0, done
    choice = json.loads(done.out)["choice"]
    assert choice["name"] == "best run" and found.folders[0].name in choice["what"], choice
    assert "failed" in choice["evidence"] and f"preempted at step {STOPS[1]}" in choice["evidence"], choice
    assert choice["what"] in (found.folder / "report.html").read_text()
    done = script("report", found.folders[0], folder / "never_stopped", "-o", folder / "two.html")
    assert "cannot be distinguished from" in done.out, done  # one and the same curve
    assert re.search(r"held-out loss \d\.\d{4} \[\d\.\d{4}, \d\.\d{4}\]", done.out), done


def test_the_losses_of_rows_are_transformers_own(halved: tuple[sweep.Sweep, Path], tiny: Path) -> None:
    """Guards the interval: each row's loss, however rows lie in a batch and over ranks, is what the model's own
    forward pass says of that row alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stepladder.data import mixture
    from stepladder.data.render import render

    found, folder = halved
    recipe = job.recipe_of(found.runs[0])
    rows = render(mixture.load(recipe)[1], AutoTokenizer.from_pretrained(tiny)).to_list()
    model = AutoModelForCausalLM.from_pretrained(folder / "never_stopped").eval()
    wanted = []
    with torch.inference_mode():
        for row in rows:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            wanted.append(float(model(input_ids=ids, labels=labels).loss) * int((labels[:, 1:] != -100).sum()))
    words = [str(folder / "ranks") if word == str(found.folders[0]) else word for word in found.runs[0]]
    ranks = launch("ddp", 2, "sft", *words)
    assert ranks.code == 0, ranks
    for name in ("never_stopped", "padded", "ranks"):
        kept = json.loads((folder / name / "held_out_losses.json").read_text())
        assert kept["rows"] == list(range(len(rows))) and kept["step"] == STEPS
        assert kept["nats"] == pytest.approx(wanted, rel=1e-4)


def make_run(folder: Path, name: str, nats: list[float], rows: str = "a", **facts: object) -> Path:
    """A finished run whose rows of ten tokens have these losses."""
    place, loss = folder / name, sum(nats) / (10 * len(nats))
    place.mkdir(parents=True)
    content = {
        "status": "finished",
        "final": {"eval_loss": loss},
        "inputs": {"evaluation_rows": {"rows": rows}},
        **facts,
    }
    (place / "run.json").write_text(json.dumps(content))
    (place / "metrics.jsonl").write_text(json.dumps({"step": 5, "eval_loss": loss}) + "\n")
    kept = {"step": 5, "rows": [*range(len(nats))], "nats": nats, "tokens": [10] * len(nats)}
    (place / "held_out_losses.json").write_text(json.dumps(kept))
    return place


def test_a_verdict_on_runs_says_what_is_known(tmp_path: Path) -> None:
    """Guards the choice against chance, against rows that differ, and against losses that are not kept: none of them
    may look like a winner. The p values are scipy's."""
    import numpy as np
    from scipy import stats

    generator = np.random.default_rng(1)
    base = generator.normal(20, 5, 60)
    noise, shift = generator.normal(0, 1, 60), generator.normal(0.8, 1, 60)
    assert stats.wilcoxon(noise).pvalue > 0.2 and stats.wilcoxon(shift).pvalue < 1e-4
    noise -= noise.mean() - 0.01
    make_run(tmp_path, "base", base.tolist())
    make_run(tmp_path, "worse", (base + shift).tolist())
    make_run(tmp_path, "alike", (base + noise).tolist())
    make_run(tmp_path, "other", base.tolist(), rows="b")
    make_run(tmp_path, "failed", (base - 9).tolist(), status="failed")
    (make_run(tmp_path, "old", (base + shift).tolist()) / "held_out_losses.json").unlink()
    half = make_run(tmp_path, "half", (base + shift).tolist()) / "held_out_losses.json"
    half.write_text(half.read_text()[:50])
    none = make_run(tmp_path, "none", [0.0, *base.tolist()]) / "held_out_losses.json"
    none.write_text(none.read_text().replace("[10,", "[0,"))
    make_run(tmp_path, "foreign", base.tolist(), inputs={"evaluation_rows": [1]})

    def verdict(*names: str) -> tuple[str, str]:
        found = choose_run(logged_runs.read_all([tmp_path / name for name in names]))
        return (found.name, found.what + found.evidence) if found else ("", "")

    assert verdict("worse", "base", "failed")[0] == "best run" and verdict("worse", "base", "failed")[1].startswith(
        "base is"
    )
    assert verdict("worse", "alike", "base")[0] == "no clear best run"
    assert "cannot be distinguished from alike." in verdict("worse", "alike", "base")[1]
    assert verdict("base", "other")[0] == "no best run" and "different rows" in verdict("base", "other")[1]
    assert verdict("foreign", "failed")[0] == "best run"
    for lacking in ("old", "half", "none"):
        assert "is not known" in verdict("base", lacking)[1]
    assert "only run" in verdict("base", "failed")[1] and verdict("base") == ("", "")
