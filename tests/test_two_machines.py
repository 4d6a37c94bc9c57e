"""Two machines by hand, as the README and the recipes say it, in networks of their own (machines.py): one world, one
curve."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from machines import Machines, possible

import same_curve
from conftest import LAUNCHER_VARIABLES, ROOT, manifest, script
from stepladder.planning import choose
from stepladder.planning.memory import Memory
from stepladder.reporting import curves
from stepladder.training.launch.launcher import Strategy

pytestmark = [pytest.mark.proof, pytest.mark.alone]

STEPS = 4
(README,) = re.findall(r"`(accelerate launch [^`]*--num_machines[^`]*)`", (ROOT / "README.md").read_text())
(RECIPE,) = re.findall(
    r"(accelerate launch .*--num_machines.*)", (ROOT / "recipes/models/llama-3.1-70b/full.yaml").read_text()
)


def planned(strategy: str) -> str:
    """What plan.py says to type on a machine."""
    way = choose.Candidate(Strategy(strategy), 1, 1, False, Memory(*[0.0] * 7), 0.0, None, 0.0)
    return choose.command("lora", [], SimpleNamespace(nodes=2, ranks=2), way)[0]  # type: ignore[arg-type]


class Site:
    def __init__(self, machines: Machines, folder: Path, tiny: Path):
        self.machines, self.folder = machines, folder
        rows = same_curve.write_rows(folder / "rows.jsonl")
        for method in ("full", "lora", "qlora"):
            keys = same_curve.recipe_keys(method, tiny, rows, steps=STEPS)
            (folder / f"{method}.yaml").write_text(yaml.safe_dump(keys))
        everywhere = "".join(f"{address} {node}\n" for node, address in machines.address.items())
        for node in machines.address:
            (folder / f"{node}-plain").write_text(f"127.0.0.1 localhost\n{everywhere}")
            (folder / f"{node}-debian").write_text(f"127.0.0.1 localhost\n127.0.1.1 {node}\n{everywhere}")
        self.references: dict[str, Path] = {}

    def reference(self, method: str) -> Path:
        if method not in self.references:
            out = self.folder / f"{method}-alone"
            done = script("sft", "--recipe", self.folder / f"{method}.yaml", "--output_dir", out)
            assert done.code == 0, done
            self.references[method] = out
        return self.references[method]

    def run(
        self, line: str, method: str, hosts: str, count: int = 2, ranks: int = 2, **env: str
    ) -> tuple[Path, list[str], list[int]]:
        """A documented line on the first `count` of two machines, word for word but for its host and counts; `ranks` of
        both together."""
        out = self.folder / f"run-{len(list(self.folder.glob('run-*')))}"
        words = shlex.split(line.replace("--global_batch_size 16", "--global_batch_size 8"))
        head, recipe = words[: words.index("--recipe")], words[words.index("--recipe") + 2 :]
        given = dict(zip(head, [*head[1:], ""], strict=True))
        changed = {
            "--num_machines": "2",
            "--num_processes": str(ranks),
            "--main_process_ip": "node1",
            "--machine_rank": "{rank}",
        }
        assert changed.keys() <= given.keys()  # a line that lacks one is wrong on two machines
        for name, value in changed.items():
            head[head.index(name) + 1] = value
        keys = [*head[1:], "--recipe", str(self.folder / f"{method}.yaml"), *recipe, "--output_dir", str(out)]
        launcher = shlex.join([str(Path(sys.executable).with_name("accelerate")), *keys])
        out.mkdir()
        clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and "SOCKET_IFNAME" not in k}
        clean |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
        started = [
            subprocess.Popen(
                self.machines.inside(node, self.folder / f"{node}-{hosts}", launcher.replace("{rank}", str(rank))),
                cwd=ROOT, env=clean | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank, node in enumerate([*self.machines.address][:count])
        ]  # fmt: skip
        try:
            said = [machine.communicate(timeout=300)[0] for machine in started]
        finally:
            for machine in started:
                machine.kill()  # of no effect on one that has ended
        return out, said, [machine.returncode for machine in started]


@pytest.fixture(scope="module")
def site(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not possible() and "STEPLADDER_REQUIRE_SLURM" not in os.environ:
        pytest.skip("network namespaces need root and iproute2")
    with Machines(2) as machines:
        yield Site(machines, tmp_path_factory.mktemp("two"), tiny)


@pytest.mark.parametrize(
    ("line", "method", "hosts"),
    [
        (README, "qlora", "debian"),
        (RECIPE, "full", "plain"),
        (planned("ddp"), "lora", "debian"),
        (planned("fsdp"), "lora", "plain"),
    ],
    ids=["README", "recipe of 70b", "plan of ddp", "plan of fsdp"],
)
def test_the_documented_line(line: str, method: str, hosts: str, site: Site) -> None:
    """Guards two nodes by hand: DeepSpeed trained each by itself, and gloo listened at Debian's 127.0.1.1."""
    each = 2 if "hsdp" in line else 1
    run, said, codes = site.run(line, method, hosts, ranks=2 * each)
    assert codes == [0, 0], "\n".join(said)
    found = manifest(run)
    assert found["world_size"] == 2 * each
    assert [device.split(":")[0] for device in found["devices"]] == each * ["node1"] + each * ["node2"]
    assert each == 1 or "hsdp: 2 replicas of the model, each sharded over 2 ranks" in said[0], said[0]
    assert curves.difference(site.reference(method), run).within(), "\n".join(said)


def test_the_script_for_pbs_and_lsf(site: Site) -> None:
    """Guards docs/slurm.md's script, word for word but for recipe and counts: its hosts are those of the job's file,
    which names each once per core, and a node that fails ends the others and the job."""
    (text,) = re.findall(r"(#!/usr/bin/env bash\n#PBS .*?)```", (ROOT / "docs/slurm.md").read_text(), re.DOTALL)
    run = site.folder / "pbs"
    keys = f"--recipe {site.folder}/lora.yaml --output_dir {run} --global_batch_size 8"
    for before, after in (("zero3", "ddp"), ("4 * $", "$"), ("--recipe qlora", keys)):
        assert text.count(before) == 1
        text = text.replace(before, after)
    tools = site.folder / "tools"
    tools.mkdir()
    lines = []
    for node in site.machines.address:
        inside = site.machines.inside(node, site.folder / f"{node}-plain", 'bash -c "$1"')
        lines.append(f'{node}) exec {shlex.join(inside)} sh "$2" ;;')
    (tools / "ssh").write_text("#!/bin/sh\ncase $1 in\n" + "\n".join(lines) + "\nesac\n")
    (tools / "ssh").chmod(0o755)
    (site.folder / "nodefile").write_text("node1\nnode1\nnode2\nnode2\n")
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and "SOCKET_IFNAME" not in k}
    clean |= {"PBS_O_WORKDIR": str(ROOT), "PBS_NODEFILE": str(site.folder / "nodefile"), "HF_HUB_OFFLINE": "1"}
    clean |= {"PATH": f"{tools}:{Path(sys.executable).parent}:{clean['PATH']}", "OMP_WAIT_POLICY": "PASSIVE"}

    def submit(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script], cwd="/", env=clean, capture_output=True, text=True, timeout=300,
            start_new_session=True,  # as a job is a process group of its own
        )  # fmt: skip

    done = submit(text)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [device.split(":")[0] for device in manifest(run)["devices"]] == ["node1", "node2"]
    assert curves.difference(site.reference("lora"), run).within(), done.stdout
    failed = submit(text.replace(r"exec \"\${inside[@]}\"", "sleep $((5 * $rank)) && exit $((4 - 4 * $rank)) &&"))
    assert failed.returncode == -signal.SIGTERM, failed.stdout + failed.stderr


def test_a_launch_that_falls_apart(site: Site) -> None:
    """Guards the kind: any launcher that starts fewer ranks than it was asked for, as DeepSpeed's pdsh without a
    hostfile does on each machine by itself."""
    line = RECIPE.replace("--num_machines", "--deepspeed_multinode_launcher pdsh --num_machines")
    line += " --use_cpu true"  # that launcher names a GPU, whether one is there or not
    run, (said,), (code,) = site.run(line, "full", "plain", count=1)
    (ROOT / ".deepspeed_env").unlink(missing_ok=True)  # the launcher's
    assert code != 0 and "2 ranks were asked for and 1 joined" in said, said
    assert not re.search(r'sft.py", line', said)
    assert not (run / "run.json").exists()


def test_machines_that_do_not_find_each_other(site: Site) -> None:
    """Guards the words: the libraries' own say neither which host nor which interface."""
    _, said, codes = site.run(planned("ddp"), "lora", "plain", GLOO_SOCKET_IFNAME="ib7")
    assert 0 not in codes
    for number, words in enumerate(said):
        assert "ranks did not find each other" in words and f"node{number + 1}, rank {number}" in words, words
        assert "interface: ib7" in words and not re.search(r'sft.py", line', words), words
