"""The ranks of a run: they meet, as many as were launched, each on its own device, and share work once per node.

A launch that silently becomes something else is the costliest mistake (two ranks on one GPU:
accelerate#1840), so all of it is asserted.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepladder import hardware, installation
from stepladder.errors import LaunchError, first_line
from stepladder.training.launch import transport
from stepladder.training.launch.launcher import RANK_VARIABLES, Launch, requested_ranks


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank."""
    import torch.distributed as dist

    values = [value]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def meeting(launch: Launch, folder: Path | None = None) -> Iterator[None]:
    """Let the ranks find each other in the block, in which a process group is made; NCCL's log goes to `folder`.

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
    if folder:
        transport.log_choice(launch, folder)
    try:
        yield
    except RuntimeError as error:
        if launch.ranks == 1 or not re.search(r"(?i)gloo|nccl|socket|store|rendezvous|connect", str(error)):
            raise
        through = os.environ.get("GLOO_SOCKET_IFNAME") or "none is named"
        raise LaunchError(
            f"the {launch.ranks} ranks did not find each other: {first_line(error)}",
            where=f"{socket.gethostname()}, rank {launch.rank}",
            why=f"all must reach {first}:{os.environ.get('MASTER_PORT', '')} and each other; interface: {through}",
            help="the same command on every machine but for --machine_rank, --main_process_ip as all of them reach "
            "it; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface (`ip address` lists them)",
        ) from None


def _check_meeting_place(launch: Launch) -> None:
    """Raise LaunchError without the variables by which ranks meet; without torchrun, print for whom a rank waits."""
    unset = f"unset {' '.join(RANK_VARIABLES)}"
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise LaunchError(
            f"WORLD_SIZE={launch.ranks} without {', '.join(missing)}",
            where="the environment",
            why="a launcher sets all of them for each rank; a shell or a profile has kept some",
            help=f"accelerate launch --num_processes {launch.ranks} …; for one process: {unset}",
            this_rank_only=True,
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ and os.environ.get("STEPLADDER_TASKS") != "rank":  # slurm/node.sh
        print(
            f"note: rank {launch.rank} waits for the others of WORLD_SIZE={launch.ranks} at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, as the environment has it, and no torchrun; for "
            f"one process: {unset}",
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
            help=f"launch with: {installation.launch_command('ddp', 'N')} …",
        )
    if joined != (asked := requested_ranks() or joined):
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

    if launch.strategy.is_fsdp and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState().distributed_type = DistributedType.MULTI_GPU
        os.environ["FSDP_OFFLOAD_PARAMS"] = "false"


def once_per_node(launch: Launch, work: Callable[[], Path]) -> Path:
    """The folder that `work` returns, from the one rank of this node that does it; every rank calls it once.

    The others wait as long as it takes, in a group of their own: NCCL gives up after
    `ddp_timeout` (half an hour), which preparing a large data set may exceed.

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
