"""The ranks of a run: they meet, on devices of their own, and are as many as were launched.

A launch that silently becomes something else is the costliest mistake (two ranks on one GPU:
accelerate#1840), so all of it is asserted.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepladder import files, hardware
from stepladder.console import say
from stepladder.errors import LaunchError
from stepladder.training.launch.launcher import OF_A_RANK, Launch, asked_for

NO_GPU = ("", "-1", "NoDevFiles")  # CUDA_VISIBLE_DEVICES where a CPU is meant; the last is Slurm's


def hide_gpus() -> None:
    """For `use_cpu`, before CUDA is touched: precision, memory and random numbers are then those of a CPU too."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def assert_no_gpu_named() -> None:
    """Raise LaunchError where PyTorch has no GPU and CUDA_VISIBLE_DEVICES names one: a CPU is not what was meant."""
    import torch

    if (named := os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()) not in NO_GPU:
        why = "has no GPU of that name" if torch.version.cuda else "is a build for CPUs"
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES={named} names no GPU that can be used",
            where="the environment",
            why=f"the CPU would compute, without a word: PyTorch {torch.__version__} {why}",
            help="a number that `nvidia-smi -L` lists, or unset it; for the CPU: use_cpu: true",
        )


def choose_device(launch: Launch, use_cpu: bool = False) -> bool:
    """Fix what each rank computes on, before CUDA is touched. Returns whether that is the CPU, as with `use_cpu`.

    One process and several GPUs: it takes the first and says so, since the alternative
    (nn.DataParallel) is neither fast nor supported. On CPU, the cores are shared out evenly:
    accelerate would give a single process one thread.
    """
    import torch

    kept = [name for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP") if os.environ.get(name) == "true"]
    if kept and "RANK" not in os.environ:
        raise LaunchError(
            f"{kept[0]}=true, and no launcher has started this",
            where="the environment",
            why="accelerate launch sets it for its ranks; a shell or a profile has kept it",
            help=f"unset {kept[0]}, or accelerate launch --config_file accelerate_configs/{launch.strategy}.yaml …",
        )
    if use_cpu:
        hide_gpus()
    elif launch.ranks == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        gpus = torch.cuda.device_count()  # by NVML: CUDA itself reads the variable once, when it is first touched
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        if gpus > 1:
            say(f"note: {gpus} GPUs are here and one process uses the first; for all of them: accelerate launch")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if launch.local_ranks > gpus:
            raise LaunchError(
                f"{launch.local_ranks} ranks on a machine with {gpus} GPU{'s' * (gpus > 1)}",
                why="two ranks on one GPU share its memory and slow each other down",
                help=f"--num_processes {gpus}",
            )
        if launch.ranks == 1 and gpus > 1:
            raise LaunchError(
                f"one process sees {gpus} GPUs",
                why="it uses one, and the libraries would split each batch among all (nn.DataParallel)",
                help=f"CUDA_VISIBLE_DEVICES=0 for one; accelerate launch --num_processes {gpus} … for all",
            )
        return False
    if launch.ranks == 1 and torch.backends.mps.is_available() and not use_cpu:
        return False
    assert_no_gpu_named()
    asked, launched = os.environ.get("OMP_NUM_THREADS"), {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}
    if not asked or (asked == "1" and launched & os.environ.keys()):  # a launcher sets 1 where nobody has set any
        torch.set_num_threads(max(1, hardware.cores() // launch.local_ranks))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no other
    if launch.strategy.startswith("zero"):
        _load_cpu_collectives()
    return True


def _load_cpu_collectives() -> None:
    """Load DeepSpeed's op for collectives on CPU, which it compiles on first use (40 s), one process after the other.

    torch guards the build by a file that a killed build leaves behind, and every later start waits for its end
    (`torch/utils/file_baton.py`). Here a lock that ends with its process comes first; a file that is then still
    there is such a leftover.
    """
    import torch
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # One folder per installation: each change of the installation, or of ninja, would trigger a rebuild.
    here = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(files.cache_folder() / "torch_extensions" / here)))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".stepladder").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.rglob(f"{ShareMemCommBuilder.NAME}/lock"):
            leftover.unlink()
        ShareMemCommBuilder().load(verbose=False)


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    import torch.distributed as dist

    values = [value]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def meeting(launch: Launch) -> Iterator[None]:
    """Let the ranks find each other in the block, in which a process group is made.

    gloo listens at the address of the host's own name, which is 127.0.1.1 on Debian and Ubuntu, where another
    machine finds nobody (pytorch#68726): between machines, GLOO_SOCKET_IFNAME names the interface to the first one.

    Raises:
        LaunchError: the ranks did not find each other.
    """
    import torch.distributed as dist

    first = os.environ.get("MASTER_ADDR", "")
    if launch.ranks > 1 and not dist.is_initialized():
        _check_meeting_place(launch)
    if launch.ranks > launch.local_ranks and first and (found := hardware.interface(first)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
    try:
        yield
    except RuntimeError as error:
        if launch.ranks == 1 or not re.search(r"(?i)gloo|nccl|socket|store|rendezvous|connect", str(error)):
            raise
        through = os.environ.get("GLOO_SOCKET_IFNAME") or "none is named"
        raise LaunchError(
            f"the {launch.ranks} ranks did not find each other: {str(error).strip().splitlines()[0]}",
            where=f"{socket.gethostname()}, rank {launch.rank}",
            why=f"all must reach {first}:{os.environ.get('MASTER_PORT', '')} and each other; interface: {through}",
            help="the same command on every machine but for --machine_rank, --main_process_ip as all of them reach "
            "it; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface (`ip address` lists them)",
        ) from None


def _check_meeting_place(launch: Launch) -> None:
    """Raise LaunchError where the others cannot be found; say for whom a rank waits that no torchrun has started."""
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise LaunchError(
            f"WORLD_SIZE={launch.ranks} without {', '.join(missing)}",
            where="the environment",
            why="a launcher sets all of them for each rank; a shell or a profile has kept some",
            help=f"accelerate launch --num_processes {launch.ranks} …; for one process: unset {' '.join(OF_A_RANK)}",
            this_rank_only=True,
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        print(
            f"note: rank {launch.rank} waits for the others of WORLD_SIZE={launch.ranks} at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, as the environment has it, and no torchrun; for "
            f"one process: unset {' '.join(OF_A_RANK)}",
            file=sys.stderr,
            flush=True,
        )


def assert_launch(launch: Launch, device: str) -> list[str]:
    """Compare the ranks that run with those that were launched and asked for; every rank calls it once.

    Returns:
        The device of each rank, as `host:device`.

    Raises:
        LaunchError: fewer ranks joined than were launched or asked for, or two ranks have one GPU.
    """
    import torch
    import torch.distributed as dist

    here = f"{socket.gethostname()}:{device}"
    devices: list[str] = [here]
    joined = 1
    if dist.is_available() and dist.is_initialized():
        joined = dist.get_world_size()
        devices = [""] * joined
        dist.all_gather_object(devices, here)
    if joined != launch.ranks:
        raise LaunchError(
            f"{launch.ranks} ranks were launched and {joined} joined",
            why="the run would silently train on fewer ranks than you pay for",
            help="launch with: accelerate launch --config_file accelerate_configs/… --num_processes N",
        )
    if joined != (asked := asked_for() or joined):
        raise LaunchError(
            f"{asked} ranks were asked for and {joined} joined",
            why="distributed_type: NO starts one process, and DeepSpeed's own launchers, without a hostfile, train on "
            "each machine by itself",
            help="a file of accelerate_configs/, or --deepspeed_multinode_launcher standard",
        )
    if torch.cuda.is_available() and len(set(devices)) < len(devices):
        twice = next(d for d in devices if devices.count(d) > 1)
        raise LaunchError(f"two ranks run on {twice}", help="one process a GPU: --num_processes = GPUs")
    return devices


def shard_on_cpu(launch: Launch) -> None:
    """Let FSDP shard on CPU too; call it once the ranks have met, before the trainer is made.

    Accelerate looks at ACCELERATE_USE_FSDP only where the ranks are on accelerators (`AcceleratorState` in
    `state.py`), and runs plain DDP otherwise, without a word. Offloading is left out: the shards are in host
    memory as they are, and torch would want to pin it, which needs an accelerator.
    """
    from accelerate import DistributedType, PartialState

    if launch.strategy.startswith("fsdp") and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState().distributed_type = DistributedType.MULTI_GPU
        os.environ["FSDP_OFFLOAD_PARAMS"] = "false"


def one_a_node(launch: Launch, work: Callable[[], Path]) -> Path:
    """The folder that `work` returns, from the one rank of this node that does it; every rank calls it once.

    The others wait however long it takes: in a group of their own, since NCCL gives up after
    `ddp_timeout` (half an hour), which the preparation of a large set may outlast.

    Raises:
        LaunchError: the ranks did not find each other.
    """
    import torch.distributed as dist

    if launch.ranks == 1:
        return work()
    with meeting(launch):  # all are here, so they meet at once or never
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=5))
    folders = [work() if launch.local_rank == 0 else Path()] * launch.ranks
    dist.monitored_barrier(group, timeout=datetime.timedelta(days=30))
    dist.all_gather_object(folders, folders[0], group=group)
    return folders[launch.rank - launch.local_rank]
