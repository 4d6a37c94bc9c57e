"""Native Windows and macOS, as far as Linux can pretend them: nothing here ran on either."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import ROOT, manifest, run
from stepladder import generators, hardware, preflight
from stepladder.errors import LaunchError, RecipeError
from stepladder.training.batches import RowLosses
from stepladder.training.launch import devices, native
from stepladder.training.launch.launcher import Launch, Strategy

SOURCES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "docs").rglob("*.py")]
# Python as Stepladder's own modules see it on Windows; libraries see Linux. What typeshed lacks for win32 is taken
# from the modules that Stepladder imports, and POSIX-only modules are not there.
WINDOWS = """
import builtins, importlib.util, pkgutil, runpy, sys, types
ABSENT = {
    "os": "fork getuid geteuid getpgid killpg setsid sched_getaffinity sched_setaffinity sysconf pread pwrite uname "
          "statvfs mkfifo posix_fadvise O_NONBLOCK O_CLOEXEC O_NOFOLLOW",
    "signal": "SIGUSR1 SIGUSR2 SIGHUP SIGKILL SIGVTALRM SIGALRM ITIMER_VIRTUAL setitimer alarm pthread_sigmask "
              "sigpending SIG_BLOCK",
    "time": "clock_gettime CLOCK_BOOTTIME", "socket": "AF_UNIX", "multiprocessing.reduction": "DupFd",
}
GONE = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"}
class Kernel32:
    SetConsoleOutputCP = staticmethod(lambda page: 1)
class Pretended(types.ModuleType):
    def __init__(self, real, absent, values=()):
        self.__dict__.update(real=real, absent=absent, values=dict(values))
    def __getattr__(self, name):
        if name in self.absent:
            raise AttributeError(f"Windows' {self.real.__name__} has no {name}")
        return self.values[name] if name in self.values else getattr(self.real, name)
    def __setattr__(self, name, value):
        setattr(self.real, name, value)
usual, known = builtins.__import__, {}
def pretend(name, real):
    if name not in known:
        values = {"sys": {"platform": "win32"}, "os": {"name": "nt", "O_BINARY": 0},
                  "ctypes": {"windll": types.SimpleNamespace(kernel32=Kernel32)}}.get(name, {})
        known[name] = Pretended(real, set(ABSENT.get(name, "").split()), values)
    return known[name]
def windows(name, globals=None, locals=None, fromlist=(), level=0):
    ours = globals and str(globals.get("__name__", "")).startswith(("stepladder", "__main__"))
    if ours and name in GONE:
        raise ModuleNotFoundError(f"Windows has no {name}")
    found = usual(name, globals, locals, fromlist, level)
    shown = {*ABSENT, "sys", "ctypes"}
    return pretend(name, found) if ours and name in shown and (fromlist or "." not in name) else found
builtins.__import__ = windows
if sys.argv[1] == "--all":
    import stepladder
    for module in pkgutil.walk_packages(stepladder.__path__, "stepladder."):
        __import__(module.name)
    print("all imported")
else:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Apple:
    """A Mac as far as PyTorch tells of it: `macos` is its version, `generator` that of its GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.macos, self.generator = 15, torch.Generator().manual_seed(3)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: self.macos >= major)
        monkeypatch.setattr(torch.mps, "get_rng_state", self.generator.get_state)
        monkeypatch.setattr(torch.mps, "set_rng_state", self.generator.set_state)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Apple:
    return Apple(monkeypatch)


class WithoutFP64(torch.Tensor):
    """A tensor as on Apple's GPU: fp64 is refused until it is copied to the host."""

    def double(self, *args: Any) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self, *args: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    file = tmp_path / "windows.py"
    file.write_text(WINDOWS, encoding="utf-8")
    return file


def words(tiny: Path, learnable: Path, folder: Path) -> list[Any]:
    keys = {
        "model_name_or_path": tiny, "dataset_name": learnable, "output_dir": folder, "max_steps": 1,
        "global_batch_size": 2, "per_device_train_batch_size": 2, "eval_strategy": "no", "warmup_steps": 0,
    }  # fmt: skip
    return ["--recipe", "lora", *(word for key, value in keys.items() for word in (f"--{key}", value))]


def test_windows_imports_checks_and_trains(windows: Path, tiny: Path, learnable: Path, tmp_path: Path) -> None:
    """Guards native Windows on one process: every module, check.py, a step and its resumption without POSIX."""
    env = {"PYTHONPATH": str(ROOT / "src")}
    done = run(sys.executable, windows, "--all", **env)
    assert done.code == 0 and "all imported" in done.out, done
    given = words(tiny, learnable, tmp_path / "run")
    done = run(sys.executable, windows, "scripts/check.py", *given, **env)
    assert done.code == 0, done
    done = run(sys.executable, windows, "scripts/sft.py", *given, **env)
    assert done.code == 0 and "✔ 1 step" in done.out, done
    further = [2 if before == "--max_steps" else word for before, word in zip(["", *given], given, strict=False)]
    done = run(sys.executable, windows, "scripts/sft.py", *further, **env)
    assert done.code == 0 and manifest(tmp_path / "run")["totals"]["steps"] == 2, done
    done = run(sys.executable, windows, "scripts/sft.py", *given, WORLD_SIZE="2", RANK="0", **env)
    assert done.code == 2 and "native Windows" in done.err and "WSL 2" in done.err, done
    assert "Traceback" not in done.err, done


def test_text_files_name_their_encoding() -> None:
    """Guards Windows, where a text file without an encoding is read and written as cp1252."""
    unnamed = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(key.arg == "encoding" for key in node.keywords):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            # Path's own: files.read_text takes the path and reads UTF-8.
            on_path = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "files"
            modes = [part.value for part in [*node.args, *(key.value for key in node.keywords)]
                     if isinstance(part, ast.Constant) and part.value in ("w", "r", "a", "x")]  # fmt: skip
            by_name = on_path and name in ("read_text", "write_text")
            if (
                by_name
                or (name in ("open", "NamedTemporaryFile") and modes)
                or "text=True" in ast.unparse(node).split("(", 1)[-1].replace(" ", "").split(",")
            ):
                unnamed.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert unnamed == []


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_types_of_other_systems(system: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards code that no test runs: mypy knows, from typeshed, which functions a system's Python lacks."""
    cache = tmp_path_factory.getbasetemp() / f"mypy-{system}"
    done = run(sys.executable, "-m", "mypy", "--platform", system, "--cache-dir", cache)
    assert done.code == 0, done.out


@pytest.mark.parametrize(
    ("system", "ranks", "strategy", "message"),
    [("win32", 2, "ddp", "native Windows"), ("win32", 2, "zero3", "native Windows"), ("darwin", 2, "zero2", "Linux")],
)
def test_several_ranks_elsewhere(
    monkeypatch: pytest.MonkeyPatch, settings: Any, system: str, ranks: int, strategy: str, message: str
) -> None:
    """Guards a launch that nothing was tried on: it is refused with what works instead."""
    monkeypatch.setattr(native, "SYSTEM", system)
    with pytest.raises(LaunchError, match=message) as error:
        native.check_system(settings(), Launch(ranks, 0, 0, ranks, Strategy(strategy)))
    assert error.value.why and error.value.help


@pytest.mark.parametrize("key", native.PROCESS_COUNTS)
def test_more_processes_on_windows(monkeypatch: pytest.MonkeyPatch, settings: Any, key: str) -> None:
    """Guards native Windows against a pickled open file, which would end in a traceback."""
    monkeypatch.setattr(native, "SYSTEM", "win32")
    with pytest.raises(RecipeError, match=key):
        native.check_system(settings(**{key: 2}), Launch(1, 0, 0, 1, Strategy("single")))


@pytest.mark.parametrize(
    "keys",
    [
        {"load_in_4bit": True}, {"fp16": True}, {"torch_compile": True}, {"optim": "paged_adamw_8bit"},
        {"optim": "ademamix"}, {"optim": "adamw_torch_8bit"},
        {"attn_implementation": "flash_attention_2"}, {"dtype": "float16"},
    ],
)  # fmt: skip
def test_mps_refuses(apple: Apple, settings: Any, keys: dict[str, Any]) -> None:
    """Guards Apple's GPUs: what has no kernels there is refused before training, with its reason."""
    with pytest.raises(RecipeError, match="MPS") as error:
        native.check_device(settings(**keys))
    assert error.value.why and error.value.help
    native.check_device(settings(optim="adamw_torch_fused", attn_implementation="auto", bf16=True))


@pytest.mark.parametrize("keys", [{"bf16": True}, {"dtype": "bfloat16"}, {"dtype": "auto"}])
def test_bf16_needs_macos_14(apple: Apple, settings: Any, keys: dict[str, Any]) -> None:
    """Guards an old macOS, where PyTorch's autocast would compute in fp32 with no more than a warning."""
    native.check_device(settings(**keys))
    apple.macos = 13
    with pytest.raises(RecipeError, match="MPS") as error:
        native.check_device(settings(**keys))
    assert "macOS 14" in error.value.why and error.value.help
    native.check_device(settings(bf16="auto", dtype="float32"))


def test_checkpoints_hold_the_generator_of_mps(apple: Apple, tmp_path: Path) -> None:
    """Guards a resumed run with dropout on Apple's GPU: its numbers go on where the checkpoint was written.

    The generator of MPS is a stand-in, one of PyTorch's for the CPU.
    """
    generators.save(tmp_path / "rng.safetensors")
    expected = [torch.rand(3, generator=apple.generator), torch.rand(3)]
    with generators.unchanged():
        torch.rand(5, generator=apple.generator)
    following = torch.rand(3, generator=apple.generator)
    generators.load(tmp_path / "rng.safetensors")
    assert torch.equal(torch.rand(3, generator=apple.generator), expected[0]) and torch.equal(
        torch.rand(3), expected[1]
    )
    assert torch.equal(torch.rand(3, generator=apple.generator), following), "unchanged() put the state back"


def test_checkpoints_of_another_gpu(apple: Apple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a run that resumes where the checkpoint's kind of GPU is not: the host's state is put back alone."""
    generators.save(tmp_path / "mps.safetensors")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    expected = torch.rand(3)
    generators.load(tmp_path / "mps.safetensors")
    assert torch.equal(torch.rand(3), expected)
    generators.save(tmp_path / "cpu.safetensors")
    monkeypatch.undo()
    generators.load(tmp_path / "cpu.safetensors")


def test_use_cpu_hides_mps(apple: Apple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards generate.py, compare.py, check.py and the checkpoint: all ask one function what is computed on."""
    assert hardware.accelerator() == "mps" and "Apple" in hardware.device_here(1, gpu=True).name
    assert devices.choose_device(Launch(1, 0, 0, 1, Strategy("single"))) is False
    assert devices.choose_device(Launch(2, 0, 0, 2, Strategy("ddp"))) is True
    assert hardware.accelerator() == "cpu" and hardware.device_here(1, gpu=False).name == "cpu"


def test_check_asks_what_training_asks(apple: Apple, settings: Any) -> None:
    """Guards check.py, which passed on a Mac what sft.py refuses there."""
    found = {line.name: line for line in preflight.checks(settings(fp16=True), preflight.Machine())}
    assert not found["strategy"].right and "MPS" in found["strategy"].message
    found = {line.name: line for line in preflight.checks(settings(fp16=True), preflight.Machine(gpus=1))}
    assert found["strategy"].right, "for another machine"


def test_losses_of_rows_without_fp64() -> None:
    """Guards eval on Apple's GPU, which has no fp64: a tensor that refuses it stands in for one there."""
    losses = RowLosses()
    outputs = SimpleNamespace(
        log_probs=WithoutFP64([[-1.0, -2.0], [-4.0, 0.0]]), label_mask=WithoutFP64([[1, 1], [1, 0]])
    )
    with pytest.raises(TypeError):
        outputs.log_probs.double()
    losses._add(torch.tensor([[0], [1]]), outputs, None)
    assert losses.found == {0: (3.0, 2), 1: (4.0, 1)}


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    """Guards what flock gave: a second process is refused at once, and a killed holder's lock is free."""
    ask = "import sys; from stepladder.files import lock_file; from pathlib import Path; "
    ask += "lock = lock_file(Path(sys.argv[1])); print('held', flush=True); import os; os._exit(0)"
    from stepladder.files import lock_file

    env = {"PYTHONPATH": str(ROOT / "src")}
    with lock_file(tmp_path / ".lock"):
        done = run(sys.executable, "-c", ask, tmp_path / ".lock", **env)
        assert done.code and "BlockingIOError" in done.err, done
    assert run(sys.executable, "-c", ask, tmp_path / ".lock", **env).out == "held\n"
    lock_file(tmp_path / ".lock").release()
    os.symlink(tmp_path / "elsewhere", tmp_path / "link")
    with pytest.raises(OSError):
        lock_file(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()
