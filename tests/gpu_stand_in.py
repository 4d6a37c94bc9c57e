"""A machine with GPUs, as Python sees it: for start-up paths, up to where the first tensor goes to one.

    subprocess.run(command, env={**os.environ, **gpu_stand_in.environment(folder, gpus=8)})
    python tests/gpu_stand_in.py JOBS.json    # as many_runs.py, on a machine for each job: its `gpus` and `card`

torch's own functions run and read what CUDA's library would tell them: NVML counts what CUDA_VISIBLE_DEVICES shows at
that moment, CUDA reads that variable once, when it is first touched, and a forked process cannot touch it again.
nvidia-smi answers from PATH, NCCL's groups are gloo's, and there is no CUDA toolkit. The first operator that would
compute ends with torch's own words, which `ends_on_device` counts. What the first touch saw is said on stderr.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ON_DEVICE = "'CUDA' backend. This|Cannot access accelerator device|not linked with support for cuda"
H100, T4 = ("NVIDIA H100 80GB HBM3", 80, 9, 0), ("Tesla T4", 15, 7, 5)  # name, GiB, compute capability
NVIDIA_SMI = """#!/bin/sh
shown=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $(($STAND_IN_GPUS - 1)))}
for word in "$@"; do case $word in --id=*) shown=${word#--id=};; esac; done
indices=$(echo $shown | tr , ' ')
for index in $indices; do [ $index -lt $STAND_IN_GPUS ] || { echo "No devices were found"; exit 6; }; done
for index in $indices; do echo "$index, ${STAND_IN_USED:-4}"; done
"""


def environment(folder: Path, gpus: int, card: tuple = H100) -> dict[str, str]:
    """What a process needs to see so many GPUs; the files that it takes are written into `folder`."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text("import gpu_stand_in\n\ngpu_stand_in.install()\n")
    tool = folder / "bin/nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    tests = Path(__file__).parent
    return {
        "PYTHONPATH": os.pathsep.join(map(str, (folder, tests, tests.parent / "src"))),
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "STAND_IN_GPUS": str(gpus),
        "STAND_IN_CARD": repr(card),
    }


def ends_on_device(said: str) -> int:
    """How many processes came as far as a tensor on a GPU."""
    return len(re.findall(ON_DEVICE, said))


def install() -> None:
    """Once torch is imported, and not before: some scripts look whether it is."""
    sys.meta_path.insert(0, _Torch())


class _Torch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec and spec.loader
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        from ast import literal_eval

        pretend(lambda: int(os.environ["STAND_IN_GPUS"]), lambda: literal_eval(os.environ["STAND_IN_CARD"]))


def pretend(gpus: Any, card: Any) -> None:
    """Let torch in this process see them; `gpus` and `card` are asked each time, so that forks may differ."""
    import torch
    import torch.distributed as dist

    torch.cuda._initialized, torch.cuda._cached_device_count = False, None
    seen = SimpleNamespace(pid=0, count=0, device=0)

    def shown() -> int:
        """How many CUDA_VISIBLE_DEVICES leaves of them now; as in CUDA, the first number that is none ends the list."""
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        if named is None:
            return gpus()
        real = [number.strip().isdigit() and int(number) < gpus() for number in named.split(",")]
        return real.index(False) if False in real else len(real)

    def touch() -> int:
        if not seen.pid:
            seen.pid, seen.count = os.getpid(), shown()
            named = os.environ.get("CUDA_VISIBLE_DEVICES")
            print(f"stand-in: CUDA touched, CUDA_VISIBLE_DEVICES={named}, {seen.count} seen", file=sys.stderr)
        return seen.count

    def initialize() -> None:
        if seen.pid not in (0, os.getpid()):
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        if not touch():
            raise RuntimeError("No CUDA GPUs are available")
        torch.cuda._initialized = True

    def properties(_: int) -> SimpleNamespace:
        name, gib, major, minor = card()
        return SimpleNamespace(name=name, total_memory=gib << 30, major=major, minor=minor, multi_processor_count=132)

    def set_device(device: Any) -> None:
        seen.device = torch.device(device).index if isinstance(device, str) else getattr(device, "index", device)
        initialize()
        print(f"stand-in: cuda:{seen.device} of {seen.count}", file=sys.stderr)

    def get_device() -> int:
        initialize()
        return seen.device

    def meet(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return join("gloo", *args, **kwargs)

    torch.cuda._is_compiled = lambda: True
    torch.cuda._device_count_nvml = shown
    torch._C._cuda_getDeviceCount = touch
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.cuda._lazy_init = initialize
    torch.cuda._get_device_properties = properties
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda index: 0
    torch.cuda.default_generators = tuple(torch.Generator() for _ in range(64))
    torch.cuda.set_device, torch._C._cuda_getDevice = set_device, get_device
    join, dist.init_process_group = dist.init_process_group, meet
    torch.distributed.is_nccl_available = lambda: True


def start(job: dict, rank: int) -> None:
    """A run of many_runs.py in its forked process, on a machine of its own; does not return."""
    pretend(lambda: job["gpus"], lambda: tuple(job.get("card", H100)))
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"):  # DeepSpeed's import sets the second
        os.environ.pop(name, None)
    if "visible" in job:
        os.environ["CUDA_VISIBLE_DEVICES"] = job["visible"]
    many_runs.run(job, rank)


if __name__ == "__main__":
    import many_runs

    many_runs.main(start)
