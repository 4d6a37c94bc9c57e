"""A Slurm cluster on this machine, for the tests: real daemons, a node each in a network namespace of its own.

    with Cluster(Path("/tmp/cluster"), nodes=2) as cluster:
        job = cluster.sbatch("--nodes=2", "slurm/sft.sbatch", "--recipe", "lora")
        print(cluster.wait(job))

Everything lies under one folder and ends with the block: munged with its own key and socket, slurmctld,
and slurmd nodes joined by a bridge, with their own host names, so that a rendezvous crosses a network.
Where namespaces are not permitted the nodes share this host and differ by their ports. Run as root.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machines import Machines, possible

from tiny import ROOT

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
# Slurm's own defaults wait for people; `cred_expire` is how long a requeued job is held (2 minutes).
CONF = """
ClusterName=stepladder
SlurmctldHost={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ctld_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=60
MessageTimeout=30
InactiveLimit=0
MinJobAge=86400
KillWait=30
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 State=UP
"""


def missing() -> str:
    """What keeps a cluster from running here, with how to get it; empty where nothing does."""
    if absent := [name for name in NEEDED if not shutil.which(name) and not Path("/usr/sbin", name).exists()]:
        return f"no {', '.join(absent)} here: {INSTALL}"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root here: sudo make test"


class Cluster:
    """A context in which Slurm's commands work by `env`; its nodes are named node1, node2, …"""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4, gpus: int = 4):
        self.folder, self.cpus, self.gpus = folder, cpus, gpus
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self.daemons: list[subprocess.Popen] = []
        self.machines = Machines(nodes, second=True) if possible() else None
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"),
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}  # fmt: skip

    def __enter__(self) -> Cluster:
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)  # a user's commands read slurm.conf and reach munged's socket
        try:
            self._network()
            self._configure()
            self._munge()
            self._start("slurmctld", "-D", "-c", "-f", self.env["SLURM_CONF"])
            for number, node in enumerate(self.nodes):
                self._start_node(number, node)
            self._until(lambda: self.states().count("idle") == len(self.nodes), "the nodes are not up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        for job in self.run("squeue", "--noheader", "--format=%A", check=False).split():
            self.run("scancel", job, check=False)
        with contextlib.suppress(AssertionError):
            self._until(lambda: not self.run("squeue", "--noheader", check=False).strip(), "jobs are left", 20)
        for daemon in reversed(self.daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in reversed(self.daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
        if (pid := self.folder / "munged.pid").exists():
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGTERM)
        if self.machines:
            self.machines.__exit__()

    def run(self, *words: Any, check: bool = True, **options: Any) -> str:
        """A command on the login node; what it printed, both streams."""
        done = subprocess.run(list(map(str, words)), env=self.env, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, **options)  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def sbatch(self, *words: Any, **variables: Any) -> str:
        """The number of a job, which is given with these variables."""
        mine = [f"{name}={value}" for name, value in variables.items()]
        return self.run("env", *mine, "sbatch", "--parsable", *words).split(";")[0].strip()

    def job(self, job: str) -> dict[str, str]:
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, job: str, states: tuple[str, ...] = (), patience: float = 300) -> dict[str, str]:
        """Until a job has ended, or is in one of some states: what scontrol shows of it."""
        states = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._until(lambda: self.job(job)["JobState"] in states, f"job {job} is not {states}", patience)
        return self.job(job)

    def states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()

    def _until(self, there: Any, otherwise: str, patience: float = 60) -> None:
        end = time.monotonic() + patience
        while not there():
            assert time.monotonic() < end, f"{otherwise}\n{self.run('squeue', check=False)}{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"{file.name}: " + "\n".join(file.read_text(errors="replace").splitlines()[-15:])
                         for file in sorted(self.folder.glob("*.log")))  # fmt: skip

    def _start(self, *words: Any) -> None:
        out = (self.folder / "daemons.log").open("a")
        self.daemons.append(subprocess.Popen(list(map(str, words)), env=self.env, stdout=out, stderr=out,
                                             start_new_session=True))  # fmt: skip

    def _network(self) -> None:
        if not self.machines:
            self.address, self.control = dict.fromkeys(self.nodes, "127.0.0.1"), f"{socket.gethostname()}(127.0.0.1)"
            return
        self.machines.__enter__()
        self.address, self.control = self.machines.address, f"{socket.gethostname()}({self.machines.subnet}.1)"

    def _configure(self) -> None:
        for number in range(self.gpus):  # as many "GPUs" as jobs may ask for: null devices; training runs on CPU
            device = self.folder / f"gpu{number}"
            subprocess.run(["mknod", str(device), "c", "1", "3"], check=True)
        files = f"{self.folder}/gpu[0-{self.gpus - 1}]"
        (self.folder / "gres.conf").write_text(f"Name=gpu Type=h100 File={files}\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        ports = free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node if self.machines else socket.gethostname()} "
            f"NodeAddr={self.address[node]} Port={ports[number + 1]} CPUs={self.cpus} CoresPerSocket={self.cpus} "
            f"RealMemory=10000 Gres=gpu:h100:{self.gpus} State=UNKNOWN"
            for number, node in enumerate(self.nodes)
        )
        (self.folder / "state").mkdir()
        conf = CONF.format(folder=self.folder, control=self.control, ctld_port=ports[0], nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        # A node's second interface has its name and an i, as at JSC.
        fast = self.machines.fast_address if self.machines else self.address
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} {node}\n{fast[node]} {node}i\n" for node, address in self.address.items())
        )

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        subprocess.run(["munged", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
                        f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
                        f"--seed-file={self.folder}/munged.seed", "--force"], check=True, env=self.env)  # fmt: skip

    def _start_node(self, number: int, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir()
        slurmd = f"slurmd -D -N {node} -f {self.env['SLURM_CONF']}"
        self._start(*(self.machines.inside(node, self.folder / "hosts", slurmd) if self.machines else slurmd.split()))


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    found = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return found
