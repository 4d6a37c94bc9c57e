"""The ranks of a run: how many were launched, on which devices, under which strategy.

A launch that silently becomes something else is the costliest mistake (QLoRA collapsing to one
rank: axolotl#3839; two ranks on one GPU: accelerate#1840), so all of it is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import itertools
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder import cache, files, hardware
from stepladder.cluster import health
from stepladder.console import say
from stepladder.errors import LaunchError

# How a sharded model is saved, in the launcher's words.
WHOLE = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}


# What a launcher tells each of its ranks, and where others say how many copies they have started.
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COPIES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
NO_GPU = ("", "-1", "NoDevFiles")  # CUDA_VISIBLE_DEVICES where a CPU is meant; the last is Slurm's


LAUNCHER = "the launcher's configuration"
GATHERS = "stage3_gather_16bit_weights_on_model_save"
# Blocks of DeepSpeed's file that decide on the curve, and what the recipe has instead.
OTHER_CURVE = {
    "optimizer": "the recipe's optim, learning_rate and weight_decay decide",
    "scheduler": "the recipe's lr_scheduler_type and warmup_steps decide",
    **dict.fromkeys(
        ("amp", "compression_training", "curriculum_learning", "data_efficiency", "progressive_layer_drop"),
        "the recipe has no such thing",
    ),
}


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says; the strategy is named as its file in accelerate_configs/."""

    ranks: int
    rank: int
    local_rank: int
    local_ranks: int
    strategy: str


def launched() -> Launch:
    """Read the environment that `accelerate launch`, torchrun or a plain `python` set. Imports nothing heavy.

    Raises:
        LaunchError: its numbers are those of no rank, or copies were started that do not know of each other.
    """
    env = os.environ

    def number(name: str, default: int) -> int:
        try:
            return int(env.get(name) or default)
        except ValueError:
            return -1

    ranks = number("WORLD_SIZE", 1)
    rank, local_rank, local_ranks = number("RANK", 0), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", ranks)
    if not (0 <= rank < ranks and 0 <= local_rank < local_ranks <= ranks):
        raise LaunchError(
            f"{' '.join(f'{name}={env[name]}' for name in OF_A_RANK if env.get(name))} is no rank of a launch",
            where="the environment",
            why="a launcher sets these for each rank; a shell or a profile has kept some",
            way_out=f"unset {' '.join(OF_A_RANK)}",
            this_rank_only=True,
        )
    copies = next((name for name in COPIES if number(name, 1) > 1), None)
    if copies and not env.get("WORLD_SIZE"):
        raise LaunchError(
            f"{env[copies]} copies of this were started, and no launcher joins them to one run",
            where=f"the environment, {copies}",
            why="srun and mpirun start processes; each of these would train by itself, as the only rank",
            way_out="one copy a node, which starts accelerate launch, as slurm/sft.sbatch does; for runs of their own: "
            f"env -u {copies} …, and an output_dir each",
            this_rank_only=True,
        )
    return Launch(ranks, rank, local_rank, local_ranks, _strategy(ranks))


def _strategy(ranks: int) -> str:
    env = os.environ
    _check_launcher()
    if env.get("ACCELERATE_USE_DEEPSPEED") == "true":
        file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
        zero = _checked_config(file) if file else {}
        stage = str(zero.get("stage", env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
        if stage not in ("2", "3"):
            raise LaunchError(
                f"ZeRO stage {stage} is not one of the strategies here",
                where=file or LAUNCHER,
                why="no run's memory, checkpoints and curve are checked under it",
                way_out="stage 2: it shards the gradients too, and sends no more",
            )
        if file and stage == "3" and zero.get(GATHERS) is not True:
            raise LaunchError(
                f"{GATHERS} is {json.dumps(zero.get(GATHERS, False))}",
                where=file,
                why="each rank would save its shards of the result, and none the model",
                way_out=f'"{GATHERS}": true',
            )
        offloads = zero.get("offload_optimizer") or {"device": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")}
        offload = isinstance(offloads, dict) and (offloads.get("device") or "none") != "none"
        return f"zero{stage}" + ("_offload" if offload else "")
    if env.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp" + ("_offload" if env.get("FSDP_OFFLOAD_PARAMS") == "true" else "")
    return "ddp" if ranks > 1 else "single"


def _checked_config(file: str) -> dict:
    """The `zero_optimization` of DeepSpeed's file.

    Raises:
        LaunchError: the file cannot be read, or would train something else than the recipe says.
    """
    try:
        config = files.read_object(file)
        zero = config.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("its zero_optimization is no block")
    except ValueError as error:
        raise LaunchError(
            f"DeepSpeed's configuration {file} cannot be read: {error}",
            why="the accelerate config names it relative to the folder you start from",
            way_out="start from the folder that holds ds_configs/",
        ) from None
    quantized = [key for key in zero if key.startswith("zero_quantized") and zero[key]]
    if others := [*(key for key in config if key in OTHER_CURVE), *quantized]:
        raise LaunchError(
            f"{others[0]} would change what is trained",
            where=file,
            why="it comes before the recipe, which would then say one thing and the run do another",
            way_out=f"remove it: {OTHER_CURVE.get(others[0], 'ds_configs/ has files without it')}",
        )
    return zero


def _check_launcher() -> None:
    """Raise LaunchError for what a launcher's configuration asks for and no strategy here does.

    Each was tried, and ended in a traceback or trained another curve.
    """
    env = os.environ
    refused = {
        "Megatron-LM": (env.get("ACCELERATE_USE_MEGATRON_LM") == "true", "it is not one of the strategies here"),
    }
    if env.get("ACCELERATE_USE_FSDP") == "true":
        wrap = env.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
        refused |= {
            "fsdp_version: 1": (
                env.get("FSDP_VERSION", "2") != "2",
                "checkpoints and gradients are read as FSDP 2 has them, and Accelerate will drop version 1",
            ),
            f"fsdp_auto_wrap_policy: {wrap}": (
                wrap != "TRANSFORMER_BASED_WRAP",
                "FSDP 2 shards layers, which have a forward pass, and not parts of some size",
            ),
        }
    if env.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        for kind, why in {
            "dp_replicate": "the norm of the gradients would be counted once for each replica, and clipping be another",
            "tp": "no layer here is cut into columns and rows",
            "cp": "no row here is cut over the ranks",
            "sp": "no row here is cut over the ranks",
        }.items():
            size = env.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE") or "1"
            refused[f"parallelism_config_{kind}_size: {size}"] = (size != "1", why)
    for what, (is_asked, why) in refused.items():
        if is_asked:
            raise LaunchError(
                f"{what} cannot be trained with", where=LAUNCHER, why=why,
                way_out="a file of accelerate_configs/: fsdp.yaml, zero3.yaml, zero2.yaml or ddp.yaml",
            )  # fmt: skip


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
            way_out="a number that `nvidia-smi -L` lists, or unset it; for the CPU: CUDA_VISIBLE_DEVICES=-1",
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
            way_out=f"unset {kept[0]}, or accelerate launch --config_file accelerate_configs/{launch.strategy}.yaml …",
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
                way_out=f"--num_processes {gpus}",
            )
        if launch.ranks == 1 and gpus > 1:
            raise LaunchError(
                f"one process sees {gpus} GPUs",
                why="it uses one, and the libraries would split each batch among all (nn.DataParallel)",
                way_out=f"CUDA_VISIBLE_DEVICES=0 for one; accelerate launch --num_processes {gpus} … for all",
            )
        return False
    if launch.ranks == 1 and torch.backends.mps.is_available() and not use_cpu:
        return False
    assert_no_gpu_named()
    from stepladder.training import freed_memory

    asked, launched = os.environ.get("OMP_NUM_THREADS"), {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}
    if not asked or (asked == "1" and launched & os.environ.keys()):  # a launcher sets 1 where nobody has set any
        torch.set_num_threads(max(1, hardware.cores() // launch.local_ranks))
    freed_memory.keep()
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

    # Another installation, or another ninja, would build anew at each change from one to the other.
    here = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache.folder() / "torch_extensions" / here)))
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
    machine finds nobody (pytorch#68726): between machines it is told the interface that leads to the first one.

    Raises:
        LaunchError: the ranks did not find each other.
    """
    import torch.distributed as dist

    first = os.environ.get("MASTER_ADDR", "")
    if launch.ranks > 1 and not dist.is_initialized():
        _check_meeting_place(launch)
    if launch.ranks > launch.local_ranks and first and (found := health.interface(first)):
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
            way_out="the same command on every machine but for --machine_rank, --main_process_ip as all of them reach "
            "it; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface (`ip address` lists them)",
        ) from None


def _check_meeting_place(launch: Launch) -> None:
    """Raise LaunchError where the others cannot be found; say for whom a rank waits that no torchrun has started."""
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise LaunchError(
            f"WORLD_SIZE={launch.ranks} without {', '.join(missing)}",
            where="the environment",
            why="a launcher sets all of them for each rank; a shell or a profile has kept some",
            way_out=f"accelerate launch --num_processes {launch.ranks} …; for one process: unset {' '.join(OF_A_RANK)}",
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


def _asked_for() -> int | None:
    """The number of ranks that the `accelerate launch` above this process was asked for; None where none is above."""
    import psutil
    import yaml

    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--num_processes", "--num-processes", type=int)
    launcher.add_argument("--config_file", "--config-file")
    with contextlib.suppress(psutil.Error, OSError, yaml.YAMLError):
        for parent in psutil.Process().parents():
            words = parent.cmdline()
            if not re.search(r"accelerate(-launch|/commands/launch\.py|\0launch)(\0|$)", "\0".join(words[:4])):
                continue
            asked = launcher.parse_known_args([*itertools.takewhile(lambda word: not word.endswith(".py"), words[3:])])[
                0
            ]
            if asked.num_processes is None and asked.config_file:
                return yaml.safe_load(Path(asked.config_file).read_text()).get("num_processes")
            return asked.num_processes
    return None


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
            way_out="launch with: accelerate launch --config_file accelerate_configs/… --num_processes N",
        )
    if joined != (asked := _asked_for() or joined):
        raise LaunchError(
            f"{asked} ranks were asked for and {joined} joined",
            why="distributed_type: NO starts one process, and DeepSpeed's own launchers, without a hostfile, train on "
            "each machine by itself",
            way_out="a file of accelerate_configs/, or --deepspeed_multinode_launcher standard",
        )
    if torch.cuda.is_available() and len(set(devices)) < len(devices):
        twice = next(d for d in devices if devices.count(d) > 1)
        raise LaunchError(f"two ranks run on {twice}", way_out="one process a GPU: --num_processes = GPUs")
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


def leave_to_recipe(precision: str, accumulation: int, max_grad_norm: float) -> list[str]:
    """Let the recipe decide what a launcher's configuration may set too.

    Call it before the training arguments are made: Transformers takes the launcher's precision where the recipe asks
    for fp32, and DeepSpeed its accumulation and clipping.

    Args:
        precision: `bf16`, `fp16` or `fp32`.
        accumulation: micro-batches of an optimizer step.
        max_grad_norm: what gradients are clipped to.

    Returns:
        A note for each of the launcher's values that is another and is not used.
    """
    ours = {
        "mixed_precision": "no" if precision == "fp32" else precision,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
    }
    notes = []
    for key, value in ours.items():
        theirs = os.environ.pop(f"ACCELERATE_{key.upper()}", "auto")
        if theirs not in ("auto", "no", str(value), f"{value}.0"):
            notes.append(f"{key}: {theirs} of the launcher is not used: the recipe decides, and it is {value} here")
    os.environ["ACCELERATE_MIXED_PRECISION"] = str(ours["mixed_precision"])
    for key, value in WHOLE.items():  # else the result of a run could not be saved
        if os.environ.get(key, value) != value:
            notes.append(f"{key.removeprefix('ACCELERATE_').lower()}: {value} here, since the result is saved whole")
            os.environ[key] = value
    return notes


def assert_no_mismatch(trainer: Any) -> None:
    """Raise LaunchError where a file of DeepSpeed's fixes values that the recipe sets to others."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and (found := dict.fromkeys(plugin.hf_ds_config.mismatches)):
        raise LaunchError(
            "DeepSpeed's configuration contradicts the recipe", why="\n".join(found), way_out='"auto" in that file'
        )


def assert_set_up(trainer: Any, recorded: dict[str, Any]) -> None:
    """Compare what Accelerate and DeepSpeed have set up with what run.json says of this run.

    Raises:
        LaunchError: they differ in strategy, precision, accumulation or clipping.
    """
    accelerator, args = trainer.accelerator, trainer.args
    kind = accelerator.distributed_type.value
    found = {
        "strategy": "fsdp" if kind == "FSDP" else "ddp" if accelerator.num_processes > 1 else "single",
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "max_grad_norm": args.max_grad_norm,
    }
    if kind == "DEEPSPEED":
        engine = trainer.model_wrapped
        found["strategy"] = f"zero{engine.zero_optimization_stage()}"
        found["gradient_accumulation_steps"] = engine.gradient_accumulation_steps()
        found["max_grad_norm"] = engine.gradient_clipping()
    wanted = {**recorded, "strategy": recorded["strategy"].removesuffix("_offload")}
    if differ := [f"{key}: {value} instead of {wanted[key]}" for key, value in found.items() if value != wanted[key]]:
        raise LaunchError(
            "Accelerate set up something else than the launch and the recipe ask for",
            why="\n".join(differ),
            way_out='launch with a file of accelerate_configs/; in one of DeepSpeed\'s, "auto" leaves it to the recipe',
        )


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
