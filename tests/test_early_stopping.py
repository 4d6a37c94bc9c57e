"""Early stopping ends a run where Transformers' callback would, on all ranks and over a resume alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_best_model import METHODS, Best, assert_result_is, best_step
from test_resume import EXACT, difference
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState

from conftest import manifest, metrics, script
from stepladder.errors import FAULT, LOOK
from stepladder.manifest import stop_reason
from stepladder.reporting import curves, page, runs
from stepladder.training.checkpoint.resume import of_step, whole_steps
from stepladder.training.guard.early_stopping import EarlyStopping

LORA = METHODS["lora"]
STEPS, PATIENCE = 12, 3
STOPS = {"early_stopping_patience": PATIENCE, "max_steps": STEPS, "save_total_limit": None}
LAST = {"load_best_model_at_end": False, "metric_for_best_model": "eval_loss"}
# A rate at which another order of sums, on several ranks, stays a matter of the last digits.
SLOW = {"learning_rate": 0.02, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}
NO_LIMIT = {"save_strategy": "no", "save_total_limit": None}
# Sends a signal as soon as the evaluation begins that would end the run.
SIGNAL = """
import os, signal
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {step}:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def stop_of(losses: list[float], patience: int, threshold: float = 0.0) -> int | None:
    """The evaluation, counted from 1, after which a run ends: by hand, for a loss."""
    best, without = math.inf, 0
    for number, loss in enumerate(losses, start=1):
        without = 0 if best - loss > threshold else without + 1
        best = min(best, loss)
        if without >= patience:
            return number
    return None


def stub(greater: bool, metric: str) -> Any:
    """What early stopping and Transformers' choice of the best metric see of a trainer."""
    return SimpleNamespace(
        args=SimpleNamespace(
            greater_is_better=greater, metric_for_best_model=metric, process_index=0, save_strategy="steps",
            load_best_model_at_end=True,
        ),
        state=TrainerState(max_steps=10**6), control=TrainerControl(),
        rank_sync=SimpleNamespace(sum_over_ranks=lambda *values: [*values], preempted=True, reached_stop=True),
    )  # fmt: skip


VALUES = st.one_of(st.sampled_from([0.0, 1.0, 1.1, 1.2, 2.0, math.nan, math.inf, -math.inf]), st.floats(0, 3))


@settings(max_examples=400, deadline=None)
@given(
    values=st.lists(VALUES, max_size=20),
    patience=st.integers(1, 5),
    threshold=st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    greater=st.booleans(),
    metric=st.sampled_from(["loss", "eval_loss", "mean_token_accuracy"]),
    resumed=st.sets(st.integers(0, 20)),
)
def test_the_decision_is_that_of_transformers(values, patience, threshold, greater, metric, resumed) -> None:
    """Guards the count against Transformers' own callback, which sees no resume, where ours resumes at any step."""
    theirs, callback = stub(greater, metric), EarlyStoppingCallback(patience, threshold)
    ours = stub(greater, metric)
    stopping = EarlyStopping(ours, patience, threshold)
    name = f"eval_{metric.removeprefix('eval_')}"
    for step, value in enumerate(values, start=1):
        for trainer in (theirs, ours):
            trainer.state.global_step = step
        callback.on_evaluate(theirs.args, theirs.state, theirs.control, {name: value})
        stopping.add({name: value})
        for trainer in (theirs, ours):
            Trainer._determine_best_metric(trainer, {name: value}, None)
        assert stopping.count == callback.early_stopping_patience_counter
        assert ours.control.should_training_stop == theirs.control.should_training_stop == stopping.ends_run
        if theirs.control.should_training_stop:
            assert (ours.rank_sync.preempted, ours.control.should_save) == (False, True)
            return
        if step in resumed:
            saved = json.loads(json.dumps({"count": stopping.count, "state": vars(ours.state)}))
            ours = stub(greater, metric)
            ours.state = TrainerState(**saved["state"])
            stopping = EarlyStopping(ours, patience, threshold)
            stopping.count = saved["count"]


def evaluations(folder: Path) -> list[float]:
    return [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]


@pytest.fixture(scope="module")
def single(tiny, contrary_rows, tmp_path_factory) -> tuple[dict[str, Path], str]:
    """One run that goes to its end, and runs that end early, resumed, stopped and trained on in all ways."""
    folder = tmp_path_factory.mktemp("single")
    session, found = Best(folder, tiny, *contrary_rows), {}
    keys = LORA | STOPS
    found["whole"] = session.train("whole", **{**keys, "early_stopping_patience": None})
    codes = [0]

    def add(name: str, run: Path, code: int = 0) -> None:
        found[name] = run
        codes.append(code)

    add("stopped", session.train("stopped", **keys))
    add("the same command", session.train("stopped", **keys), 2)
    add("more steps", session.train("stopped", **keys | {"max_steps": STEPS + 4}), 2)
    add("resumed first", session.resume(found["stopped"], "first", 1, **keys))
    add("again", session.resume(found["resumed first"], "again", 3, **keys))
    add("last", session.train("last", **keys | LAST | NO_LIMIT))
    add("best", session.train("best", **keys | {"save_strategy": "best", "metric_for_best_model": "eval_loss"}))
    for step in (2, 4, 5):
        add(f"after {step}", session.resume(found["stopped"], f"after-{step}", step, **keys))
    add("more patience", session.resume(found["stopped"], "patient", STEPS, **keys))
    add("more patience", session.train("patient", **keys | {"early_stopping_patience": 100}))
    add("threshold", session.train("threshold", **keys | {"early_stopping_threshold": 50.0}))
    add("at the start", session.train("start", **keys | {"eval_on_start": True}))
    add("delayed", session.train("delayed", **keys | {"eval_delay": 3}))
    epochs = {"eval_strategy": "epoch", "eval_steps": None, "save_strategy": "epoch", "global_batch_size": 8}
    add("epochs", session.train("epochs", **keys | epochs))
    add("slow", session.train("slow", **STOPS | SLOW))
    add("no such metric", session.train("metric", **keys | {"metric_for_best_model": "accuracy"}), 1)
    out = session.start(codes=codes).out
    return found, out


def test_the_run_ends_as_finished_with_its_best_step(single) -> None:
    """Guards the end: the run goes on to its last step, or its end is no usual one (evaluation, checkpoint, page)."""
    found, out = single
    whole, stopped = found["whole"], found["stopped"]
    step = stop_of(evaluations(whole), PATIENCE)
    best = best_step(whole)
    assert step == best + PATIENCE < STEPS
    facts = manifest(stopped)
    assert facts["status"] == "finished" and facts["totals"]["steps"] == step
    assert evaluations(stopped) == evaluations(whole)[:step], "the schedule is that of the whole run"
    assert_result_is(stopped, best)
    assert whole_steps(stopped) == [*range(1, step + 1)]
    losses = evaluations(whole)
    assert facts["stopped_early"] == {
        "step": step, "of_steps": STEPS, "metric": "eval_loss", "value": losses[step - 1], "best": min(losses),
        "best_step": best, "evaluations": PATIENCE, "patience": PATIENCE, "threshold": 0.0,
    }  # fmt: skip
    reason = stop_reason(facts["stopped_early"])
    assert reason.startswith(f"stopped early after step {step} of {STEPS}: eval_loss was not better than ")
    assert reason in out
    assert f"at most {STEPS} steps" in out and f"the result is step {best}, the best of the evaluations" in out
    assert "stopped_early" not in manifest(whole)


def drawn_lines(picture: Path, last: int) -> list[int]:
    """The steps of the vertical lines in loss.png, whose plot lies between its pixels 78 and 920, and 50 and 440."""
    with Image.open(picture) as image:
        dark = np.asarray(image.convert("L"))[50:440, :] < 170
    columns = np.flatnonzero(dark.mean(axis=0) > 0.9)
    return sorted({round(1 + (x - 78) / 842 * (last - 1)) for x in columns.tolist()})


def test_the_page_and_what_follows_a_run_say_why(single) -> None:
    """Guards a page that hides the early end, and a fault of overfitting that the result does not have."""
    stopped = single[0]["stopped"]
    html = (stopped / "report.html").read_text()
    verdicts = {verdict.name: verdict for verdict in page.judge_run(runs.read(stopped))}
    assert "stopped early" in html and f"{manifest(stopped)['totals']['steps']} of {STEPS}, stopped early" in html
    assert verdicts["stopped early"].evidence == stop_reason(manifest(stopped)["stopped_early"])
    assert [*runs.follow(stopped)][-1].endswith(stop_reason(manifest(stopped)["stopped_early"]))
    facts = manifest(stopped)["stopped_early"]
    done = script("report", stopped)
    marks = [
        [facts["best_step"], f"best step: {facts['best_step']}"],
        [facts["step"], f"stopped early: {facts['step']}"],
    ]
    assert (
        done.code == 0
        and f'"marks":{json.dumps(marks, separators=(",", ":"))}' in (stopped / "report.html").read_text()
    )
    assert drawn_lines(stopped / "loss.png", facts["step"]) == [facts["best_step"], facts["step"]]
    assert drawn_lines(single[0]["whole"] / "loss.png", STEPS) == []
    loss = runs.Curve([*range(1, 31)], [3 - 0.08 * step for step in range(30)])
    held_out = runs.Curve([10, 20, 30], [2.0, 2.2, 2.6])
    for result, severity in ((None, FAULT), (30, FAULT), (10, LOOK)):
        judged = {verdict.name: verdict for verdict in curves.judge_curves(loss, held_out, runs.Curve(), result)}
        assert judged["overfitting"].severity == severity


def test_a_finished_run_is_not_trained_on_by_accident(single) -> None:
    """Guards the same command, and more steps without more patience: both would train what was stopped."""
    found, out = single
    step = manifest(found["stopped"])["stopped_early"]["step"]
    assert "a larger --early_stopping_patience trains it on" in out
    assert f"early stopping ends it at step {step}, after {PATIENCE} evaluations in a row" in out
    assert f"--early_stopping_patience {PATIENCE + 1} or more trains it on" in out


def test_more_patience_goes_on_as_if_it_had_been_there_from_the_beginning(single) -> None:
    found, _ = single
    assert difference(found["whole"], found["more patience"]) == EXACT
    assert "stopped_early" not in manifest(found["more patience"])


@pytest.mark.parametrize("name", ["resumed first", "again", "after 2", "after 4", "after 5"])
def test_a_resumed_run_stops_where_it_would_have(name, single) -> None:
    """Guards the count over a resume, which Transformers begins at 0 again (transformers#28544)."""
    found, _ = single
    assert difference(found["stopped"], found[name]) == EXACT
    assert manifest(found[name])["stopped_early"] == manifest(found["stopped"])["stopped_early"]
    assert manifest(found[name])["result_step"] == manifest(found["stopped"])["result_step"]


def test_without_a_choice_the_result_is_the_last_step(single) -> None:
    """Guards early stopping without `load_best_model_at_end`, and without a checkpoint: the note says what results."""
    found, out = single
    step = manifest(found["stopped"])["stopped_early"]["step"]
    facts = manifest(found["last"])
    assert facts["result_step"] == facts["totals"]["steps"] == step == facts["stopped_early"]["step"]
    assert facts["stopped_early"]["best_step"] == manifest(found["stopped"])["result_step"]
    assert not whole_steps(found["last"])
    assert "the result is the step at which early stopping ends the run, not the best one before it" in out
    assert manifest(found["best"])["stopped_early"] == manifest(found["stopped"])["stopped_early"]
    assert_result_is(found["best"], manifest(found["best"])["result_step"])


def test_which_evaluations_count(single) -> None:
    """Guards the threshold, `eval_delay`, the evaluation before the first step, and evaluations by epoch."""
    found, out = single
    losses = evaluations(found["whole"])
    step = {name: manifest(run)["totals"]["steps"] for name, run in found.items() if name != "no such metric"}
    assert step["threshold"] == stop_of(losses, PATIENCE, 50.0) == PATIENCE + 1
    assert step["at the start"] == stop_of(losses, PATIENCE)
    assert step["delayed"] == 2 + stop_of(losses[2:], PATIENCE)
    assert step["epochs"] == stop_of(evaluations(found["epochs"]), PATIENCE) < STEPS
    assert of_step(found["epochs"], step["epochs"]).is_dir()
    assert "the evaluation has no eval_accuracy" in out and "Traceback" not in out, out


@pytest.mark.parametrize(
    ("config", "ranks"), [*(pytest.param(name, 2, marks=pytest.mark.proof) for name in ("ddp", "zero3")), ("fsdp", 2)]
)
def test_all_ranks_stop_at_the_step_of_one_process(config, ranks, single, tiny, contrary_rows, tmp_path) -> None:
    """Guards ranks that stop apart and wait for each other for ever; and a run resumed on another number of ranks."""
    slow = single[0]["slow"]
    expected = manifest(slow)
    cut = expected["totals"]["steps"] - 2
    session, keys = Best(tmp_path, tiny, *contrary_rows), STOPS | SLOW
    stopped = session.train("stopped", **keys)
    again = session.resume(stopped, "again", cut, **keys)
    one = session.resume(slow, "of-one", cut, **keys)
    session.start(config, ranks)
    assert expected["stopped_early"] and max(difference(stopped, again).values()) <= 1e-6
    for run in (stopped, again, one):
        facts = manifest(run)
        assert facts["status"] == "finished" and facts["totals"]["steps"] == expected["totals"]["steps"]
        assert facts["stopped_early"]["best_step"] == expected["stopped_early"]["best_step"] == facts["result_step"]
        assert evaluations(run) == pytest.approx(evaluations(slow), abs=5e-3)


def test_stops_at_the_same_step(single, tiny, contrary_rows, tmp_path) -> None:
    """Guards an evaluation that a signal interrupts (it counts once, when it is repeated) and `--stop_at_step` at the
    step of the early stop: the run is finished, and a start after it has nothing to do."""
    found, _ = single
    step = manifest(found["stopped"])["totals"]["steps"]
    (tmp_path / "signal.py").write_text(SIGNAL.format(step=step))
    session, keys = Best(tmp_path, tiny, *contrary_rows), LORA | STOPS
    left = session.train("left", "--callback", tmp_path / "signal.py", **keys)
    again = session.train("left", **keys)
    reached = session.train("reached", "--stop_at_step", step, **keys)
    before = session.train("before", "--stop_at_step", step - 1, **keys)
    session.train("before", **keys)
    killed = session.resume(again, "killed", step, **keys)  # after the evaluation was repeated, before run.json said so
    patient = session.resume(again, "patient", step, **keys)
    session.train("patient", **keys | {"early_stopping_patience": 100})
    done = session.start(codes=[75, *[0] * 7])
    assert difference(found["whole"], patient) == EXACT, done
    for run in (again, reached, before, killed):
        assert manifest(run)["status"] == "finished", run
        assert manifest(run)["stopped_early"] == manifest(found["stopped"])["stopped_early"]
        assert difference(found["stopped"], run) == EXACT
    assert left == again


def test_a_stop_without_an_evaluation_of_its_own_is_refused(learnable, tiny, write_recipe, tmp_path) -> None:
    """Guards `--stop_at_step`, which evaluates: an evaluation more would end the run at another step."""
    recipe = write_recipe(
        model_name_or_path=str(tiny), dataset_name=str(learnable), eval_dataset_name=str(learnable), max_steps=9,
        eval_strategy="steps", eval_steps=2, early_stopping_patience=2, metric_for_best_model="loss",
    )  # fmt: skip
    done = script("sft", "--recipe", recipe, "--stop_at_step", 3, "--output_dir", tmp_path / "run")
    assert done.code == 2 and "early_stopping_patience: 2 depends on each evaluation" in done.err, done


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0"),
        ({"early_stopping_patience": 2.5}, "early_stopping_patience"),
        ({"early_stopping_patience": 2, "early_stopping_threshold": -1.0}, "early_stopping_threshold is -1"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "no effect with eval_strategy: no"),
        ({"early_stopping_patience": 2, "eval_strategy": "epoch"}, "early_stopping_patience: 2 without a metric"),
        ({"early_stopping_threshold": 0.1, "eval_strategy": "epoch"}, "early_stopping_threshold has no effect"),
    ],
)
def test_what_cannot_stop_early_is_refused(keys, said, learnable, tiny, write_recipe) -> None:
    """Guards a patience that never ends a run, without a word."""
    evaluates = {"eval_dataset_name": str(learnable)} if keys.get("eval_strategy") == "epoch" else {}
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name=str(learnable), **keys, **evaluates)
    done = script("check", "--recipe", recipe)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err, done
