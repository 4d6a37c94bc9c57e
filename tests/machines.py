"""Machines on this one, for the tests: network namespaces joined by a bridge, each with its own host name and hosts.

with Machines(2) as machines:
    process = machines.start(0, ["accelerate", "launch", …], hosts="127.0.1.1 node1")

Needs root and iproute2; `possible()` tells.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
from pathlib import Path
from typing import Any

INTERFACE, FAST = "fabric0", "fast0"
BESIDE = "fabric1"  # of one network with the first, as a node's cards of Slingshot or InfiniBand are


class Machines:
    """A context; the machines are named node1, node2, … and `address` has the IPv4 address of each.

    With `second`, each has another interface, FAST, whose addresses are in `fast_address`.
    """

    def __init__(self, count: int, second: bool = False):
        self.id = secrets.token_hex(2)  # interface names have at most 15 characters
        self.subnet = f"10.{int(self.id[:2], 16)}.{int(self.id[2:], 16)}"
        self.address = {f"node{number + 1}": f"{self.subnet}.{number + 2}" for number in range(count)}
        fast = f"172.{16 + int(self.id[:2], 16) % 16}.{int(self.id[2:], 16)}"
        self.fast_address = {node: f"{fast}.{number + 2}" for number, node in enumerate(self.address) if second}

    def __enter__(self) -> Machines:
        bridge = f"sl{self.id}"
        lines = [f"link add {bridge} type bridge", f"addr add {self.subnet}.1/24 dev {bridge}", f"link set {bridge} up"]
        for number, (node, address) in enumerate(self.address.items()):
            space, outer = self._netns(node), f"v{self.id}{number}"
            lines += [
                f"netns add {space}",
                f"link add {outer} type veth peer name {INTERFACE} netns {space}",
                f"link set {outer} master {bridge} up",
                f"-n {space} addr add {address}/24 dev {INTERFACE}",
                f"-n {space} link set {INTERFACE} up",
                f"link add {outer}b type veth peer name {BESIDE} netns {space}",
                f"link set {outer}b master {bridge} up",
                f"-n {space} addr add {self.subnet}.{number + 102}/24 dev {BESIDE}",
                f"-n {space} link set {BESIDE} up",
                f"-n {space} link set lo up",
            ]
            if node in self.fast_address:
                lines += [
                    f"link add {outer}f type veth peer name {FAST} netns {space}",
                    f"link set {outer}f master {bridge} up",
                    f"-n {space} addr add {self.fast_address[node]}/24 dev {FAST}",
                    f"-n {space} link set {FAST} up",
                ]
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True)
        return self

    def __exit__(self, *error: Any) -> None:
        for node in self.address:
            subprocess.run(["ip", "netns", "delete", self._netns(node)], capture_output=True)
        subprocess.run(["ip", "link", "delete", f"sl{self.id}"], capture_output=True)

    def inside(self, node: str, hosts: Path, command: str) -> list[str]:
        """The words that run a shell command on a machine, with that file as its /etc/hosts."""
        named = f"hostname {node} && mount --bind {hosts} /etc/hosts && exec {command}"
        # nsenter: `ip netns exec` mounts /sys anew, and slurmd does not find its cgroups there.
        network = f"--net=/var/run/netns/{self._netns(node)}"
        return ["nsenter", network, "unshare", "--uts", "--mount", "sh", "-c", named]

    def _netns(self, node: str) -> str:
        return f"sl{self.id}{node}"


def possible() -> bool:
    """Whether namespaces may be made here."""
    name = f"sl{secrets.token_hex(2)}"
    with contextlib.suppress(OSError):
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
        pair = (
            f"ip link add {name}a type veth peer name {name}b && ip link delete {name}a && unshare --uts --mount true"
        )
        may = made and subprocess.run(["sh", "-c", pair], capture_output=True).returncode == 0
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        return may
    return False
