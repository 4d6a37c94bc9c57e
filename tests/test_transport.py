"""Which network NCCL took, from logs that others have published, and from a stand-in for a node's /sys."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from stepladder.errors import LaunchError
from stepladder.run import Run
from stepladder.training.launch import transport
from stepladder.training.launch.launcher import Launch, Strategy
from stepladder.training.launch.transport import Choice

# Lines of public logs, shortened; by library, version and place.
LOGS = {
    "NCCL on HDR InfiniBand (stas00/ml-engineering, network/README)": (
        """NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [2]mlx5_2:1/IB [RO]; OOB eno1:101.262.0.9<0>
NCCL INFO Using network IB""",
        Choice("InfiniBand", "mlx5_0, mlx5_1, mlx5_2"),
    ),
    "NCCL 2.27 with HPC-X' plugin on A800": (
        """NCCL INFO NET/Plugin: Loaded net plugin NCCL RDMA Plugin v6 (v6)
NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [1]mlx5_1:1/RoCE [RO]; OOB bond0:10.0.0.2<0>
NCCL INFO Using network NCCL RDMA Plugin v6""",
        Choice("RoCE", "mlx5_0, mlx5_1"),
    ),
    "NCCL with aws-ofi-nccl on Alps": (
        """NCCL INFO NET/OFI Selected provider is cxi, fabric is cxi (found 4 nics)
NCCL INFO Using network AWS Libfabric""",
        Choice("Slingshot", "libfabric's provider cxi"),
    ),
    "aws-ofi-nccl 1.6 on Perlmutter": (
        "NCCL INFO NET/OFI Selected Provider is cxi (found 2 nics)\nNCCL INFO Using network AWS Libfabric\n",
        Choice("Slingshot", "libfabric's provider cxi"),
    ),
    "NCCL 2.12 with aws-ofi-nccl 1.5 on EKS": (
        """[1,0]<stdout>:test-nccl-efa-worker-0:21:21 [0] NCCL INFO NET/OFI Using aws-ofi-nccl 1.5.0aws
[1,0]<stdout>:test-nccl-efa-worker-0:21:21 [0] NCCL INFO NET/OFI Selected Provider is efa (found 1 nics)
[1,0]<stdout>:test-nccl-efa-worker-0:21:21 [0] NCCL INFO Using network AWS Libfabric""",
        Choice("EFA", "libfabric's provider efa"),
    ),
    "NCCL 2.28 with aws-ofi-nccl 1.16 on p5": (
        """NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 32 nics)
NCCL INFO Initialized NET plugin Libfabric
NCCL INFO Assigned NET plugin Libfabric to comm
NCCL INFO Using network Libfabric""",
        Choice("EFA", "libfabric's provider efa"),
    ),
    "aws-ofi-nccl 1.21 on Polaris, whose plugin took TCP": (
        """NCCL INFO NET/OFI No eligible providers were found
NCCL INFO NET/OFI Selected provider is tcp, fabric is 10.201.0.0/16
NCCL INFO NET/OFI Need to force simple protocol: GDR not supported
NCCL INFO Using network AWS Libfabric""",
        Choice("TCP sockets", "libfabric's provider tcp", "NET/OFI No eligible providers were found"),
    ),
    "RCCL 2.20 on LUMI without its plugin": (
        """RCCL version 2.20.5+hip6.2 HEAD:45b618a+
nid007971:55487:55971 [0] NCCL INFO Failed to open libibverbs.so[.1]
nid007971:55487:55971 [0] NCCL INFO NCCL_SOCKET_IFNAME set by environment to hsn
nid007971:55487:55971 [0] NCCL INFO NET/Socket : Using [0]hsn0:10.253.1.200<0> [1]hsn1:10.253.1.199<0>
nid007971:55487:55971 [0] NCCL INFO Using non-device net plugin version 0
nid007971:55487:55971 [0] NCCL INFO Using network Socket""",
        Choice("TCP sockets", "hsn0, hsn1", "Failed to open libibverbs.so[.1]"),
    ),
    "NCCL on Kubernetes without RDMA": (
        """llama-3-8b-node-0-0:152:386 [0] NCCL INFO NET/IB : No device found.
llama-3-8b-node-0-0:152:386 [0] NCCL INFO NET/IB : Using [RO]; OOB eth0:10.0.4.51<0>
llama-3-8b-node-0-0:152:386 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.4.51<0>
llama-3-8b-node-0-0:152:386 [0] NCCL INFO Initialized NET plugin Socket
llama-3-8b-node-0-0:152:386 [0] NCCL INFO Assigned NET plugin Socket to comm
llama-3-8b-node-0-0:152:386 [0] NCCL INFO Using network Socket""",
        Choice("TCP sockets", "eth0", "NET/IB : No device found."),
    ),
    "NCCL on Jean Zay with InfiniBand switched off": (
        """jzxh331:86341:86341 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so
jzxh330:85602:85602 [0] NCCL INFO NET/Socket : Using [0]ibp24s0:10.100.9.37<0> [1]ibp41s0:10.100.9.38<0>
jzxh330:85605:85605 [0] NCCL INFO Assigned NET plugin Socket to comm""",
        Choice("TCP sockets", "ibp24s0, ibp41s0", "NET/Plugin: Could not find: libnccl-net.so"),
    ),
    "RCCL with a plugin of its own (ODL_TB5)": ("NCCL INFO Using network ODL_TB5", Choice("ODL_TB5")),
}


@pytest.mark.parametrize("log", LOGS)
def test_the_network_that_a_log_names(log: str) -> None:
    """Guards against TCP that is taken for a fast network, whatever the version of NCCL, RCCL and their plugins: the
    plugin's name is the same for TCP and Slingshot, and interfaces of InfiniBand carry sockets as well."""
    text, choice = LOGS[log]
    assert transport.read_choice(text) == choice


def test_a_log_that_names_none() -> None:
    """Guards a log that is empty, cut off, or at another level."""
    for text in (
        "",
        "NCCL version 2.27.7+cuda13.0\n",
        "NCCL INFO NET/IB : Using [0]mlx5_0:1/I",
        "NCCL INFO Using netw",
    ):
        assert transport.read_choice(text) is None


def card(sys_folder: Path, name: str, driver: str, state: str, layer: str) -> None:
    port = sys_folder / "class/infiniband" / name / "ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "link_layer").write_text(f"{layer}\n")
    (sys_folder / "drivers" / driver).mkdir(parents=True, exist_ok=True)
    (port.parents[1] / "device").mkdir()
    (port.parents[1] / "device/driver").symlink_to(sys_folder / "drivers" / driver)


def test_what_a_node_has(tmp_path: Path) -> None:
    """Guards against a warning where sockets are all there is: a port that is down, or Ethernet, is nothing better."""
    assert transport.list_fast_networks(tmp_path) == []
    card(tmp_path, "mlx5_2", "mlx5_core", "1: DOWN", "InfiniBand")
    card(tmp_path, "mlx5_bond_0", "mlx5_core", "4: ACTIVE", "Ethernet")
    assert transport.list_fast_networks(tmp_path) == []
    card(tmp_path, "mlx5_0", "mlx5_core", "4: ACTIVE", "InfiniBand")
    card(tmp_path, "rdmap16s27", "efa", "4: ACTIVE", "Unspecified")
    (tmp_path / "class/cxi/cxi0").mkdir(parents=True)
    assert transport.list_fast_networks(tmp_path) == ["EFA", "InfiniBand", "Slingshot"]


SOCKETS = Choice("TCP sockets", "hsn0, hsn1", "NET/Plugin: Could not find: libnccl-net.so")
SLINGSHOT = Choice("Slingshot", "libfabric's provider cxi")


def test_sockets_on_a_node_that_has_better(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Guards the line of the log, the warning with the plugin's name, and STEPLADDER_REQUIRE_FAST_NETWORK=1, which
    refuses sockets, and a log that does not tell."""
    monkeypatch.delenv(transport.REQUIRE, raising=False)
    transport.judge_choices([("n1", SLINGSHOT, ["Slingshot"]), ("n2", SLINGSHOT, ["Slingshot"])], "nccl-n1.log")
    said = capsys.readouterr()
    assert said.out == "network     Slingshot (libfabric's provider cxi); NCCL's log: nccl-n1.log\n" and not said.err
    transport.judge_choices([("n1", SOCKETS, []), ("n2", SOCKETS, [])], "f")
    assert not capsys.readouterr().err, "sockets are all that these nodes have"
    nodes = [("n1", SLINGSHOT, ["Slingshot"]), ("n2", SOCKETS, ["Slingshot"])]
    transport.judge_choices(nodes, "f")
    said = capsys.readouterr()
    assert "network     TCP sockets (hsn0, hsn1) on n2;" in said.out
    assert "warning: node n2: NCCL took TCP sockets" in said.err and "aws-ofi-nccl" in said.err, said
    assert "Could not find: libnccl-net.so" in said.err
    transport.judge_choices([("n1", None, ["InfiniBand"])], "")
    assert "network     not known: NCCL_DEBUG" in capsys.readouterr().out
    monkeypatch.setenv(transport.REQUIRE, "1")
    transport.judge_choices(nodes[:1], "f")
    for wrong in (nodes, [("n1", SOCKETS, [])], [("n1", None, ["InfiniBand"])]):
        with pytest.raises(LaunchError) as refused:
            transport.judge_choices(wrong, "f")
        assert refused.value.exit_code == 2 and refused.value.help and transport.REQUIRE in str(refused.value)


def test_what_nccl_is_told_to_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a log that fills, since only the first rank of each of several nodes writes more than warnings, and the
    user's own settings."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    names = ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE")
    for ranks, local_rank, before, after in (
        (1, 0, {}, [None, None]),
        (4, 0, {}, ["WARN", None]),  # one node
        (8, 1, {}, ["WARN", None]),
        (8, 0, {}, ["INFO", "INIT,ENV,NET"]),
        (8, 0, {"NCCL_DEBUG": "TRACE"}, ["TRACE", None]),
        (8, 0, {"NCCL_DEBUG_FILE": "mine"}, ["WARN", None]),
    ):
        for name in names:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in before.items():
            monkeypatch.setenv(name, value)
        transport.log_choice(
            Launch(ranks, 4 + local_rank, local_rank, min(ranks, 4), Strategy("ddp")), tmp_path / "100%"
        )
        assert [os.environ.get(name) for name in names[:2]] == after
        file = os.environ.get("NCCL_DEBUG_FILE")
        assert (file or "").startswith(f"{tmp_path}/100%%/nccl-") == (after[0] == "INFO"), "NCCL reads % as its own"
    (tmp_path / "100%/nccl-n1.log").touch()
    assert not Run(tmp_path / "100%", is_writer=True).exists(), (
        "a run whose first start failed before it began can start again"
    )


@pytest.mark.parametrize("file", ["nccl-100%%.log", "%h.%p.log"])
def test_the_log_that_is_read(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Guards the way from NCCL's file to the line: its name as NCCL expands it (a user's own too), and one line for two
    nodes. The collectives are stand-ins: nothing here has NCCL."""
    name = file.replace("%%", "%").replace("%h", socket.gethostname().split(".")[0]).replace("%p", str(os.getpid()))
    (tmp_path / name).write_bytes(b"\xff\n" + LOGS["NCCL with aws-ofi-nccl on Alps"][0].encode())
    monkeypatch.setenv("NCCL_DEBUG_FILE", f"{tmp_path}/{file}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.ones", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda _: None)
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda found, one: found.__setitem__(slice(2), [one] * 2)
    )
    transport.check_choice(Launch(2, 0, 0, 1, Strategy("ddp")))
    assert (
        capsys.readouterr().out == f"network     Slingshot (libfabric's provider cxi); NCCL's log: {tmp_path}/{name}\n"
    )
    transport.check_choice(Launch(2, 0, 0, 2, Strategy("ddp")))
    assert not capsys.readouterr().out, "one node"
