"""Seconds and peak memory of a merge, beside PEFT's `merge_and_unload` on the same model.

    python benchmarks/merge.py --model models/smollm2-135m-instruct
    python benchmarks/merge.py --layers 28 --hidden 3072   # a random model of 3.2 billion parameters, on disk

Each side runs in a process of its own, alternating; its peak is what Linux counts (VmHWM). The merged weights
are compared, so that neither is bought with another result. The adapter is random, LoRA r 16 on all matrices.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = """
import sys, time; from pathlib import Path
import torch
from peft import PeftModel; from transformers import AutoModelForCausalLM
from stepladder.model.merge.methods import StreamedMerge
began = time.perf_counter(); out = Path(sys.argv[3]); out.mkdir()
StreamedMerge(Path(sys.argv[1]), [Path(sys.argv[2])], [1.0]).write(out, torch.bfloat16, 5 * 10**9, lambda *_: None)
"""
THEIRS = """
import sys, time
import torch
from peft import PeftModel; from transformers import AutoModelForCausalLM
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="5GB")
"""
REPORT = """
import json
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(json.dumps([time.perf_counter() - began, int(peak) * 1024]))
"""


def make_base(folder: Path, layers: int, hidden: int) -> None:
    """A random Llama in bf16 with the shape of Llama 3.2 3B, one layer in memory at a time."""
    import torch
    from transformers import LlamaConfig

    from stepladder.model import weights
    from stepladder.model.merge import skeleton

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    model = skeleton.make_skeleton(config)
    tensors = {
        n: weights.Tensor("", "BF16", tuple(p.shape)) for n, p in model.named_parameters() if n != "lm_head.weight"
    }
    weights.write(
        folder, tensors, lambda n: (0.02 * torch.randn(tensors[n].shape)).bfloat16(), 5 * 10**9, lambda *_: None
    )


def make_adapter(base: Path, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from stepladder.model.merge import skeleton

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(skeleton.make_skeleton(AutoConfig.from_pretrained(base)), config, low_cpu_mem_usage=True)
    learned = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    folder.mkdir()
    save_file({n: 0.05 * torch.randn(p.shape) for n, p in learned.items()}, folder / "adapter_model.safetensors")
    config.base_model_name_or_path = str(base)
    config.save_pretrained(folder)


def same(ours: Path, theirs: Path) -> str:
    import torch

    from stepladder.model.weights import Weights

    a, b = Weights(ours), Weights(theirs)
    alike = sum(torch.equal(a.read(name), b.read(name)) for name in a.tensors)
    return f"{alike} of {len(a.tensors)} tensors are the same, bit for bit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model on disk; without it, a random one is made")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    results: dict[str, list[list[float]]] = {"Stepladder": [], "merge_and_unload": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = args.model or folder / "base"
        if not args.model:
            make_base(base, args.layers, args.hidden)
        make_adapter(base, folder / "adapter")
        sizes = [file.stat().st_size for file in base.glob("*.safetensors")]
        print(f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards, the largest {max(sizes) / 1e9:.2f} GB", flush=True)
        for number in range(args.repeat):
            outs = {side: folder / f"{side}-{number}" for side in results}
            for side, code in (("Stepladder", OURS), ("merge_and_unload", THEIRS)):
                command = [sys.executable, "-W", "ignore", "-c", code + REPORT, base, folder / "adapter", outs[side]]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
                results[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{side}: {results[side][-1][0]:.1f} s, {results[side][-1][1] / 1e9:.2f} GB", flush=True)
            print(same(*outs.values()))
    import peft
    import torch

    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, peft {peft.__version__}; {machine}; {time.strftime('%Y-%m-%d')}")
    for side, runs in results.items():
        seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{side:17} {seconds:7.1f} s  {peak / 1e9:6.2f} GB")


if __name__ == "__main__":
    main()
