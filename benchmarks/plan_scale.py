"""The plan against a trace of PyTorch's own `fully_shard` on up to 512 ranks; writes docs/planning.md's table.

    python benchmarks/plan_scale.py --page docs/planning.md

Nothing is allocated and nothing sent: the tensors are fake, and so is the process group, whose collectives return at
once. Accelerate wraps the model as for a run (`fsdp2_prepare_model`), two micro-batches go through it, and the bytes of
each collective and of all live tensors are counted on rank 0 and held against the plan's formulas. The models have a
few layers of their real size, since all layers are alike and a trace of 512 shards takes long.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
NODE = 8  # ranks of a node
MARK = "<!-- plan-scale -->\n"
COLLECTIVES = {
    "_allgather_base_": "all-gather", "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A recipe under FSDP on some ranks, or under HSDP, which shards within a node."""

    recipe: str
    ranks: int
    strategy: str = "fsdp"
    checkpointing: bool = True
    accumulation: int = 1
    layers: int = 4
    length: int = 2048

    @property
    def sharers(self) -> int:
        return NODE if self.strategy == "hsdp" else self.ranks


CASES = [
    *(Case("qwen3-0.6b/full", ranks) for ranks in (8, 512)),
    *(Case("llama-3.1-8b/full", ranks) for ranks in (8, 64, 512)),
    Case("llama-3.1-8b/full", 8, checkpointing=False),
    Case("llama-3.1-8b/full", 8, accumulation=4),
    Case("llama-3.1-8b/full", 512, "hsdp"),
    *(Case("llama-3.1-8b/lora", ranks) for ranks in (8, 512)),
    Case("llama-3.1-8b/lora", 64, "hsdp", checkpointing=False, accumulation=4),
    *(Case("llama-3.1-70b/full", ranks) for ranks in (64, 512)),
    Case("llama-3.1-70b/full", 64, "hsdp", accumulation=4),
    Case("llama-3.1-70b/lora", 64),
]


def measure(case: Case) -> dict[str, dict[str, float]]:
    """Bytes by name, as `plan` has them and as `trace`: of the step's collectives, held between steps, and the peak."""
    import torch
    from torch import distributed
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from stepladder.model import attention
    from stepladder.planning import meta_model
    from stepladder.recipe import load

    asked = ["--gradient_checkpointing", str(case.checkpointing).lower()]
    recipe = load.load(str(ROOT / "recipes/models" / case.recipe), asked)
    config = meta_model.shorten_config(meta_model.load_config(recipe), case.layers, gpu=True)
    work = meta_model.Work(1, case.length, "bf16", case.checkpointing, cast=True, gpu=True)
    planned = predict(case, recipe, config, work)
    model, base = meta_model.build_meta_model(recipe, config, work)
    if not distributed.is_initialized():
        distributed.init_process_group("fake", rank=0, world_size=case.ranks, store=FakeStore())
    mesh, rows = (
        make_mesh(case),
        attention.lengths_as_mask(torch.tensor([case.length])),
    )  # with values, which attention reads
    with FakeTensorMode(allow_non_fake_inputs=True):
        meta_model.materialize(model, None)
        traced = trace_steps(case, recipe, shard(model, mesh), base, rows)
    return {"plan": planned, "trace": traced}


def predict(case: Case, recipe: Any, config: Any, work: Any) -> dict[str, float]:
    from stepladder.planning import memory, sharding, trace
    from stepladder.training.launch.launcher import Strategy

    traced = trace.trace_batch(recipe, config, work)
    nodes = case.ranks // NODE
    sent = sharding.count_traffic(
        traced, recipe, config, Strategy(case.strategy), case.ranks, nodes, case.accumulation
    )  # fmt: skip
    peak = memory.estimate(traced, recipe, config, Strategy(case.strategy), case.sharers, case.accumulation > 1)
    return sent | {"held": peak.weights + peak.optimizer, "peak": peak.total}


def make_mesh(case: Case) -> Any:
    """The mesh that the ranks of a case are on; HSDP's has the groups that rank 0 is in."""
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import DeviceMesh

    nodes = case.ranks // case.sharers
    if nodes == 1:
        return DeviceMesh.from_group(distributed.group.WORLD, "cpu", mesh_dim_names=("dp_shard",))
    everyone = torch.arange(case.ranks).view(nodes, case.sharers)
    groups = [distributed.new_group(everyone[:, 0].tolist()), distributed.new_group(everyone[0].tolist())]
    return DeviceMesh.from_group(groups, "cpu", mesh=everyone, mesh_dim_names=("dp_replicate", "dp_shard"))


def shard(model: Any, mesh: Any) -> Any:
    """The model as Accelerate wraps it for a run in bf16 with accelerate_configs/fsdp.yaml."""
    import torch
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),  # as gradients.sum_in_fp32 has it
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=mesh, mixed_precision="bf16",
        parallelism_config=SimpleNamespace(fsdp_dim_names=mesh.mesh_dim_names), is_main_process=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


def trace_steps(case: Case, recipe: Any, model: Any, base: Any, rows: Any) -> dict[str, float]:
    """The second of two optimizer steps: the first gathers into new buffers."""
    import torch

    from stepladder.planning import meta_model, trace
    from stepladder.planning.live_bytes import Moments
    from stepladder.recipe.recipe import sums_sharded

    sent: collections.Counter[str] = collections.Counter()

    class Traffic(Moments):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if name := COLLECTIVES.get(func._opname):
                leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
                sent[name] += max(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))
            return out

        def note(self) -> None:
            if self.now > self.worst[self.phase][0]:
                self.measure_again()
            super().note()

    ids = torch.zeros((1, case.length), dtype=torch.long)
    base.forward = lambda input_ids, **_: trace.compute_loss(base, {"input_ids": input_ids}, rows, gpu=True)
    live = Traffic([*model.parameters()], [*model.buffers(), *meta_model.quantization_constants(model)])
    live.follow(base, case.layers)
    shards = [p.to_local() for p in model.parameters() if p.requires_grad]
    states = sum(trace.state_bytes(str(recipe.get("optim")), shard, is_embedding=False) for shard in shards)
    peak, sharded = 0.0, sums_sharded(recipe)
    with live:
        for _ in range(2):
            sent.clear()
            for micro in range(case.accumulation):
                live.measure_again()
                live.begin()
                last = micro == case.accumulation - 1
                model.set_requires_gradient_sync(sharded or last)
                model.set_requires_all_reduce(last)  # HSDP's replicas add their sums once a step, as in trainer.py
                model(input_ids=ids).backward()
                peak = max(alive for alive, _ in live.worst.values())
            model.zero_grad()
    return dict(sent) | {"held": live.weights + states, "peak": peak + states}


def table(cases: list[Case], found: list[dict[str, dict[str, float]]]) -> tuple[str, list[float]]:
    """Markdown rows, and the difference of each in percent."""
    rows, differences = ["| model | strategy × ranks | what | plan GB | trace GB | difference |",
                         "| --- | --- | --- | ---: | ---: | ---: |"], []  # fmt: skip
    for case, bytes_of in zip(cases, found, strict=True):
        notes = [f"{case.accumulation} per step"] * (case.accumulation > 1) + ["no ckpt"] * (not case.checkpointing)
        name = case.strategy
        cells = ", ".join([case.recipe.replace("/", " "), *notes]), f"{name} × {case.ranks}"
        for what, traced in bytes_of["trace"].items():
            plan = bytes_of["plan"].get(what, 0.0)
            differences.append(100 * (plan / traced - 1))
            figures = f"{plan / 1e9:,.3f} | {traced / 1e9:,.3f} | {differences[-1]:+.1f} %"
            rows.append(f"| {' | '.join(cells)} | {what} | {figures} |")
    return "\n".join(rows), differences


def measure_apart(cases: list[Case]) -> list[dict[str, dict[str, float]]]:
    """`measure` each case; those of one number of ranks share a process, since a process group has one size."""
    found: dict[Case, Any] = {}
    for ranks in dict.fromkeys(case.ranks for case in cases):
        group = [case for case in cases if case.ranks == ranks]
        words = [sys.executable, __file__, "--cases", json.dumps([dataclasses.asdict(case) for case in group])]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{group}: {done.stderr[-2000:]}")
        found |= dict(zip(group, json.loads(done.stdout.splitlines()[-1]), strict=True))
    return [found[case] for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the cases whose recipe holds this")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced, between its two plan-scale marks")
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cases:
        print(json.dumps([measure(Case(**keys)) for keys in args.cases]))
        return
    cases = [case for case in CASES if args.only in case.recipe]
    rows, differences = table(cases, measure_apart(cases))
    sizes = [abs(difference) for difference in differences]
    verdict = f"{len(sizes)} figures: median difference {statistics.median(sizes):.2f} %, worst {max(sizes):.1f} %"
    print(rows, verdict, sep="\n\n")
    if args.page:
        before, _, after = args.page.read_text().split(MARK)
        args.page.write_text(f"{before}{MARK}{verdict}.\n\n{rows}\n{MARK}{after}")


if __name__ == "__main__":
    main()
