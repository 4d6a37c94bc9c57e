"""Check that a node is fit to train, before its ranks start, so that a sick one ends the job by name.

    python -m stepladder.cluster.health

Reads what slurm/sft.sbatch has set. Prints, for the shell, the network interface that leads to the other nodes, and
all of that network as NCCL takes them (nothing on one node). Faults go to stderr, with exit code 2. Imports nothing
but the standard library, and psutil on several nodes: it answers in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stepladder import errors, hardware

FREE_GPU = 1024  # MiB in use on a GPU that is given to nobody else: the driver's own and some to spare
FREE_DISK = 2 << 30  # bytes: less than the checkpoint of the smallest model, and logs
CLOCK = 120  # seconds apart: certificates, file times and the order of logs break; a start takes less
PATIENCE = 60  # seconds for the nodes to come to the same point


def main() -> None:
    env = os.environ
    nodes, here, wanted = env["STEPLADDER_NODES"].split(), int(env["SLURM_NODEID"]), int(env["STEPLADDER_GPUS"])
    check_step(int(env.get("SLURM_GPUS_ON_NODE") or env.get("STEPLADDER_GPUS_PER_NODE") or 0), wanted)
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
        print(name, "=" + ",".join(hardware.interfaces_beside(name)))  # with "=" eth1 is not eth10 too


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
            why=hardware.ONE_SLICE,
            help="sbatch --gpus-per-node=1 …, or whole GPUs",
        )


def check_gpus(wanted: int) -> list[str]:
    """Faults: fewer GPUs than the job was given, or memory of theirs that others use.

    The maker's tool that is here is asked. Without one, or with one of AMD's that gives no answer to read, a note says
    what was not looked at: the ranks will find out whether PyTorch has a GPU.
    """
    if not wanted:
        return []
    nvidia, amd = (Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))
    if shutil.which("nvidia-smi") and (nvidia or not amd):  # a site's image may hold both makers' tools
        return check_nvidia(wanted)
    tried = []
    for ask, read_memory in AMD:  # both within the other nodes' PATIENCE
        try:
            done = subprocess.run(ask, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True)
            # after warnings, as of a GPU in a low-power state
            used = read_memory(json.loads("".join(re.findall(r"(?ms)^[\[{].*", done.stdout))))
        except OSError:
            tried.append(f"no {ask[0]}")
        except subprocess.TimeoutExpired:
            tried.append(f"{ask[0]} does not answer")
        except subprocess.CalledProcessError as error:
            tried.append(f"{ask[0]}: {' '.join((error.stderr or error.stdout).split())[-200:]}")
        except (ValueError, AttributeError, KeyError, TypeError):
            tried.append(f"{ask[0]}'s answer cannot be read")
        else:
            return judge_memory(used, wanted)
    print(
        f"note: node {socket.gethostname()}: its {wanted} GPU(s) were not looked at, nor whether others use them: no "
        f"nvidia-smi, {', '.join(tried)}",
        file=sys.stderr,
    )
    return []


def _read_amd_smi(answer: Any) -> dict[str, int | None]:
    """MiB in use on each GPU: a list, within `gpu_data` from ROCm 7 on; a GPU that does not tell has "N/A"."""
    used: dict[str, int | None] = {}
    for row in answer["gpu_data"] if isinstance(answer, dict) else answer:
        one = re.search(r"'used_vram': \{'value': '?(\d+)", str(row["mem_usage"]))
        used[str(row["gpu"])] = int(one[1]) if one else None
    return used


def _read_rocm_smi(answer: Any) -> dict[str, int | None]:
    rows = {name: row["VRAM Total Used Memory (B)"] for name, row in answer.items() if name.startswith("card")}
    return {name: int(used) >> 20 if str(used).isdecimal() else None for name, used in rows.items()}


AMD = (
    (["amd-smi", "metric", "--mem-usage", "--json"], _read_amd_smi),
    (["rocm-smi", "--showmeminfo", "vram", "--json"], _read_rocm_smi),
)


def judge_memory(used: dict[str, int | None], wanted: int) -> list[str]:
    """Faults of AMD's GPUs, from the MiB in use on each.

    Its tools list every GPU of the node, whatever ROCR_VISIBLE_DEVICES says, and number them in another order than
    ROCm does: of a node that the job shares, the GPUs in use may be other jobs'. What is sure is that too few are free.
    """
    if len(used) < wanted:
        return [f"{len(used)} of {wanted} GPUs answer"]
    taken = {index: megabytes for index, megabytes in used.items() if (megabytes or 0) > FREE_GPU}
    if len(used) - len(taken) >= wanted:
        return []
    return [f"{megabytes:,} MiB of GPU {index} are in use by others" for index, megabytes in taken.items()]


def check_nvidia(wanted: int) -> list[str]:
    """Faults by nvidia-smi, which is asked for the job's own GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    ask = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    if mig := "MIG-" in visible:  # Slurm names slices of a GPU by UUIDs, which --id does not take and no query answers
        ask = ["nvidia-smi", "--list-gpus"]
    elif visible:
        ask.append(f"--id={visible}")
    try:
        done = subprocess.run(ask, capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer"]
    except OSError as error:  # a file for another kind of processor
        return [f"nvidia-smi: {error.strerror}"]
    if done.returncode:
        return [f"nvidia-smi: {(done.stderr or done.stdout).strip()}"]
    if mig:
        return [] if visible in done.stdout else [f"{visible} does not answer"]
    used = dict(re.findall(r"(?m)^ *(\d+), *(.*?) *$", done.stdout))  # beside warnings, as of a corrupted infoROM
    faults = [] if len(used) >= wanted else [f"{len(used)} of {wanted} GPUs answer"]
    for index, megabytes in used.items():
        if megabytes.isdecimal() and int(megabytes) > FREE_GPU:
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
