"""The plan's traffic under ZeRO-3 against what DeepSpeed gathers and reduces; writes docs/planning.md's table.

    python benchmarks/plan_zero3.py --page docs/planning.md

A small model is trained by one process over a fake process group of 8 or 64 ranks, whose collectives return at once:
what it computes is nonsense, what it sends is right. DeepSpeed's thresholds are as small as the model.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HIDDEN, LAYER = 64, 61_440  # LAYER: numbers of a layer
MARK = "<!-- plan-zero3 -->\n"
# Each: ranks, layers, the layers that ZeRO-3 keeps at most, checkpointing, LoRA.
CASES = [
    (8, 6, 100, False, False), (8, 12, 2, False, False), (8, 12, 5, True, False), (8, 12, 0.5, True, False),
    (8, 12, 5, False, True), (8, 12, 5, True, True), (64, 6, 2, True, True),
]  # fmt: skip


def measure(ranks: int, layers: int, kept: float, checkpointing: bool, adapter: bool) -> dict[str, dict[str, float]]:
    """Bytes by collective of a step, as `plan` has them and as `trace`."""
    import torch
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode

    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    engine = make_engine(ranks, layers, int(kept * LAYER), checkpointing, adapter)
    sent: collections.Counter[str] = collections.Counter()
    names = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}

    class Traffic(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if name := names.get(func._opname):
                leaves = torch.utils._pytree.tree_leaves((args, kwargs))
                sent[name] += max(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    ids = torch.zeros((1, 32), dtype=torch.long)
    with Traffic():
        for _ in range(4):  # DeepSpeed records the order of modules in the first ones
            sent.clear()
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    return {"plan": predict(engine.module, ranks, layers, kept, checkpointing), "trace": dict(sent)}


def make_engine(ranks: int, layers: int, live: int, checkpointing: bool, adapter: bool) -> Any:
    """DeepSpeed's engine around a Llama, with ds_configs/zero3.json as Transformers fills it."""
    import os

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stepladder.training.launch import devices

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599"}
    devices._load_cpu_collectives()
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False)
    zero = json.loads((ROOT / "ds_configs/zero3.json").read_text())["zero_optimization"] | {
        "reduce_bucket_size": HIDDEN**2, "stage3_prefetch_bucket_size": int(0.9 * HIDDEN**2),
        "stage3_param_persistence_threshold": 10 * HIDDEN, "stage3_max_reuse_distance": live,
        "stage3_max_live_parameters": live,
    }  # fmt: skip
    settings = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero,
        "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"},  # as gradients.py sets it
    }  # fmt: skip
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model: Any = LlamaForCausalLM(config)
    if adapter:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable()
        if adapter:
            model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, config=settings, optimizer=torch.optim.AdamW(trained))[0]


def predict(model: Any, ranks: int, layers: int, kept: float, checkpointing: bool) -> dict[str, float]:
    from stepladder.planning.sharding import zero3_traffic
    from stepladder.planning.trace import Parameter

    def part(name: str) -> str:
        return "layer" if ".layers." in name else "embedding" if "embed_tokens" in name else "ends"

    parameters = tuple(
        Parameter(part(name), p.ds_shape[0], p.ds_numel, 2, 2, p.requires_grad, len(p.ds_shape) > 1)
        for name, p in model.named_parameters()
    )
    return zero3_traffic(parameters, HIDDEN, ranks, 1, layers * checkpointing, LAYER, kept * LAYER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="a page whose table is replaced, between its two plan-zero3 marks")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print("\n" + json.dumps(measure(*args.case)))
        return
    rows = ["| ranks | layers | kept at most | ckpt | what | plan KB | trace KB | difference |",
            "| ---: | ---: | ---: | --- | --- | ---: | ---: | ---: |"]  # fmt: skip
    for case in CASES:
        words = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ranks, layers, kept, checkpointing, adapter = case
        for what, traced in found["trace"].items():
            cells = [ranks, layers, f"{kept} layers", "on" if checkpointing else "off", what + ", LoRA" * adapter]
            plan = found["plan"][what]
            figures = f"{plan / 1e3:,.0f} | {traced / 1e3:,.0f} | {100 * (plan / traced - 1):+.1f} %"
            rows.append(f"| {' | '.join(map(str, cells))} | {figures} |")
    print("\n".join(rows))
    if args.page:
        before, _, after = args.page.read_text().split(MARK)
        args.page.write_text("\n".join([before + MARK + rows[0], *rows[1:], MARK + after]))


if __name__ == "__main__":
    main()
