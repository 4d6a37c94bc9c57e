"""Check that a node is fit to train, before its ranks start, so that a sick one ends the job by name.

    python -m stepladder.cluster.health

Reads what slurm/sft.sbatch has set. Prints, for the shell, the network interface that leads to the other nodes
(nothing on one node); what is wrong is said on stderr, and the exit code is then 2. Imports nothing but the
standard library, and psutil on several nodes: it answers in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

from stepladder import errors, hardware

FREE_GPU = 1024  # MiB in use on a GPU that is given to nobody else: the driver's own and some to spare
FREE_DISK = 2 << 30  # bytes: less than the checkpoint of the smallest model, and logs
CLOCK = 120  # seconds apart: certificates, file times and the order of logs break; a start takes less
PATIENCE = 60  # seconds for the nodes to come to the same point


def main() -> None:
    env = os.environ
    nodes, here, wanted = env["STEPLADDER_NODES"].split(), int(env["SLURM_NODEID"]), int(env["STEPLADDER_GPUS"])
    check_step(int(env.get("SLURM_GPUS_ON_NODE") or 0), wanted)
    faults = [
        *check_gpus(wanted),
        *check_disk([Path(env["STEPLADDER_FOLDER"]), Path(env.get("TMPDIR", "/tmp"))]),
        *check_clock(float(env["STEPLADDER_CLOCK"])),
    ]
    if not faults and len(nodes) > 1:
        faults = check_rendezvous(nodes, here, int(env["STEPLADDER_PORT"]))
    if faults:
        raise errors.LaunchError(
            f"node {socket.gethostname()} cannot train: {'; '.join(faults)}",
            help=f"sbatch --exclude={socket.gethostname()} …, and tell your administrators",
        )
    if len(nodes) > 1 and (name := hardware.interface(nodes[1] if here == 0 else nodes[0])):
        print(name)


def check_step(given: int, wanted: int) -> None:
    """Refuse a job whose ranks would not all have a GPU; no other node would do better.

    Args:
        given: GPUs of this node that Slurm lets the ranks use (`SLURM_GPUS_ON_NODE` of their step).
        wanted: GPUs that the job has on its first node (the same variable in the batch script): a rank for each.
    """
    if given != wanted:
        raise errors.LaunchError(
            f"node {socket.gethostname()}: {given} GPU(s) for its ranks, and the job starts {wanted}",
            why="--gpus-per-task gives each task its own, and one task starts all ranks of a node; --gpus may give "
            "each node another number; --exclusive gives a job all GPUs of a node, and its ranks as many as it named",
            help="sbatch --nodes=N --gpus-per-node=G …: the same number on each node, and one task",
        )
    if wanted > 1 and "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        raise errors.LaunchError(
            f"node {socket.gethostname()}: {wanted} ranks on {wanted} slices of a GPU (MIG)",
            why="a process sees one slice, whatever it is given (NVIDIA's MIG user guide), so all ranks would be on it",
            help="sbatch --gpus-per-node=1 …, or whole GPUs",
        )


def check_gpus(wanted: int) -> list[str]:
    """Faults: fewer GPUs than the job was given, or memory of theirs that others use."""
    if not wanted:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    ask = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    if mig := "MIG-" in visible:  # Slurm names slices of a GPU by UUIDs, which --id does not take and no query answers
        ask = ["nvidia-smi", "--list-gpus"]
    elif visible:
        ask.append(f"--id={visible}")
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return [f"the job has {wanted} GPUs and nvidia-smi is not installed"]
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer"]
    if done.returncode:
        return [f"nvidia-smi: {(done.stderr or done.stdout).strip()}"]
    if mig:
        return [] if visible in done.stdout else [f"{visible} does not answer"]
    used = dict(line.split(",") for line in done.stdout.splitlines() if "," in line)
    faults = [] if len(used) >= wanted else [f"{len(used)} of {wanted} GPUs answer"]
    for index, megabytes in used.items():
        if megabytes.strip().isdigit() and int(megabytes) > FREE_GPU:
            faults.append(f"{int(megabytes):,} MiB of GPU {index} are in use by others")
    return faults


def check_disk(folders: list[Path]) -> list[str]:
    faults = []
    for folder in folders:
        try:
            probe = folder / f".{socket.gethostname()}.{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
            free = shutil.disk_usage(folder).free
        except OSError as error:
            faults.append(f"{folder} cannot be written: {error.strerror}")
            continue
        if free < FREE_DISK:
            faults.append(f"{folder} has {free >> 20:,} MiB left")
    return faults


def check_clock(batch: float) -> list[str]:
    apart = time.time() - batch
    return [] if abs(apart) < CLOCK else [f"its clock is {apart:+.0f} s from the first node's"]


def check_rendezvous(nodes: list[str], here: int, port: int) -> list[str]:
    """Faults of the rendezvous: the first node listens on its port until each of the others has called."""
    if here:
        end = time.monotonic() + PATIENCE
        reason = ""
        while time.monotonic() < end:
            try:
                with socket.create_connection((nodes[0], port), 5) as call:
                    call.settimeout(PATIENCE)
                    call.sendall(struct.pack("!H", here))
                    if call.recv(1):  # the first node has heard all
                        return []
                reason = "it hung up: another node is missing"
            except OSError as error:
                reason = str(error)
            time.sleep(0.2)
        return [f"it cannot reach {nodes[0]}:{port}: {reason}"]
    calls: dict[int, socket.socket] = {}
    try:
        with socket.create_server(("", port)) as server, contextlib.ExitStack() as stack:
            server.settimeout(PATIENCE)
            while len(calls) < len(nodes) - 1:
                call = stack.enter_context(server.accept()[0])
                call.settimeout(5)
                if len(said := call.recv(2)) == 2:  # a port scanner says nothing
                    calls[struct.unpack("!H", said)[0]] = call
            for call in calls.values():
                call.sendall(b"+")
    except TimeoutError:
        missing = [name for number, name in enumerate(nodes) if number and number not in calls]
        return [f"within {PATIENCE} s nothing came from {', '.join(missing)}"]
    except OSError as error:
        return [f"port {port}: {error.strerror}"]
    return []


if __name__ == "__main__":
    errors.exit_with(main)
