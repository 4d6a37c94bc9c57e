"""What a process fixes before CUDA and PyTorch start: its device, its threads, and how its memory is allocated."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from stepladder import files, hardware, installation
from stepladder.console import say
from stepladder.errors import LaunchError
from stepladder.training.launch.launcher import Launch

# By which a user or Slurm names a rank's GPUs: NVIDIA's, AMD's (the first of its three counts there too) and Intel's.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
NO_GPU = ("", "-1", "NoDevFiles")  # one of them where a CPU is meant; the last is Slurm's
TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
GPUS = ("/dev/nvidiactl", "/dev/kfd")  # with a GPU, it is the GPU's memory that counts
RESTARTED = "STEPLADDER_STARTED_WITH"
FAIR = 0.75  # of an even share of the cores that a rank must keep to be bound


def hide_gpus() -> None:
    """For `use_cpu`, before CUDA starts: precision, memory and random numbers are then those of a CPU too."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HIP_VISIBLE_DEVICES"] = "-1"  # which counts before the other on AMD, and shows all GPUs where empty


def assert_no_gpu_named() -> None:
    """Raise LaunchError where the environment names a GPU and PyTorch has none: a CPU is not what was meant."""
    import torch

    cpu = "for the CPU: use_cpu: true"
    if torch.xpu.is_available():
        raise LaunchError("Stepladder does not train on Intel's GPUs", why=hardware.NO_INTEL, help=cpu)
    for name in VISIBLE:
        if (named := os.environ.get(name, "").strip()) in NO_GPU:
            continue
        build = "for CUDA" if torch.version.cuda else "for ROCm" if torch.version.hip else "for CPUs"
        raise LaunchError(
            f"{name}={named} names no GPU that can be used",
            where="the environment",
            why=f"the CPU would compute, without a word: PyTorch {torch.__version__}, a build {build}, has none",
            help=f"PyTorch's build for your GPUs; a number that `nvidia-smi -L` or `rocm-smi` lists; unset it; {cpu}",
        )


def choose_device(launch: Launch, use_cpu: bool = False) -> bool:
    """Choose what each rank computes on, before CUDA starts. Returns whether that is the CPU, as with `use_cpu`.

    One process with several GPUs takes the first and says so, since the alternative (nn.DataParallel) is
    neither fast nor supported. On CPU, the ranks of a node divide its cores evenly: accelerate would give a
    single process one thread.
    """
    import torch

    names = VISIBLE[: 2 if torch.version.hip else 1]  # these count among the GPUs that ROCR_VISIBLE_DEVICES leaves
    kept = [name for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP") if os.environ.get(name) == "true"]
    if kept and "RANK" not in os.environ:
        raise LaunchError(
            f"{kept[0]}=true, and no launcher has started this",
            where="the environment",
            why="accelerate launch sets it for its ranks; a shell or a profile has kept it",
            help=f"unset {kept[0]}, or {installation.launch_command(launch.strategy)} …",
        )
    if use_cpu:
        hide_gpus()
    elif launch.ranks == 1 and not {*names} & {*os.environ}:
        gpus = torch.cuda.device_count()  # by NVML: CUDA itself reads the variable once, when it is first touched
        if gpus:
            os.environ[names[-1]] = "0"
        if gpus > 1:
            say(f"note: {gpus} GPUs are here and one process uses the first; for all of them: accelerate launch")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if launch.local_ranks > gpus:
            raise LaunchError(
                f"{launch.local_ranks} ranks on a machine with {gpus} GPU{'s' * (gpus > 1)}",
                why="two ranks on one GPU share its memory and slow each other down",
                help=f"--num_processes {gpus}",
            )
        if launch.ranks == 1 and gpus > 1:
            raise LaunchError(
                f"one process sees {gpus} GPUs",
                why="it uses one, and the libraries would split each batch among all (nn.DataParallel)",
                help=f"{names[-1]}=0 for one; accelerate launch --num_processes {gpus} … for all",
            )
        return False
    if torch.backends.mps.is_available() and not use_cpu:
        if launch.ranks == 1:
            return False
        say("note: several ranks compute on the CPU here: PyTorch has no collectives for Apple's GPU")
    if not use_cpu:
        assert_no_gpu_named()
        for driver in filter(os.path.exists, GPUS):
            say(f"note: {driver} is here, and PyTorch {torch.__version__} finds no GPU by it: the CPU computes")
    asked, launched = os.environ.get("OMP_NUM_THREADS"), {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}
    if not asked or (asked == "1" and launched & os.environ.keys()):  # a launcher sets 1 where nobody has set any
        torch.set_num_threads(max(1, hardware.cores() // launch.local_ranks))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no other
    if launch.strategy.is_zero:
        _load_cpu_collectives()
    return True


def bind_near_gpu(launch: Launch, sys_folder: Path = Path("/sys")) -> None:
    """Keep this rank, and by it the memory that it takes, near its GPU: on the cores that the kernel calls local to it.

    Call it before the model is loaded and after the rows are prepared, for which one rank of a node takes all cores.
    Only among the cores that the ranks have, and only where all of them then have about as many as before: on a node
    whose GPUs are all at one of two sockets, or a job with cores at the other, they stay where they are. Ranks that
    srun starts by itself are bound by it, or by --cpu-bind. accelerate's ACCELERATE_CPU_AFFINITY, if set, comes later;
    by itself it leaves the job's cores, and fails without pynvml or amdsmi (`override_numa_affinity`). torchrun's
    --numa-binding, which `accelerate launch` does not pass on, fails without numactl (`torch/numa/binding.py`).
    """
    import torch

    if sys.platform != "linux":
        return
    if launch.local_ranks == 1 or "TORCHELASTIC_RUN_ID" not in os.environ or not torch.cuda.is_available():
        return
    allowed = os.sched_getaffinity(0)
    near = []
    for index in range(launch.local_ranks):
        gpu: Any = torch.cuda.get_device_properties(index)
        try:
            address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
            file = sys_folder / "bus/pci/devices" / address / "local_cpulist"
            cores = file.read_text(encoding="utf-8")  # such as 0-15,64-79
            ends = [part.split("-") for part in cores.strip().split(",")]
            near.append({core for part in ends for core in range(int(part[0]), int(part[-1]) + 1)} & allowed)
        except (AttributeError, OSError, ValueError):  # an older PyTorch, a virtual machine
            return
    ranks_on = Counter(core for cores in near for core in cores)
    least = min(sum(1 / ranks_on[core] for core in cores) for cores in near)
    if least < FAIR * len(allowed) / launch.local_ranks:
        say("note: the ranks are not bound to the cores near their GPUs: some would have too few of the job's cores")
    elif any(cores != allowed for cores in near):
        for thread in os.listdir("/proc/self/task"):  # those that libraries have started too
            with contextlib.suppress(OSError):  # one that has ended
                os.sched_setaffinity(int(thread), near[launch.local_rank])
        say(f"cores       each rank on those near its GPU: {len(near[launch.local_rank])} of {len(allowed)} for rank 0")


def _load_cpu_collectives() -> None:
    """Load DeepSpeed's op for collectives on CPU, which it compiles on first use (40 s), one process at a time.

    torch guards the build by a file, which a killed build leaves behind and every later start waits for
    (`torch/utils/file_baton.py`). Here a lock that ends with its process comes first, so a file found under it is a
    leftover.
    """
    import torch
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # One folder per installation: each change of the installation, or of ninja, would trigger a rebuild.
    here = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(files.cache_folder() / "torch_extensions" / here)))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock_file(folder / ".stepladder", wait=True):
        for leftover in folder.rglob(f"{ShareMemCommBuilder.NAME}/lock"):
            leftover.unlink()
        ShareMemCommBuilder().load(verbose=False)


def use_tcmalloc() -> None:
    """Restart this process under tcmalloc in place of glibc's malloc: the same command and process id; or do nothing.

    With batches of varying size glibc's heap fragments: recipes/lora.yaml grows from 3.5 GiB to 6.9 in 90 steps.
    Under tcmalloc it stays near 3, as fast (docs/benchmarks.md). An allocator has to be loaded first, so the process
    restarts with it, once, before the slow imports.

    It does nothing without tcmalloc, on a machine with a GPU, and where LD_PRELOAD is set by the user.
    """
    if library := os.environ.pop(RESTARTED, None):
        if os.environ.get("LD_PRELOAD") == library:
            del os.environ["LD_PRELOAD"]  # for this process, not for the commands that it runs
        return
    late = "torch" in sys.modules  # as in tests that import it once for many runs
    if late or os.environ.get("LD_PRELOAD") or any(map(os.path.exists, GPUS)):
        return
    if env := tcmalloc_environment():
        env = {**os.environ, **env, RESTARTED: env["LD_PRELOAD"]}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


def let_segments_grow() -> None:
    """On an NVIDIA GPU, let PyTorch's memory segments grow, unless the user has configured its allocator.

    Rows differ in length, and so do the blocks: otherwise free memory fragments into pieces too small to use.
    """
    if os.path.exists(GPUS[0]) and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def tcmalloc_environment() -> dict[str, str]:
    """The environment in which a process has tcmalloc; empty where it is not installed."""
    for library in TCMALLOC if sys.platform == "linux" else ():
        # without the second it prints a line at each block of 1 GiB
        env = {"LD_PRELOAD": library, "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": "0"}
        # Tried in another process: loaded into this one, it would free memory that it has not allocated.
        tried = subprocess.run([sys.executable, "-S", "-c", ""], env={**os.environ, **env}, capture_output=True)
        if not tried.returncode and not tried.stderr:  # a loader that cannot load it prints so and goes on
            return env
    return {}


def allocator_name() -> str:
    """The allocator of this process, for run.json."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        return next((known for known in ("tcmalloc", "jemalloc", "mimalloc") if f"/lib{known}" in maps), "libc")
    return "libc"
