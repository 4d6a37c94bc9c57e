"""The templates in slurm/ on a real Slurm: two nodes in networks of their own (slurm_cluster.py).

All jobs are given to Slurm at once and share the machine; each test waits for its own.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from machines import FAST

import same_curve
from conftest import ROOT, script
from hub_server import Hub
from slurm_cluster import Cluster, missing
from stepladder.reporting import curves
from tiny import make_tiny

pytestmark = [pytest.mark.proof, pytest.mark.alone]

STEPS = 8
SFT = "slurm/sft.sbatch"
# Training runs on CPU: this nvidia-smi answers for the null devices that Slurm hands out.
NVIDIA_SMI = """#!/bin/sh
for gpu in $(echo "$CUDA_VISIBLE_DEVICES" | tr , ' '); do echo "$gpu, ${FAKE_GPU_MIB:-10}"; done
"""
# As `rocm-smi --showmeminfo vram --json` answers (marimo-team/marimo#9237): bytes, as words.
ROCM_SMI = """#!/bin/sh
echo '{"card0": {"VRAM Total Used Memory (B)": "10960896"}, "card1": {"VRAM Total Used Memory (B)": "9000000000"}}'
"""
# What a centre has: a container's runtime and modules, which note how they were called, and srun with Pyxis' option,
# whose image alone has a Python with our packages.
CENTRE = {
    "singularity": """echo "singularity $*" >>"$NOTED"
        while [[ $1 != *.sif ]]; do shift; done
        shift; exec "$@" """,
    "module": 'echo "module $*" >>"$NOTED"',
    "srun": """words=()
        for word; do
            if [[ $word == --container-image=* ]]; then PATH=$IMAGE_PATH && cd /; else words+=("$word"); fi
        done
        exec /usr/bin/srun "${words[@]}" """,
}
HOSTILE = """a $(touch pwned) `touch pwned`; touch pwned "b' & % é"""


def environment(process: int) -> dict[str, str]:
    words = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


class Site:
    """The cluster with a recipe for it, and the jobs that were given to it."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        tools = folder / "bin"
        tools.mkdir()
        scripts = {"nvidia-smi": NVIDIA_SMI, **{name: f"#!/bin/bash\n{lines}\n" for name, lines in CENTRE.items()}}
        for name, content in scripts.items():
            (tools / name).write_text(content)
            (tools / name).chmod(0o755)
        (folder / "image.sif").touch()
        self.amd = folder / "amd"
        self.amd.mkdir()
        (self.amd / "rocm-smi").write_text(ROCM_SMI)
        (self.amd / "rocm-smi").chmod(0o755)
        self.amd_path = f"{self.amd}:{cluster.env['PATH']}"  # without the other's tool
        cluster.env |= {"PATH": f"{tools}:{cluster.env['PATH']}", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        cluster.env.pop("OMP_NUM_THREADS", None)  # the templates' own is tested
        keys = same_curve.recipe_keys("lora", make_tiny(folder / "tiny"), same_curve.write_rows(folder / "rows.jsonl"))
        keys |= {"max_steps": STEPS, "per_device_train_batch_size": 1, "eval_strategy": "no", "use_cpu": True}
        self.slow = ("--callback", folder / "slow.py")
        self.recipe, self.recipe_of_hub = folder / "tiny.yaml", folder / "hub.yaml"
        self.recipe.write_text(yaml.safe_dump(keys))
        self.recipe_of_hub.write_text(yaml.safe_dump(keys | {"model_name_or_path": "org/tiny"}))

        # A step takes long enough to be hit in the middle of the run.
        (folder / "slow.py").write_text(
            "import time\nfrom transformers import TrainerCallback\n\n\n"
            "class Callback(TrainerCallback):\n    def on_step_end(self, *_, **__):\n        time.sleep(0.7)\n"
        )

    def sbatch(self, name: str, *words: Any, recipe_keys: tuple[Any, ...] = (), **variables: Any) -> str:
        log = f"--output={self.folder}/{name.replace('%', '%%')}.log"
        return self.cluster.sbatch("--time=30", log, *words, SFT, "--recipe", self.recipe,
                                   "--output_dir", self.folder / name, *recipe_keys, **variables)  # fmt: skip

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def run_json(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "run.json").read_text()))

    def until_it_trains(self, name: str, steps: int = 1) -> None:
        metrics = self.folder / name / "metrics.jsonl"
        end = time.monotonic() + 240
        while not metrics.is_file() or metrics.read_text().count('"loss"') < steps:
            assert time.monotonic() < end, self.log(name)
            time.sleep(0.1)

    def ended(self, job: str, name: str, state: str) -> dict[str, str]:
        found = self.cluster.wait(job)
        assert found["JobState"] == state, self.log(name)
        return found

    def rank(self, job: str, rank: int) -> int:
        """The process of a rank; the nodes share this machine's process table."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
                words = (process / "cmdline").read_text()
            except OSError:
                continue
            if {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()} <= {
                *environment
            } and "stepladder.sft" in words:
                return int(process.name)
        raise AssertionError(f"no rank {rank} of job {job}")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if (absent := missing()) and "STEPLADDER_REQUIRE_SLURM" not in os.environ:
        pytest.skip(absent)
    # Not pytest's folder, which other users may not enter.
    base = Path(tempfile.mkdtemp(prefix="slurm-"))
    base.chmod(0o755)
    (base / "work").mkdir()
    with Cluster(base / "cluster", cpus=8) as cluster:
        yield Site(cluster, base / "work")
    shutil.rmtree(base)


SAVING = ("--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1)
LONG = ("--max_steps", 100_000, *SAVING[:3], 100_000)  # until somebody ends it


@pytest.fixture(scope="module")
def jobs(site: Site) -> dict[str, str]:
    """All that only has to run to its end, queued at once."""
    return {
        "zero3": site.sbatch("zero3", "--nodes=2", "--gres=gpu:h100:2", "--cpus-per-gpu=2",
                              recipe_keys=("--strategy", "zero3")),
        HOSTILE: site.sbatch(HOSTILE, "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1",
                             recipe_keys=("--strategy=hsdp",)),
        # Of the batch host's PATH no folder has a Python with our packages.
        "pyxis": site.sbatch("pyxis", "--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1",
                             "--export=PATH,IMAGE_PATH,STEPLADDER_TASKS,STEPLADDER_SRUN,HF_HUB_OFFLINE",
                             recipe_keys=("--strategy", "zero2"), PATH=f"{site.folder}/bin:/usr/sbin:/usr/bin:/bin",
                             IMAGE_PATH=site.cluster.env["PATH"], STEPLADDER_TASKS="rank",
                             STEPLADDER_SRUN="'--container-image=/images/a b.sqsh' --cpu-bind=none"),
        "sick": site.sbatch("sick", "--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1",
                            "--export=ALL,FAKE_GPU_MIB=5000"),
        "sick AMD": site.sbatch("sick AMD", "--gpus-per-node=2", "--cpus-per-gpu=2",
                                f"--export=ALL,PATH={site.amd_path}"),
        # GPUs that Slurm does not count: nvidia-smi shows none of as many as the site says
        "uncounted": site.sbatch("uncounted", "--export=ALL,STEPLADDER_GPUS_PER_NODE=2"),
        "one core": site.sbatch("one core", "--gpus-per-node=2"),
        "split": site.sbatch("split", "--ntasks-per-node=2", "--gpus-per-task=1"),
        # Slow, so that it leaves the processors to the others until its time is up.
        "limit": site.sbatch("limit", "--time=2", "--signal=B:USR1@60", "--gpus-per-node=2", "--cpus-per-gpu=1",
                             recipe_keys=(*LONG, *site.slow)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def reference(site: Site) -> Path:
    run = site.folder / "reference"
    words = ["--recipe", str(site.recipe), "--output_dir", str(run), "--per_device_train_batch_size", "2"]
    subprocess.run([sys.executable, "scripts/sft.py", *words], cwd=ROOT, check=True, capture_output=True)
    return run


def test_the_time_limit_is_a_preemption_and_a_stop_file_ends_the_chain(site: Site, jobs: dict[str, str]) -> None:
    """Guards `--signal=B:USR1@…`: Slurm's own signal, in time, saves; the stop file keeps the job from coming back."""
    # First of all: each time that its limit comes before the stop file, the job starts once more.
    site.until_it_trains("limit")
    (site.folder / "limit/stop").touch()
    site.ended(jobs["limit"], "limit", "FAILED")
    assert "stop ends the chain" in site.log("limit")
    assert site.run_json("limit")["status"] == "preempted"
    assert list((site.folder / "limit").glob("checkpoint-*/COMPLETE.json"))


def test_a_preempted_job_queues_itself_and_the_curve_goes_on(site: Site, jobs: dict[str, str], reference: Path) -> None:
    """Guards preemption on two nodes: the batch shell's USR1 reaches the ranks on both and kills no launcher, the
    job comes back by itself, and neither its curve nor its metrics show it. Guards its ranks' cores, too."""
    job = site.sbatch("ddp", "--nodes=2", "--gpus-per-node=h100:2", "--cpus-per-gpu=2", "--mem-per-gpu=1500",
                      recipe_keys=("--strategy", "ddp", *SAVING, *site.slow))  # fmt: skip
    site.until_it_trains("ddp")
    assert site.cluster.job(job)["TRES"].startswith("cpu=8,mem=6000M,node=2,"), "by hand: of 4 GPUs on two nodes"
    of_rank = environment(site.rank(job, 0))
    assert (of_rank["SLURM_CPUS_ON_NODE"], of_rank["OMP_NUM_THREADS"], of_rank["RAYON_NUM_THREADS"]) == ("4", "2", "4")
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert site.ended(job, "ddp", "COMPLETED")["Restarts"] == "1", site.log("ddp")
    manifest = site.run_json("ddp")
    assert manifest["slurm"]["restart_count"] == 1
    assert manifest["slurm"]["job_id"] == job
    assert {device.split(":")[0] for device in manifest["devices"]} == {"node1", "node2"}
    found = curves.difference(reference, site.folder / "ddp")
    assert found.steps == STEPS and found.within(), found
    for node in site.cluster.nodes:
        assert "start" in site.log("ddp") and (site.folder / "ddp" / f"slurm-{job}-{node}.out").stat().st_size


NAMES = {"zero3": "zero3, typed gres", HOSTILE: "hsdp, CPU tasks, hostile path", "pyxis": "zero2, srun's container"}


@pytest.mark.parametrize("name", NAMES, ids=[*NAMES.values()])
def test_two_nodes_give_the_curve_of_one_process(site: Site, jobs: dict[str, str], reference: Path, name: str) -> None:
    """Guards the rendezvous across nodes, however ranks are asked for, and quoting from sbatch to the ranks. Guards a
    container that srun starts, with what srun is to be given, and ranks that it starts: ZeRO without a launcher."""
    site.ended(jobs[name], name, "COMPLETED")
    found = curves.difference(reference, site.folder / name)
    assert found.steps == STEPS and found.within(), found
    facts = site.run_json(name)
    assert (facts["world_size"], facts["strategy"]) == (4, NAMES[name].split(",")[0])
    lines = (site.folder / name / "metrics.jsonl").read_text().splitlines()
    (load,) = {
        frozenset(key for key in json.loads(line) if key.startswith("node_")) for line in lines if '"loss"' in line
    }
    assert load == {f"node_{node}/{what}_percent" for node in (0, 1) for what in ("cpu", "memory")}
    assert not list(ROOT.glob("pwned")) and not list(site.folder.rglob("pwned"))


def test_a_centres_way_to_start_ranks_gives_the_same_curve(site: Site, reference: Path) -> None:
    """Guards STEPLADDER_TASKS=rank, with FSDP and a preemption; STEPLADDER_HEAD, without which the nodes meet on the
    network that their names are of, or not at all; modules and a container; and a rank that has saved, whose exit code
    would have srun kill the one that still writes."""
    noted = site.folder / "noted"
    job = site.sbatch("centre", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", NOTED=noted,
                      recipe_keys=("--strategy", "fsdp", *SAVING, *site.slow), STEPLADDER_TASKS="rank",
                      STEPLADDER_HEAD="%i", STEPLADDER_MODULES="purge gcc/13",
                      STEPLADDER_CONTAINER=site.folder / "image.sif")  # fmt: skip
    site.until_it_trains("centre")
    of_rank = environment(site.rank(job, 3))
    assert (of_rank["SLURM_NODEID"], of_rank["LOCAL_RANK"], of_rank["LOCAL_WORLD_SIZE"]) == ("1", "1", "2")
    assert "TORCHELASTIC_RUN_ID" not in of_rank, "torchrun has started it"
    if site.cluster.machines:
        assert (of_rank["MASTER_ADDR"], of_rank["GLOO_SOCKET_IFNAME"]) == ("node1i", FAST)
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert site.ended(job, "centre", "COMPLETED")["Restarts"] == "1", site.log("centre")
    found = curves.difference(reference, site.folder / "centre")
    assert found.steps == STEPS and found.within(), found
    lines = noted.read_text().splitlines()
    assert lines[:2] == ["module purge", "module load gcc/13"]
    words = [line for line in lines if line.startswith("singularity exec ")]
    for command in ("-m stepladder.cluster.job folder", "-m stepladder.cluster.health", "-m stepladder.sft",
                    "-m stepladder.cluster.job after"):  # fmt: skip
        assert any(f" {ROOT} python {command}" in line for line in words), command
    assert not list(Path("/tmp").glob(f"stepladder-{job}.*"))


def test_the_bench_measures_each_strategy(site: Site) -> None:
    """Guards bench.sbatch: a strategy that fails keeps the others from nothing, and each has its line. Its base is
    an id of the hub, which the nodes do not reach: from a stage, copied to the node's own disk before the ranks."""
    stage, own = site.folder / "stage", site.folder / "node_disk"
    with Hub() as hub:
        hub.repositories["model org/tiny"] = site.folder / "tiny"
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(site.folder / "home")}
        filled = script("stage", "--recipe", site.recipe_of_hub, "--to", stage, **env)
        assert filled.code == 0, filled
    job = site.cluster.sbatch(
        "--time=30", f"--output={site.folder}/bench.log", "--gpus-per-node=2", "--cpus-per-gpu=2",
        f"--export=ALL,STRATEGIES=ddp none,STEPLADDER_STAGE={stage},STEPLADDER_STAGE_LOCAL=1,SLURM_TMPDIR={own}",
        "slurm/bench.sbatch", "--recipe", site.recipe_of_hub,
    )  # fmt: skip
    site.ended(job, "bench", "COMPLETED")
    assert (own / "stage/stage.json").read_text() == (stage / "stage.json").read_text()
    assert re.search(r"^ddp +[\d,]+ tokens/s +[\d.]+ GiB", site.log("bench"), re.MULTILINE), site.log("bench")
    assert "no accelerate_configs/none.yaml" in site.log("bench")
    shutil.rmtree(ROOT / f"runs/bench-{job}")


def test_a_sick_node_is_named_before_any_rank_starts(site: Site, jobs: dict[str, str]) -> None:
    """Guards the health check: memory in use by others ends the job at once, with the node's name, by AMD's tool where
    there is no other, and on GPUs that Slurm does not count. And guards a job whose cores or memory are few: it says
    so, with the option that gives more."""
    site.ended(jobs["sick"], "sick", "FAILED")
    assert "note: 2 core(s) a node for 2 rank(s)" in site.log("sick") and "--cpus-per-gpu=8" in site.log("sick")
    assert "note: 2000 MiB of memory a node for 2 GPU(s)" in site.log("sick") and "--mem-per-gpu" in site.log("sick")
    assert re.search(r"node node[12] cannot train: 5,000 MiB of GPU", site.log("sick")), site.log("sick")
    assert not (site.folder / "sick" / "run.json").exists()
    for name, said in (
        ("sick AMD", "8,583 MiB of GPU card1 are in use by others"),
        ("uncounted", "0 of 2 GPUs answer"),
    ):
        site.ended(jobs[name], name, "FAILED")
        assert f"cannot train: {said}" in site.log(name) and "Traceback" not in site.log(name), site.log(name)


def test_what_cannot_train_is_refused_before_any_rank_starts(site: Site, jobs: dict[str, str]) -> None:
    """Guards GPUs against a core for all of them (Slurm's own default), and ranks against the one GPU that a step of
    one task has under --gpus-per-task: both were a job that crawls or dies after it has waited."""
    for name, said in (
        ("one core", "1 core(s) a node for 2 GPUs"),
        ("split", "1 GPU(s) for its ranks, and the job starts 2"),
    ):
        assert site.ended(jobs[name], name, "FAILED")["ExitCode"] == ("2:0" if name == "one core" else "1:0")
        assert said in site.log(name) and "Traceback" not in site.log(name), site.log(name)
        assert not (site.folder / name / "run.json").exists()


def test_a_rank_that_crashes_fails_the_job_for_good(site: Site) -> None:
    """Guards against a job that comes back after a fault, and one whose other node waits for half an hour.
    And guards the ranks' interfaces: all of the network to the other node."""
    job = site.sbatch("crash", "--nodes=2", recipe_keys=LONG)
    site.until_it_trains("crash")
    of_rank = environment(site.rank(job, 1))
    assert (of_rank["NCCL_SOCKET_IFNAME"], of_rank["GLOO_SOCKET_IFNAME"]) == ("=fabric0,fabric1", "fabric0")
    os.kill(site.rank(job, 1), signal.SIGKILL)
    found = site.ended(job, "crash", "FAILED")
    assert found["Restarts"] == "0"
    assert "--- node2:" in site.log("crash") and "exitcode  : -9" in site.log("crash")


def test_scancel_saves_and_does_not_come_back(site: Site) -> None:
    """Guards work that is cancelled: a checkpoint stands, and the job is not queued again against its owner's will."""
    job = site.sbatch("cancelled", "--gpus-per-node=2", "--cpus-per-gpu=2", recipe_keys=LONG)
    site.until_it_trains("cancelled")
    site.cluster.run("scancel", job)
    site.cluster.wait(job, ("CANCELLED",))
    end = time.monotonic() + 60
    while site.run_json("cancelled")["status"] == "running":
        assert time.monotonic() < end, site.log("cancelled")
        time.sleep(0.5)
    assert site.run_json("cancelled")["status"] == "preempted"
    assert site.cluster.job(job)["Restarts"] == "0"


def test_a_node_that_goes_down_brings_the_job_back(site: Site, reference: Path) -> None:
    """Guards NODE_FAIL: Slurm queues the job again, and it goes on from its checkpoint when the node is back."""
    job = site.sbatch("down", "--nodes=2", recipe_keys=(*SAVING, *site.slow))
    site.until_it_trains("down", steps=3)
    site.cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    site.cluster.wait(job, ("PENDING",))
    # It may be back by itself, since its slurmd answers.
    site.cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME", check=False)
    assert site.ended(job, "down", "COMPLETED")["Restarts"] == "1", site.log("down")
    found = curves.difference(reference, site.folder / "down")
    assert found.steps == STEPS and found.within(), found


def test_a_sweep_is_an_array_with_a_report(site: Site, tmp_path: Path) -> None:
    """Guards `submit.py --sweep`: an element a combination, each in its folder, and the page over all at the end.
    The rungs of a halving wait for one another, the better run goes on in an element of another array, and the page
    names the best. And guards cores and memory, which follow the GPUs: 8 cores, and a quarter of the 9 GiB of a node
    of 4 GPUs."""
    sweep = site.folder / "ranks.yaml"
    grid = {"recipe": str(site.recipe), "output_dir": str(site.folder / "sweep"), "grid": {"lora_r": [4, 8]}}
    grid |= {"halving": {"start": 4}, "test_split_size": 4, "eval_strategy": "epoch"}
    sweep.write_text(yaml.safe_dump(grid | {"per_device_train_batch_size": 8}))
    said = site.cluster.run(sys.executable, "scripts/submit.py", "--sweep", sweep, "--time", "30", "--gpus", "1")
    report = said.partition("report  job ")[2].split(",")[0]
    site.cluster.wait(report)
    element = said.partition("✔ job ")[2].split(":")[0]
    assert site.cluster.job(f"{element}_0")["TRES"].startswith("cpu=2,mem=2G,node=1,"), "2 of a node's 8 cores"
    both = [site.run_json(f"sweep/lora_r={rank}") for rank in (4, 8)]
    assert both[1]["parameters"]["trainable"] == 2 * both[0]["parameters"]["trainable"]
    assert [site.cluster.job(f"{element}_{number}")["JobState"] for number in (0, 1)] == ["COMPLETED", "COMPLETED"]
    assert sorted((run["status"], run["totals"]["steps"]) for run in both) == [("finished", STEPS), ("preempted", 4)]
    kept = json.loads((site.folder / "sweep/ranks-rung-1.json").read_text())
    (best,) = (f"lora_r={rank}" for rank, run in zip((4, 8), both, strict=True) if run["status"] == "finished")
    assert kept["kept"] == [best] and kept["held_out_loss"][best] == min(kept["held_out_loss"].values())
    assert f"{best} is the only run that has finished with" in (site.folder / "sweep/report.html").read_text(), said


def test_the_pipeline_runs_each_step_after_the_other(site: Site) -> None:
    """Guards train → merge → compare on the rows that were held out, and that a failing step cancels what waits."""

    def pipeline(name: str, *words: str) -> dict[str, str]:
        said = site.cluster.run(
            "bash", "slurm/pipeline.sh", "--time=30", f"--output={site.folder}/{name}.log", "--cpus-per-task=2", "--",
            "--recipe", site.recipe, "--output_dir", site.folder / name, "--per_device_train_batch_size", 4,
            "--test_split_size", 4, *words,
        )  # fmt: skip
        return {step.split()[0]: step.split()[1] for step in said.split(";")[0].split(" → ")}

    bad, good = pipeline("bad", "--learning_rate", "1e30"), pipeline("good")
    site.ended(bad["train"], "bad", "FAILED")
    for step in ("merge", "compare"):
        assert site.cluster.wait(bad[step])["JobState"] == "CANCELLED"
    site.ended(good["train"], "good", "COMPLETED")
    for step in ("merge", "compare"):
        log = ROOT / f"runs/slurm-{good[step]}.out"
        assert site.cluster.wait(good[step])["JobState"] == "COMPLETED", log.read_text()
        log.unlink()
    assert (site.folder / "good/merged/model.safetensors").is_file()
    facts = json.loads((site.folder / "good/compared/compare.json").read_text())
    assert (facts["held_out_rows"], facts["left_out_rows"]) == (4, 0)


def test_a_user_without_rights_can_submit(site: Site) -> None:
    """Guards clusters as they are: the job's owner is not root, and its files are its own."""
    user = pwd.getpwnam("nobody")
    as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "sh", "-c"]
    version = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"

    def runs(python: str) -> bool:  # through sh: setpriv itself still has root's rights
        return not subprocess.run([*as_user, f"'{python}' -c '{version}'"], cwd=ROOT, capture_output=True).returncode

    found = [python for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3") if runs(python)]
    if not found:
        pytest.skip("no Python of this version here that another user may run")
    environment = site.folder / "venv"  # this one's packages, by an interpreter that the user may run
    subprocess.run([found[0], "-m", "venv", "--without-pip", environment], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "these.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    (environment / "bin/accelerate").write_text(
        f"#!{environment}/bin/python\nfrom accelerate.commands.accelerate_cli import main\n\nmain()\n"
    )
    (environment / "bin/accelerate").chmod(0o755)
    home = site.folder / "nobody"
    home.mkdir()
    os.chown(home, user.pw_uid, user.pw_gid)
    words = ["sbatch", "--parsable", "--time=30", f"--output={home}/log", SFT, "--recipe", site.recipe,
             "--output_dir", home / "run", "--per_device_train_batch_size", 8]  # fmt: skip
    job = site.cluster.run(*as_user, f"STEPLADDER_VENV={environment} HOME={home} {shlex.join(map(str, words))}")
    assert site.cluster.wait(job.strip())["JobState"] == "COMPLETED", (home / "log").read_text()
    assert (home / "run/run.json").stat().st_uid == user.pw_uid


def test_submit_says_what_slurm_refuses_before_it_queues(site: Site) -> None:
    """Guards `--test-only`: what can never run is refused on the login node, in Slurm's words."""

    def refused(*words: Any) -> str:
        command = [sys.executable, "scripts/submit.py", "--recipe", site.recipe, "--output_dir", site.folder / "never"]
        done = subprocess.run([*map(str, [*command, *words])], cwd=ROOT, env=site.cluster.env, text=True,
                              capture_output=True)  # fmt: skip
        assert done.returncode == 2 and "Traceback" not in done.stderr, done
        return done.stderr

    assert "invalid partition specified: nix" in refused("--partition", "nix")
    assert "Requested node configuration is not available" in refused("--gpus", "5")
    assert "no accelerate_configs/zero9.yaml" in refused("--strategy", "zero9")
    assert "unknown key 'learing_rate'" in refused("--learing_rate", "1")
    assert "is no name" in refused("--partition", "main --uid=0")
    assert not (site.folder / "never").exists()
