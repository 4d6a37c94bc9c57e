"""Which network NCCL took between the nodes: sockets, where a node has better, are a warning or an error.

NCCL, and RCCL by the same words, fall back to TCP sockets where a plugin or library is missing, and say so in their
own log alone. On several nodes with GPUs the first rank of each node has that log written into the run folder.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder.console import say, warn
from stepladder.errors import LaunchError
from stepladder.training.launch.launcher import Launch

REQUIRE = "STEPLADDER_REQUIRE_FAST_NETWORK"
TCP_SOCKETS = "TCP sockets"
PROVIDERS = {"cxi": "Slingshot", "efa": "EFA", "opx": "Omni-Path", "psm2": "Omni-Path", "psm3": "RoCE by psm3"}
# libfabric's providers that are no better than NCCL's own sockets
TCP = ("tcp", "tcp;ofi_rxm", "sockets", "udp", "net")
OFI = "the plugin aws-ofi-nccl (libnccl-net-ofi.so, RCCL: librccl-net.so) in LD_LIBRARY_PATH, inside a container too"
REMEDIES = {
    "Slingshot": OFI,
    "EFA": OFI,
    "InfiniBand": "libibverbs and /dev/infiniband, inside a container too; neither NCCL_IB_DISABLE nor NCCL_NET set",
}
# Where NCCL's log says why it left a better network, the most telling first.
CAUSES = (
    r"(NCCL_IB_DISABLE set by environment to [^0\s].*)", r"(NCCL_NET set by environment to .*)",
    r"(NET/OFI No eligible providers.*)", r"(Failed to open libibverbs.*)", r"(NET/IB : No device found.*)",
    r"(NET/Plugin: (?:No plugin found|Could not find|Failed to find).*\.so.*)",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The network of a node's first rank: its name, its devices or provider, and, for sockets, why, where NCCL says."""

    name: str
    detail: str = ""
    cause: str = ""

    @property
    def is_slow(self) -> bool:
        return self.name == TCP_SOCKETS

    def __str__(self) -> str:
        return self.name + f" ({self.detail})" * bool(self.detail)


def read_choice(log: str) -> Choice | None:
    """The network in a log of NCCL at NCCL_DEBUG=INFO, subsystems INIT, ENV and NET; None where it names none.

    The lines are those of published logs (tests/test_transport.py): the formats changed between versions.
    """
    taken = re.findall(r"(?:Using network|Assigned NET plugin) (.+?)(?: to comm)?$", log, re.MULTILINE)
    if not taken:
        return None
    name = taken[-1].strip()
    provider = re.findall(r"NET/OFI Selected [Pp]rovider is ([^\s,]+)", log)
    if re.search(r"(?i)libfabric|ofi", name) and provider and provider[-1] not in TCP:
        return Choice(PROVIDERS.get(provider[-1], "libfabric"), f"libfabric's provider {provider[-1]}")
    if devices := re.search(r"NET/IB ?: Using (.*?)(?: \[RO\]|;|$)", log, re.MULTILINE):
        ports = re.findall(r"\[\d+\](\S+?):\d+/(\w+)", devices[1])
        if ports and re.search(r"(?i)ib|rdma|ucx", name.replace("Libfabric", "")):
            kind = "RoCE" if all(layer == "RoCE" for _, layer in ports) else "InfiniBand"
            return Choice(kind, ", ".join(port for port, _ in ports))
    if name != "Socket" and not provider:
        return Choice(name)  # a vendor's plugin
    cards = re.findall(r"\[\d+\](\S+?):", "".join(re.findall(r"NET/Socket ?: Using (.*)", log)[-1:]))
    detail = ", ".join(cards) if name == "Socket" else f"libfabric's provider {provider[-1]}"
    return Choice(TCP_SOCKETS, detail, next((line[1].strip() for one in CAUSES if (line := re.search(one, log))), ""))


def list_fast_networks(sys_folder: Path = Path("/sys")) -> list[str]:
    """The networks of this node that are faster than sockets, by name.

    An Ethernet card with RDMA (RoCE) does not count: whether the switches are set up for it, the node cannot tell.
    """
    found = {"Slingshot"} if any(sys_folder.glob("class/cxi/cxi*")) else set()
    for card in sys_folder.glob("class/infiniband/*"):
        if (card / "device/driver").resolve().name == "efa":
            found.add("EFA")
        for port in card.glob("ports/*"):
            if "ACTIVE" in _read(port / "state") and "InfiniBand" in _read(port / "link_layer"):
                found.add("InfiniBand")
    return sorted(found)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a card that is being reset
        return ""


def log_choice(launch: Launch, folder: Path) -> None:
    """Set what NCCL logs, before it reads it: warnings, and on several nodes its choice, by the first rank of each.

    A user's own NCCL_DEBUG stays.
    """
    import torch

    if launch.ranks == 1 or not torch.cuda.is_available() or "NCCL_DEBUG" in os.environ:
        return
    os.environ["NCCL_DEBUG"] = "WARN"
    if launch.ranks > launch.local_ranks and launch.local_rank == 0 and "NCCL_DEBUG_FILE" not in os.environ:
        folder.mkdir(parents=True, exist_ok=True)
        file = str(folder / f"nccl-{socket.gethostname()}.log").replace("%", "%%")  # NCCL reads %h and %p
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET", "NCCL_DEBUG_FILE": file}


def check_choice(launch: Launch) -> None:
    """Print which network NCCL took between the nodes; every rank calls it once, after they have met.

    Raises:
        LaunchError: sockets, or no answer, and STEPLADDER_REQUIRE_FAST_NETWORK=1.
    """
    import torch
    import torch.distributed as dist

    if launch.ranks == launch.local_ranks or not torch.cuda.is_available():
        return
    dist.all_reduce(torch.ones(1, device="cuda"))  # NCCL starts with the first collective
    names = {"%": "%", "h": socket.gethostname().split(".")[0], "p": str(os.getpid())}
    file = re.sub("%([%hp])", lambda found: names[found[1]], os.environ.get("NCCL_DEBUG_FILE", ""))
    choice = read_choice(_read(Path(file))) if launch.local_rank == 0 and file else None
    found: list[Any] = [None] * launch.ranks
    dist.all_gather_object(found, (socket.gethostname(), choice, list_fast_networks()))
    judge_choices(found[:: launch.local_ranks], file)


def judge_choices(nodes: list[tuple[str, Choice | None, list[str]]], file: str) -> None:
    """Print the network that the nodes took, once if it is one, and warn of sockets, or refuse them.

    Args:
        nodes: of each its name, what its NCCL took, and the faster networks that it has.
        file: the first node's log, to be named.

    Raises:
        LaunchError: as `check_choice`.
    """
    required = os.environ.get(REQUIRE, "") not in ("", "0")
    kinds = [str(choice or "not known: NCCL_DEBUG or NCCL_DEBUG_FILE was set before") for _, choice, _ in nodes]
    for kind in dict.fromkeys(kinds):
        names = [node[0] for node, one in zip(nodes, kinds, strict=True) if one == kind]
        say(f"network     {kind}" + f" on {', '.join(names)}" * (len(names) < len(nodes)) + f"; NCCL's log: {file}")
    for name, choice, better in nodes:
        if not (required if choice is None else choice.is_slow and (better or required)):
            continue
        what = f"node {name}: which network NCCL took is not known"
        if choice:
            what = f"node {name}: NCCL took {choice}" + f", and the node has {' and '.join(better)}" * bool(better)
        why = f"NCCL's log: {choice.cause}" if choice and choice.cause else ""
        help = "; ".join(REMEDIES[one] for one in better) or f"unset NCCL_DEBUG NCCL_DEBUG_FILE, or {REQUIRE}=0"
        if required:
            raise LaunchError(what, where=f"the environment, {REQUIRE}", why=why, help=help)
        warn(f"warning: {what}: its collectives are many times slower. {why}{'. ' * bool(why)}help: {help}")
        return  # the other nodes have the same cause
