"""A GPU for a quarter of an hour: what is worth most first, each result kept as soon as it is there.

    python benchmarks/gpu_day.py                         # runs/gpu-day/page.md and record.json
    python benchmarks/gpu_day.py --rehearse              # the same steps on the CPU with a tiny model: before the hour
    python benchmarks/gpu_day.py --step "curve lora"     # one step by itself, as the others run it

In this order: each kind of recipe by scripts/sft.py, resumed, merged and compared; the curve on the GPU against the
CPU's (tests/same_curve.py --gpu); planned against measured memory (benchmarks/plan_gpu.py); speed beside `trl sft`
(benchmarks/train_gpu.py). Each step is a process of its own. record.json is written anew, in one piece, before and
after each, so that a call that is killed loses one step; the next call goes on: first with what was not tried, then
with what was cut off, then with what failed. No step starts that takes longer than what is left of --minutes.

It needs no installation and no network: any Python with torch, transformers, trl, peft, accelerate and datasets runs
it, all models have random weights, and steps whose packages are missing are skipped by name. Wheels that you bring:
pip install --no-index --find-links WHEELS --target /some/where/site-packages trl datasets bitsandbytes, and
PYTHONPATH=/some/where/site-packages. Exits with 1 where a step failed, with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests", "benchmarks")]

import plan_gpu  # noqa: E402
import train_gpu  # noqa: E402

import same_curve  # noqa: E402
from stepladder import flags  # noqa: E402
from tiny import make_tiny  # noqa: E402

TRAINS = ("transformers", "accelerate", "peft", "trl", "datasets")  # what scripts/sft.py cannot do without
SHOWN = (*TRAINS, "bitsandbytes", "flash-attn", "liger-kernel", "kernels", "deepspeed", "triton")
MARK = "STEPLADDER_GPU_DAY"  # in the environment of all that a call starts: the folder that it works in
LINES = 25  # of a failed step's output, the last ones
SHORTEST = 120  # seconds that any step may take, whatever its estimate
DONE, FAILED, CUT, SKIPPED, NO_TIME = "done", "failed", "cut off", "skipped", "no time"
AGAIN = (NO_TIME, CUT, FAILED)  # by the next call, in this order, after what is not in the record
GROUPS = {
    "smoke": ("What runs", ["step", "seconds", "outcome", "what came out"]),
    "curve": ("The same curve as on the CPU", ["step", "seconds", "outcome", "what came out"]),
    "plan": (
        "Planned and measured memory",
        ["model", "method", "batch × tokens", "ckpt", "weights", "allocated GiB", "reserved GiB", "plan GiB", "error"],
    ),
    "speed": ("Speed beside `trl sft`", ["model, method, batch × tokens", "", "tokens/s", "MFU", "peak GiB", "loss"]),
}


@dataclass(frozen=True)
class Place:
    """Where a step works; `gpu` is false in a rehearsal."""

    folder: Path
    gpu: bool

    def made(self, name: str) -> Path:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return self.folder / name


@dataclass(frozen=True)
class Step:
    """`work` runs in a process of its own. What it returns is recorded: `figures`, `lines` of the page's table, and a
    `fault` where it ran and the result is wrong.

    `seconds` is a guess for one H200, which the steps that are done correct; `beside` says that others may run at the
    same time, since nothing is timed or measured in it.
    """

    name: str
    seconds: float
    work: Callable[[Place], dict[str, Any]]
    packages: tuple[str, ...] = TRAINS
    beside: bool = False
    needs_gpu: bool = False

    @property
    def group(self) -> str:
        return self.name.split()[0]


# ---- what the steps do, each in a process of its own


def python(*words: object, code: int = 0) -> None:
    """A script of this repository, as a person starts it; its output is the step's."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=same_curve.one_gpu()).returncode
    if done != code:
        sys.exit(f"✘ {' '.join(map(str, words))}\n  exit code {done} in place of {code}")


def train(place: Place, name: str, recipe: str, *words: object, code: int = 0, anew: bool = True) -> dict[str, Any]:
    """Four steps of the tiny model with two evaluations and saves; what run.json says."""
    run = place.made("smoke") / name
    keys = {
        "model_name_or_path": place.folder / "plan/tiny", "dataset_name": "data/techco.jsonl", "max_steps": 4,
        "global_batch_size": 8, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2, "output_dir": run,
    }  # fmt: skip
    given = [word for key, value in keys.items() for word in (f"--{key}", value)]
    python("scripts/sft.py", "--recipe", recipe, *given, *words, *["--overwrite"] * anew, code=code)
    facts = json.loads((run / "run.json").read_text())
    if place.gpu and not all("cuda" in device for device in facts["devices"]):
        sys.exit(f"✘ it trained on {facts['devices']}, and not on the GPU")
    return facts


def figures(facts: dict[str, Any]) -> dict[str, Any]:
    peak = max(facts["totals"]["peak_memory_bytes"]) / 2**20
    return {"loss": round(facts["final"]["loss"], 4), "precision": facts["precision"], "peak MiB": round(peak, 1)}


def smoke(name: str, recipe: str, *words: object) -> Callable[[Place], dict[str, Any]]:
    return lambda place: {"figures": figures(train(place, name, recipe, *words))}


def lora(place: Place) -> dict[str, Any]:
    """Trained, merged, asked and compared."""
    facts = train(place, "lora", "lora")
    run, merged = place.folder / "smoke/lora", place.folder / "smoke/merged"
    device = "cuda" if place.gpu else "cpu"
    python("scripts/merge.py", "--adapter", run, "--output_dir", merged, "--overwrite", "--device", device)
    python("scripts/generate.py", "--model", merged, "--prompt", "Where is my order?", "--max_new_tokens", 8)
    if missing := [name for name in ("sacrebleu", "rouge_score") if not importlib.util.find_spec(name)]:
        return {"figures": {**figures(facts), "not compared, for want of": " and ".join(missing)}}
    python("scripts/compare.py", "--tuned", run, "--limit", 2, "--max_new_tokens", 8)
    return {"figures": figures(facts)}


STOP = """
import os, signal
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def resume(place: Place) -> dict[str, Any]:
    """Stopped by a signal at step 2 and resumed: the losses are those of a run that was not stopped."""
    callback = place.made("smoke") / "stop.py"
    callback.write_text(STOP)
    train(place, "whole", "lora")
    train(place, "resumed", "lora", "--callback", callback, code=75)
    train(place, "resumed", "lora", anew=False)
    losses = []
    for name in ("whole", "resumed"):
        rows = map(json.loads, (place.folder / f"smoke/{name}/metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    fault = f"the losses part by {apart:.1e}" if apart > same_curve.LOW_PRECISION else ""
    return {"figures": {"losses apart": apart, "steps": len(losses[1])}, "fault": fault}


def curve(name: str, cells: list[same_curve.Cell], place: Place) -> dict[str, Any]:
    folder = place.folder / "curve" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    same_curve.run_all(list(dict.fromkeys([*(cell.reference for cell in cells), *cells])), folder)
    found = {cell: same_curve.judged(cell, folder) for cell in cells}
    for cell, result in found.items():
        print(cell.name, result)
        if result["outcome"] == "broken":
            print((folder / f"{cell.name}.log").read_text()[-4000:])
    wrong = [f"{cell.method} {cell.precision} {result['outcome']}" for cell, result in found.items()
             if result["outcome"] != "equal"]  # fmt: skip
    said = {f"{cell.method} {cell.precision}": result.get("message") or same_curve.figures(result)
            for cell, result in found.items()}  # fmt: skip
    return {"figures": said, "fault": ", ".join(wrong)}


def plan(case: plan_gpu.Case, place: Place) -> dict[str, Any]:
    line, error = plan_gpu.row(case, plan_gpu.measure(case, place.made("plan")))
    return {"lines": [line], "figures": {"error": f"{error:+.1f} %"}}


def speed(case: plan_gpu.Case, place: Place) -> dict[str, Any]:
    folder = place.made("plan")
    plan_gpu.write_rows(case, folder)
    plays = {"Stepladder": train_gpu.ours(case, folder)}
    plays["`trl sft`"] = train_gpu.trl(case, folder, *([] if place.gpu else ["--use_cpu", "true"]))
    if place.gpu and importlib.util.find_spec("liger_kernel"):
        plays["`trl sft`, Liger"] = train_gpu.trl(case, folder, "--use_liger_kernel", "true")
    what, lines = f"{case.model.split('/')[-1]}, {case.method}, {case.micro} × {case.length}", []
    for name, play in plays.items():
        mfu = f"{play.mfu:.1%}" if play.mfu else ""
        lines.append(f"| {what} | {name} | {play.rate:,.0f} | {mfu} | {play.gib:.1f} | {play.loss:.3f} |")
    ratio = plays["Stepladder"].rate / plays["`trl sft`"].rate
    return {
        "lines": lines,
        "figures": {"× trl": round(ratio, 3), **{k: dataclasses.asdict(p) for k, p in plays.items()}},
    }


def steps(rehearse: bool) -> list[Step]:
    """In the order of worth: a first part of the plans and speeds before the larger models."""
    bnb = (*TRAINS, "bitsandbytes")
    recipes = {
        "full": ("sft",),
        "qlora": ("qlora",),
        "dora": ("lora", "--use_dora", "true"),
        "packing": ("sft", "--packing", "true"),
        "padding-free": ("sft", "--padding_free", "true", "--attn_implementation", "flash_attention_2"),
        "checkpointing": ("sft", "--gradient_checkpointing", "true", "--optim", "adamw_8bit"),
        "fp16": ("lora", "--bf16", "false", "--fp16", "true"),
        "liger": ("sft", "--use_liger_kernel", "true"),
        "prefix": ("lora", "--peft_type", "prefix"),
    }
    packages = {
        "qlora": bnb,
        "checkpointing": bnb,
        "padding-free": (*TRAINS, "flash_attn"),
        "liger": (*TRAINS, "liger_kernel"),
    }
    smokes = [
        Step(
            f"smoke {name}", 30, smoke(name, *words), packages.get(name, TRAINS), True, name in ("fp16", "padding-free")
        )
        for name, words in recipes.items()
    ]
    smokes[1:1] = [Step("smoke lora", 110, lora, beside=True), Step("smoke resume", 90, resume, beside=True)]
    cells = same_curve.of_gpu()
    first = [cell for cell in cells if (cell.method, cell.precision) == ("lora", "fp32")]
    parts = {
        "lora": first,
        "fp32": [cell for cell in cells if cell.precision == "fp32" and cell not in first],
        "bf16": [cell for cell in cells if cell.precision == "bf16"],
    }
    curves = [
        Step(f"curve {name}", 60 + 10 * len(part), partial(curve, name, part), TRAINS if name == "lora" else bnb)
        for name, part in parts.items()
    ]
    sizes = {plan_gpu.SMALL: 45, plan_gpu.ONE: 55, train_gpu.ONE: 50, plan_gpu.EIGHT: 100, plan_gpu.TINY: 20}

    def of(group: str, work: Any, cases: list[plan_gpu.Case], times: float) -> list[Step]:
        return [
            Step(f"{group} {case.name}", sizes[case.model] * times, partial(work, case),
                 bnb if case.method == "qlora" else TRAINS)
            for case in cases
        ]  # fmt: skip

    plans = of("plan", plan, plan_gpu.REHEARSAL[1:2] if rehearse else plan_gpu.CASES, 1)
    speeds = of("speed", speed, plan_gpu.REHEARSAL[1:2] if rehearse else train_gpu.CASES, 2.5)
    if rehearse:
        return [*smokes, curves[0], *plans, *speeds]
    return [*smokes, *curves, *plans[:3], *speeds[:1], *plans[3:6], *speeds[1:2], *plans[6:], *speeds[2:]]


def environment(place: Place) -> dict[str, Any]:
    """What this machine is; makes the tiny model on the way, which all smoke steps share."""
    import torch

    make_tiny(place.made("plan") / "tiny")
    found: dict[str, Any] = {
        "device": None, "torch": torch.__version__, "built for CUDA": torch.version.cuda,
        "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)),
        "host GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "free disk GiB": round(shutil.disk_usage(place.folder).free / 2**30),
    }  # fmt: skip
    if not place.gpu:
        found["device"] = "a rehearsal, on a CPU"
    elif torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory GiB"] = round(properties.total_memory / 2**30, 1)
        found["GPUs"] = torch.cuda.device_count()
        with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
            ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.check_output(ask, text=True, timeout=30).splitlines()[0]
    for name in SHOWN:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# ---- the call that starts them


def write(file: Path, text: str) -> None:
    """In one piece: who is killed in between leaves the file as it was."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


class Day:
    """One call: the steps, the record that it keeps, and the time that it has."""

    def __init__(self, place: Place, out: Path, until: float, facts: dict[str, Any], record: dict[str, Any]):
        self.place, self.out, self.until, self.record = place, out, until, record
        self.record["facts"] = facts
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False
        self.todo = steps(not place.gpu)
        for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sign, self.stop)

    def stop(self, sign: int, _: Any) -> None:
        """What runs is recorded as cut off already, and the next call repeats it."""
        self.stopping = True
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        raise SystemExit(128 + sign)

    def set(self, step: Step, outcome: str, why: str = "", **more: Any) -> None:
        """Record and print what a step came to; where there is no time for it, what an earlier call saw stands."""
        with self.lock:
            if not self.stopping and (outcome != NO_TIME or step.name not in self.record["steps"]):
                self.record["steps"][step.name] = {"outcome": outcome, "why": why, **more}
                self.save()
        if outcome != CUT or why:
            took = f"{more['seconds']:4.0f} s" if "seconds" in more else " " * 6
            print(f"{outcome:8} {took}  {step.name}{': ' * bool(why)}{why.splitlines()[0] if why else ''}", flush=True)

    def save(self) -> None:
        write(self.out / "record.json", json.dumps(self.record, indent=1))
        write(self.out / "page.md", page(self.record, [step.name for step in self.todo]))

    def pace(self) -> float:
        """How much longer than guessed the steps take here, by those that are done."""
        guessed = {step.name: step.seconds for step in self.todo}
        done = {k: v["seconds"] for k, v in self.record["steps"].items() if v["outcome"] == DONE and k in guessed}
        return min(max(sum(done.values()) / sum(guessed[name] for name in done), 0.3), 3.0) if done else 1.0

    def run(self) -> None:
        before = {name: entry["outcome"] for name, entry in self.record["steps"].items()}
        order = {None: 0, **{outcome: 1 + number for number, outcome in enumerate(AGAIN)}, SKIPPED: 0}
        left = [step for step in self.todo if before.get(step.name) != DONE]
        left.sort(key=lambda step: order[before.get(step.name)])
        self.save()
        for batch in batches(left):
            with ThreadPoolExecutor(max(1, min(4, len(os.sched_getaffinity(0)) // 4))) as pool:
                list(pool.map(self.play, batch))

    def play(self, step: Step) -> None:
        if missing := [name for name in step.packages if not importlib.util.find_spec(name)]:
            return self.set(step, SKIPPED, f"not installed: {', '.join(missing)}")
        if step.needs_gpu and not self.place.gpu:
            return self.set(step, SKIPPED, "needs a GPU")
        estimate, left = step.seconds * self.pace(), self.until - time.monotonic()
        if estimate > left or self.stopping:
            why = f"about {estimate:.0f} s, and {max(left, 0):.0f} s are left"
            return self.set(step, NO_TIME, why)
        self.set(step, CUT)  # until it is known to be done
        began, limit = time.monotonic(), min(left, max(SHORTEST, 4 * estimate))
        code, why = self.started(step, limit)
        took = {"seconds": round(time.monotonic() - began, 1), "commit": commit()}
        log, result = self.log(step), self.log(step).with_suffix(".json")
        if code == 0 and result.is_file():
            found = json.loads(result.read_text())
            fault = found.pop("fault", "")
            return self.set(step, FAILED if fault else DONE, fault, **took, **found)
        if code is None and limit >= left:
            return self.set(step, CUT, f"the time was over after {took['seconds']:.0f} s", **took)
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
        self.set(step, FAILED, why or f"exit code {code}", **took, output=last)

    def log(self, step: Step) -> Path:
        (self.out / "logs").mkdir(exist_ok=True)
        return self.out / "logs" / f"{step.name.replace(' ', '-')}.log"

    def started(self, step: Step, limit: float) -> tuple[int | None, str]:
        """Its exit code, or None and why it was ended."""
        self.log(step).with_suffix(".json").unlink(missing_ok=True)
        words = [sys.executable, str(Path(__file__).resolve()), "--step", step.name, "--folder", str(self.place.folder)]
        words += ["--result", str(self.log(step).with_suffix(".json"))] + ["--rehearse"] * (not self.place.gpu)
        with self.log(step).open("wb") as out:
            process = subprocess.Popen(
                words, cwd=ROOT, env=child_environment(self.place), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
            self.running.add(process)
            try:
                return process.wait(limit), ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None, f"it was ended after {limit:.0f} s"
            finally:
                self.running.discard(process)


def batches(left: list[Step]) -> Iterator[list[Step]]:
    """Neighbours that may run at the same time, and each of the others by itself."""
    batch: list[Step] = []
    for step in left:
        if batch and not (step.beside and batch[-1].beside):
            yield batch
            batch = []
        batch.append(step)
    if batch:
        yield batch


def child_environment(place: Place) -> dict[str, str]:
    env = {**same_curve.one_gpu(), MARK: str(place.folder), "PYTHONUNBUFFERED": "1", "TTY_COMPATIBLE": "0"}
    return env if place.gpu else {**env, "CUDA_VISIBLE_DEVICES": ""}


def end_leftovers(folder: Path) -> None:
    """A call that was killed left its children behind, which hold the GPU's memory."""
    mark = f"{MARK}={folder}".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)


def commit() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.check_output(ask, text=True, stderr=subprocess.DEVNULL, timeout=10).strip()
    return ""  # a copy without its history


def page(record: dict[str, Any], names: list[str]) -> str:
    facts, found = record["facts"], record["steps"]
    lines = ["# One GPU, one day", "", "Written by `make gpu-day`; all weights are random.", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items()) + ".", ""]
    for group, (title, head) in GROUPS.items():
        of = [name for name in names if name.split()[0] == group]
        done = [found[name] for name in of if found.get(name, {}).get("outcome") == DONE]
        lines += [f"## {title}", "", f"{len(done)} of {len(of)} steps are done.", ""]
        rows = [line for entry in done for line in entry.get("lines", [])]
        if head[0] == "step":
            rows = [_row(name, found[name]) for name in of if name in found]
        lines += [_line(head), _line(["---"] * len(head)), *rows, ""] if rows else []
    odd = {name: entry for name, entry in found.items() if entry["outcome"] != DONE}
    lines += ["## Not done", ""] if odd else []
    for name, entry in odd.items():
        lines.append(f"- {name}: {entry['outcome']}{': ' * bool(entry['why'])}{entry['why']}")
        if entry.get("output"):
            lines += ["", "  ```", *(f"  {line}" for line in entry["output"]), "  ```", ""]
    return "\n".join(lines) + "\n"


def _row(name: str, entry: dict[str, Any]) -> str:
    said = ", ".join(f"{key} {value}" for key, value in entry.get("figures", {}).items())
    return _line([name, f"{entry['seconds']:.0f}" if "seconds" in entry else "", entry["outcome"], said])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def refused(what: str, why: str = "", help: str = "") -> int:
    """The exit code of what cannot be begun."""
    more = "".join(f"\n  {label}: {text}" for label, text in (("why", why), ("help", help)) if text)
    print(f"✘ {what}{more}", file=sys.stderr)
    return 2


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=flags.above_0, default=15, help="the time of this call (15)")
    parser.add_argument("--folder", type=flags.path, default=ROOT / "runs/gpu-day", help="models and runs (60 GB)")
    parser.add_argument("--out", type=flags.path, help="for record.json, page.md and logs (--folder)")
    parser.add_argument("--fresh", action="store_true", help="begin a new record")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model (about 4 minutes)")
    parser.add_argument("--step", metavar="NAME", help="run this one only, unrecorded")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder, out = args.folder.resolve(), (args.out or args.folder).resolve()
    place = Place(folder, gpu=not args.rehearse)
    if args.step:
        os.environ |= child_environment(place)
        return alone(args.step, place, args.result)
    if not importlib.util.find_spec("torch"):
        return refused(f"{sys.executable} has no torch", help="start it with the Python that has")
    if (spec := importlib.util.find_spec("pyarrow")) and not _is_installed(spec.origin or ""):
        why = "dill, by which datasets names its caches, takes them for your own code and fails to pickle them"
        return refused(f"packages lie in {Path(spec.origin or '').parent.parent}", why,
                       "a folder whose path holds 'site-packages'")  # fmt: skip
    for needed in (folder, out):
        try:
            needed.mkdir(parents=True, exist_ok=True)
            (needed / ".lock").open("w").close()
        except OSError as error:
            return refused(f"{needed} cannot be written to: {error.strerror}", help="another --folder or --out")
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return refused(f"another call works in {folder}", help="wait for it, or another --folder")
        end_leftovers(folder)
        return day(place, out, began + 60 * args.minutes, args.fresh)


def _is_installed(origin: str) -> bool:
    """As dill sees it (`_is_builtin_module` in dill/_dill.py)."""
    return "site-packages" in origin or os.path.realpath(origin).startswith((sys.prefix, sys.base_prefix))


def alone(name: str, place: Place, result: Path | None) -> int:
    """One step in this process."""
    work = environment if name == "environment" else None
    for step in steps(not place.gpu):
        work = step.work if step.name == name else work
    if work is None:
        known = ", ".join(step.name for step in steps(not place.gpu))
        return refused(f"there is no step '{name}'", help=f"one of {known}")
    found = work(place)
    if result:
        write(result, json.dumps(found))
    else:
        print(json.dumps(found, indent=1))
    return 1 if found.get("fault") and not result else 0


def readable(record: dict[str, Any]) -> None:
    """Raise ValueError, LookupError, TypeError or AttributeError where the next call could not go on with a record."""
    for name, entry in record["steps"].items():
        if entry["outcome"] not in (DONE, SKIPPED, *AGAIN) or not isinstance(entry["why"], str):
            raise ValueError(f"the outcome of '{name}'")
        if entry["outcome"] == DONE and not 0 <= entry["seconds"] < float("inf"):
            raise ValueError(f"the seconds of '{name}'")
    page(record, list(record["steps"]))


def day(place: Place, out: Path, until: float, fresh: bool) -> int:
    words = [sys.executable, str(Path(__file__).resolve()), "--step", "environment", "--folder", str(place.folder)]
    words += ["--result", str(out / "environment.json")] + ["--rehearse"] * (not place.gpu)
    asked = subprocess.run(words, env=child_environment(place), capture_output=True, text=True)
    if asked.returncode:
        print(asked.stderr[-4000:], file=sys.stderr)
        return 1
    facts = json.loads((out / "environment.json").read_text())
    if not facts["device"]:
        build = f"torch {facts['torch']} " + ("finds none" if facts["built for CUDA"] else "is a build for CPUs")
        return refused("no CUDA GPU is here", build, "--rehearse runs the same steps on the CPU")
    record: dict[str, Any] = {"facts": facts, "steps": {}}
    if (file := out / "record.json").exists() and not fresh:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            known = [record["facts"].get(key) for key in ("device", "torch", "transformers", "trl")]
            readable(record)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            return refused(f"{file} is no record of a call: {error}", help="--fresh begins a new one")
        if known != [facts.get(key) for key in ("device", "torch", "transformers", "trl")]:
            why = f"it was begun on {', '.join(map(str, known))}"
            return refused(f"{file} is of another machine", why, "--fresh begins a new one; or another --out")
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if missing := [name for name in (*TRAINS, "bitsandbytes") if not importlib.util.find_spec(name)]:
        print(f"not installed, and what needs them is skipped: {', '.join(missing)}", flush=True)
    today = Day(place, out, until, facts, record)
    today.run()
    counts = [entry["outcome"] for entry in today.record["steps"].values()]
    print(", ".join(f"{counts.count(outcome)} {outcome}" for outcome in dict.fromkeys(counts)))
    if {NO_TIME, CUT} & {*counts}:
        print("the same command goes on with the rest")
    print(f"written: {out / 'page.md'} and record.json")
    return int(FAILED in counts)


if __name__ == "__main__":
    sys.exit(main())
