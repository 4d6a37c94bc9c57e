"""What a launcher asks for: ranks and strategy; and what its configuration may not decide.

A launch that silently becomes something else is the costliest mistake (QLoRA collapsing to one rank: axolotl#3839), so
unsupported options are refused, and the recipe's values hold.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder import files, installation
from stepladder.errors import LaunchError

# Accelerate's variables for the two dimensions of HSDP's mesh.
MESH_SIZES = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")
# The variables that a launcher sets for each rank, and those by which others count the copies that they start.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COPY_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCHER = "the launcher's configuration"
# Blocks of DeepSpeed's file that would change the curve, and what the recipe has instead.
OTHER_CURVE = {
    "optimizer": "the recipe's optim, learning_rate and weight_decay decide",
    "scheduler": "the recipe's lr_scheduler_type and warmup_steps decide",
    **dict.fromkeys(
        ("amp", "compression_training", "curriculum_learning", "data_efficiency", "progressive_layer_drop"),
        "the recipe has no such thing",
    ),
}


class Strategy(str):
    """How the ranks share a model: the name of a file in accelerate_configs/."""

    @property
    def is_zero(self) -> bool:
        return self.startswith("zero")

    @property
    def is_zero3(self) -> bool:
        return self.startswith("zero3")

    @property
    def is_fsdp(self) -> bool:
        return self.startswith(("fsdp", "hsdp"))

    @property
    def is_hsdp(self) -> bool:
        """Whether the ranks form replicas, each of which shards the model as FSDP does."""
        return self.startswith("hsdp")

    @property
    def shards_weights(self) -> bool:
        """Whether no rank holds all weights."""
        return self.is_zero3 or self.is_fsdp

    @property
    def shards(self) -> bool:
        """Whether gradients and optimizer states are sharded, with or without the weights."""
        return self.is_zero or self.is_fsdp

    @property
    def offloads(self) -> bool:
        return self.endswith("_offload")


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says; `replicas` of the model are sharded over `ranks / replicas` each."""

    ranks: int
    rank: int
    local_rank: int
    local_ranks: int
    strategy: Strategy
    replicas: int = 1


def read_launch() -> Launch:
    """Read the environment that `accelerate launch`, torchrun or a plain `python` set; imports nothing heavy.

    Raises:
        LaunchError: its numbers fit no rank, or several copies were started without a launcher.
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
            f"{' '.join(f'{name}={env[name]}' for name in RANK_VARIABLES if env.get(name))} is no rank of a launch",
            where="the environment",
            why="a launcher sets these for each rank; a shell or a profile has kept some",
            help=f"unset {' '.join(RANK_VARIABLES)}",
            this_rank_only=True,
        )
    copies = next((name for name in COPY_COUNTS if number(name, 1) > 1), None)
    if copies and not env.get("WORLD_SIZE"):
        raise LaunchError(
            f"{env[copies]} copies of this were started, and no launcher joins them to one run",
            where=f"the environment, {copies}",
            why="srun and mpirun start processes; each of these would train by itself, as the only rank",
            help="one copy a node, which starts accelerate launch, as slurm/sft.sbatch does; for runs of their own: "
            f"env -u {copies} …, and an output_dir each",
            this_rank_only=True,
        )
    strategy, replicas = _strategy(ranks), 1
    if env.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        sizes = [env.get(name) or "1" for name in MESH_SIZES]
        replicas = count_replicas(sizes[0], sizes[1], ranks, local_ranks, LAUNCHER)
        strategy = strategy.replace("fsdp", "hsdp") if replicas > 1 else strategy
    return Launch(ranks, rank, local_rank, local_ranks, Strategy(strategy), replicas)


def find_strategy(asked: str | None, nodes: int, local_ranks: int) -> Strategy:
    """The strategy that is asked for; where none is, what the ranks need: ddp or single.

    Raises:
        LaunchError: there is no such file in accelerate_configs/, or it is none for these ranks.
    """
    name = asked or ("ddp" if nodes * local_ranks > 1 else "single")
    file = f"accelerate_configs/{name}.yaml"
    if not installation.locate(file).is_file():
        there = ", ".join(installation.list_files("accelerate_configs", "*.yaml"))
        raise LaunchError(f"--strategy {name}: no {file}", why=installation.places(file), help=there)
    return settle_strategy(Strategy(name), nodes, local_ranks)


def settle_strategy(strategy: Strategy, nodes: int, local_ranks: int) -> Strategy:
    """The strategy that a file of accelerate_configs/ gives these ranks: `hsdp.yaml` on one node gives `fsdp`.

    Raises:
        LaunchError: hsdp has one rank on each node.
    """
    if not strategy.is_hsdp or count_replicas("auto", "auto", nodes * local_ranks, local_ranks, "--strategy hsdp") > 1:
        return strategy
    return Strategy("fsdp")


def _strategy(ranks: int) -> str:
    env = os.environ
    _check_launcher()
    if env.get("ACCELERATE_USE_DEEPSPEED") == "true":
        if file := env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""):  # Accelerate and DeepSpeed open it too
            file = env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(installation.locate(file))
        zero = _checked_config(file) if file else {}
        stage = str(zero.get("stage", env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
        if stage not in ("2", "3"):
            raise LaunchError(
                f"ZeRO stage {stage} is not one of the strategies here",
                where=file or LAUNCHER,
                why="no run's memory, checkpoints and curve are checked under it",
                help="stage 2: it shards the gradients too, and sends no more",
            )
        offloads = zero.get("offload_optimizer") or {"device": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")}
        offload = isinstance(offloads, dict) and (offloads.get("device") or "none") != "none"
        return f"zero{stage}" + ("_offload" if offload else "")
    if env.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp" + ("_offload" if env.get("FSDP_OFFLOAD_PARAMS") == "true" else "")
    return "ddp" if ranks > 1 else "single"


def _checked_config(file: str) -> dict:
    """The `zero_optimization` block of DeepSpeed's file.

    Raises:
        LaunchError: the file cannot be read, or would override the recipe.
    """
    try:
        config = files.read_object(file)
        zero = config.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("its zero_optimization is no block")
    except ValueError as error:
        raise LaunchError(
            f"DeepSpeed's configuration {file} cannot be read: {error}",
            why=f"the accelerate config names it; {installation.places(file)}",
            help="a file of ds_configs/",
        ) from None
    quantized = [key for key in zero if key.startswith("zero_quantized") and zero[key]]
    if others := [*(key for key in config if key in OTHER_CURVE), *quantized]:
        raise LaunchError(
            f"{others[0]} would change what is trained",
            where=file,
            why="it comes before the recipe, which would then say one thing and the run do another",
            help=f"remove it: {OTHER_CURVE.get(others[0], 'ds_configs/ has files without it')}",
        )
    return zero


def _check_launcher() -> None:
    """Raise LaunchError for options of a launcher's configuration that end in a traceback or train another curve."""
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
            f"fsdp_ignored_modules: {env.get('FSDP_IGNORED_MODULES')}": (
                bool(env.get("FSDP_IGNORED_MODULES")),
                "each rank would train their weights by itself",
            ),
        }
    if env.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        plain = env.get("ACCELERATE_USE_FSDP") != "true"
        refused["parallelism_config without FSDP"] = (plain, "replicas and shards are those of FSDP 2")
        for kind, why in {
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
                help="a file of accelerate_configs/: fsdp.yaml, zero3.yaml, zero2.yaml or ddp.yaml",
            )  # fmt: skip


def count_replicas(replicas: str, shards: str, ranks: int, local_ranks: int, where: str) -> int:
    """How many replicas of the model the two sizes of a `parallelism_config` make of the ranks.

    `auto`, which is this project's, makes each node a replica; of one size, it is what the other leaves of the ranks.

    Raises:
        LaunchError: the sizes are not those of these ranks, or a replica is sharded over one rank.
    """
    sizes = f"parallelism_config_dp_replicate_size: {replicas}, parallelism_config_dp_shard_size: {shards}"
    if not all(size == "auto" or (size.isdecimal() and int(size)) for size in (replicas, shards)):
        raise LaunchError(f"{sizes}: each is a number, or auto", where=where, help="auto: a replica on each node")
    over = int(shards) if shards != "auto" else local_ranks if replicas == "auto" else ranks // int(replicas)
    found = int(replicas) if replicas != "auto" else ranks // over
    if found * over != ranks:
        raise LaunchError(
            f"{sizes} do not make {ranks} ranks, {local_ranks} a node",
            where=where,
            why=f"{found} replicas, each sharded over {over} ranks, are {found * over}",
            help="auto for both, and as many ranks on each node; or fsdp.yaml, which shards over all ranks",
        )
    if over == 1 < ranks:
        raise LaunchError(
            f"{sizes}: nothing would be sharded on {ranks} ranks, {local_ranks} a node",
            where=where,
            why="a replica on one rank is the whole model, which is DDP",
            help="accelerate_configs/ddp.yaml; or fsdp.yaml, which shards over all ranks",
        )
    return found


def settle_mesh(launch: Launch) -> list[str]:
    """Replace `auto` in the launcher's `parallelism_config` by numbers, before Accelerate reads it; notes on them.

    Raises:
        LaunchError: sizes on the launcher's command line, which Accelerate does not read.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") != "true":
        _check_sizes_are_read()
        return []
    if launch.replicas == 1:
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "false"
        return [f"one replica, sharded over {launch.ranks} ranks, is what accelerate_configs/fsdp.yaml does"]
    shards = launch.ranks // launch.replicas
    os.environ |= dict(zip(MESH_SIZES, map(str, (launch.replicas, shards)), strict=True))
    return [
        f"hsdp: {launch.replicas} replicas of the model, each sharded over {shards} ranks ({launch.local_ranks} a node)"
    ]


def _check_sizes_are_read() -> None:
    """Raise LaunchError where the launcher's command line has sizes of a mesh, and its file no `parallelism_config`."""
    for word in _launcher_words():
        if word.replace("-", "_").startswith("__parallelism_config_"):
            raise LaunchError(
                f"{word} has no effect",
                where="the command line of accelerate launch",
                why="Accelerate reads it only with --use_parallelism_config or a parallelism_config in its file",
                help="accelerate_configs/hsdp.yaml, which has one",
            )


def requested_ranks() -> int | None:
    """The number of ranks asked of the `accelerate launch` that started this process; None without one."""
    import yaml

    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--num_processes", "--num-processes", type=int)
    launcher.add_argument("--config_file", "--config-file")
    asked = launcher.parse_known_args(_launcher_words())[0]
    if asked.num_processes is None and asked.config_file:
        with contextlib.suppress(OSError, yaml.YAMLError):
            return yaml.safe_load(Path(asked.config_file).read_text(encoding="utf-8")).get("num_processes")
    return asked.num_processes


def _launcher_words() -> list[str]:
    """What the `accelerate launch` that started this process was given before its script; empty without one."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            words = parent.cmdline()
            if re.search(r"accelerate(-launch|/commands/launch\.py|\0launch)(\0|$)", "\0".join(words[:4])):
                return [*itertools.takewhile(lambda word: not re.fullmatch(r"-m|--module|.*\.py", word), words[3:])]
    return []


def leave_to_recipe(precision: str, accumulation: int, max_grad_norm: float) -> list[str]:
    """Let the recipe decide what a launcher's configuration may set too.

    Call it before the training arguments are created: Transformers would take the launcher's precision where the recipe
    asks for fp32, and DeepSpeed its accumulation and clipping.

    Args:
        precision: `bf16`, `fp16` or `fp32`.
        accumulation: micro-batches of an optimizer step.
        max_grad_norm: what gradients are clipped to.

    Returns:
        A note for each of the launcher's values that differs and is not used.
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
    return notes


def assert_no_mismatch(trainer: Any) -> None:
    """Raise LaunchError where a file of DeepSpeed's fixes values that the recipe sets to others."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and (found := dict.fromkeys(plugin.hf_ds_config.mismatches)):
        raise LaunchError(
            "DeepSpeed's configuration contradicts the recipe", why="\n".join(found), help='"auto" in that file'
        )


def has_replicas(accelerator: Any) -> bool:
    """Whether Accelerate has set up HSDP."""
    mesh = accelerator.parallelism_config
    return mesh is not None and mesh.dp_replicate_enabled


def assert_set_up(trainer: Any, recorded: dict[str, Any]) -> None:
    """Compare what Accelerate and DeepSpeed have set up with what run.json says of this run.

    Raises:
        LaunchError: they differ in strategy, precision, accumulation or clipping.
    """
    accelerator, args = trainer.accelerator, trainer.args
    kind = accelerator.distributed_type.value
    found = {
        "strategy": "ddp" if accelerator.num_processes > 1 else "single",
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "max_grad_norm": args.max_grad_norm,
    }
    if kind == "FSDP":
        found["strategy"] = "hsdp" if has_replicas(accelerator) else "fsdp"
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
            help='launch with a file of accelerate_configs/; in one of DeepSpeed\'s, "auto" leaves it to the recipe',
        )
