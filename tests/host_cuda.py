"""One CUDA device whose tensors lie in host memory: the real scripts, on a CPU, through every branch for a GPU.

    HOST_CUDA=libhostcuda.so python tests/host_cuda.py JOBS.json    # as many_runs.py

A tensor of it is a wrapper that says `cuda:0` and holds one on the CPU. Each operator is computed by the
CPU's kernel, and refused, as on a GPU, where it is given tensors of both devices. HOST_CUDA names host_cuda.cpp as
`build` has compiled it, which has to be loaded before torch is. CUDA's kernels, Triton and bitsandbytes are not tried.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import time
from pathlib import Path
from typing import Any

CAPABILITY, GIB = (9, 0), 80
# What may take tensors of both devices, as on a GPU.
MIXED = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "set_", "_local_scalar_dense"}


def build(folder: Path) -> Path:
    """Compile the C++ half, in a few seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    torch, library = Path(spec.origin).parent, folder / "libhostcuda.so"
    subprocess.run(
        ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", str(Path(__file__).with_suffix(".cpp")),
         f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib", "-o", str(library)], check=True,
    )  # fmt: skip
    return library


def install() -> Any:
    """Give torch the device; returns the mode in which tensors are made on it."""
    import torch
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    class HostTensor(torch.Tensor):
        inner: torch.Tensor
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, inner: torch.Tensor) -> Any:
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                layout=inner.layout, device="cuda:0",
            )  # fmt: skip
            made.inner = inner
            return made

        def tolist(self) -> Any:
            return self.inner.tolist()

        def storage(self) -> Any:
            return self.inner.storage()

        def untyped_storage(self) -> Any:
            return self.inner.untyped_storage()

        def data_ptr(self) -> int:
            return self.inner.data_ptr()

        def numpy(self, *args: Any, **kwargs: Any) -> Any:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

        def __repr__(self) -> str:
            return f"HostTensor({self.inner})"

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return compute(func, args, kwargs or {})

    def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in ("_pin_memory", "is_pinned"):
            return args[0] if name == "_pin_memory" else False
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        flat, form = pytree.tree_flatten((args, kwargs))
        on_gpu = any(isinstance(item, HostTensor) for item in flat)
        to = kwargs.get("device")
        if not on_gpu and (to is None or torch.device(to).type != "cuda"):
            return func(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return 0  # the plain one: CUDA's fused kernels are not here
        if on_gpu and name not in MIXED:
            for item in flat:
                if isinstance(item, torch.Tensor) and not isinstance(item, HostTensor) and item.dim():
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device: {name} has one on {item.device}"
                    )
        inner = [item.inner if isinstance(item, HostTensor) else item for item in flat]
        back = {id(held): item for held, item in zip(inner, flat, strict=True) if isinstance(item, torch.Tensor)}
        given, named = pytree.tree_unflatten(inner, form)
        if to is not None:
            named["device"] = torch.device("cpu")
        stays = to is None or torch.device(to).type == "cuda"

        def outer(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            if id(item) in back:
                return back[id(item)]
            return HostTensor(item) if stays else item

        if func is torch.ops.aten.addmm.dtype_out:  # CUDA's alone
            added, a, b, dtype = given
            return outer(named["out"].copy_(added + a.to(dtype) @ b.to(dtype)))
        return pytree.tree_map(outer, func(*given, **named))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return compute(func, args, kwargs or {})

    class Event:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.at = 0.0

        def record(self, *args: Any) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    import gpu_stand_in

    gpu_stand_in.pretend(lambda: 1, lambda: ("NVIDIA H100 80GB HBM3", GIB, *CAPABILITY))
    torch.cuda.Event = Event
    torch.cuda.synchronize = torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = lambda *args: None
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda *args: 3 << 30
    torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda *args: 0
    torch.cuda.mem_get_info = lambda *args: (GIB - 3 << 30, GIB << 30)
    torch.cuda.utilization = lambda *args: 50
    torch.inference_mode = torch.no_grad  # a wrapper is no inference tensor
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") copies by an operator that is seen here
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied on their way to the device
    return Mode()


def start(job: dict, rank: int) -> None:
    """A run of many_runs.py in its forked process; does not return."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    with install():
        many_runs.run(job, rank)


if __name__ == "__main__":
    ctypes.CDLL(os.environ["HOST_CUDA"])
    import many_runs

    many_runs.main(start)
