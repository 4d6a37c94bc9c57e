"""Numbers on the command line: what is out of range is refused by its name before anything is loaded."""

from __future__ import annotations

import argparse
import ast
import sys

import pytest

from conftest import script
from stepladder import flags
from tiny import ROOT


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("check", ["--nodes", "0"], "--nodes: 0 is less than 1"),
        ("check", ["--gpus", "-2"], "--gpus: -2 is less than 0"),
        ("plan", ["--gpus", "0"], "--gpus: 0 is less than 1"),
        ("plan", ["--gpu_memory", "nan"], "nan is not a finite number"),
        ("plan", ["--gpu_memory", "1e300"], "1e300 is beyond 3.4e+38"),
        ("submit", ["--nodes", "0"], "--nodes: 0 is less than 1"),
        ("submit", ["--ranks", "0"], "--ranks: 0 is less than 1"),
        ("plan", ["--gpus", "99999999999999999999"], "more than a computer counts"),
        ("submit", ["--gpus", "a100:-1"], "a100:-1 is neither N nor TYPE:N"),
        ("submit", ["--gpus", "1", "--mem_per_gpu", ""], "--mem_per_gpu/--mem-per-gpu: '' is no size such as 48G"),
        ("submit", ["--gpus", "1", "--mem", "48GB"], "--mem: '48GB' is no size such as 48G"),
    ],
)
def test_a_machine_of_nothing(name: str, words: list[str], said: str) -> None:
    """Guards against a division by the number of ranks, and against a job that waits for minus one GPU."""
    done = script(name, "--recipe", "lora", *words)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err, done


@pytest.mark.parametrize(
    ("name", "words"),
    [("compare", ["--base", "x", "--tuned", "y"]), ("fetch_model", []), ("merge", ["--adapter", "x"])],
)
def test_no_folder_is_not_this_folder(name: str, words: list[str]) -> None:
    """Guards against files of a comparison, or a model's, beside the sources: `--output_dir "$UNSET"`."""
    done = script(name, *words, "--output_dir", "")
    assert done.code == 2 and "argument --output_dir/--output-dir: it is empty" in done.err, done


def test_a_weight_that_fp32_lacks() -> None:
    """Guards merge.py: such a weight ended in an error of torch and a request to report it."""
    done = script("merge", "--adapter", "x", "--output_dir", "y", "--weights", "1e300")
    assert done.code == 2 and "--weights: 1e300 is beyond 3.4e+38" in done.err and "Traceback" not in done.err, done


LARGE, INT = "1e300", str(sys.maxsize + 1)
# What each kind of number refuses, and takes with its value, at the ends of its range.
ENDS: dict[str, tuple[list[str], dict[str, float]]] = {
    "count": (["0", "-1", "1.5", "nan", "inf", "1e3", "", INT, "9" * 5000], {"1": 1, str(sys.maxsize): sys.maxsize}),
    "integer": (["-1", "1.5", "nan", "inf", "", INT], {"0": 0, str(sys.maxsize): sys.maxsize}),
    "seed": (["-1", "1.5", "nan", str(2**32), INT, ""], {"0": 0, str(2**32 - 1): 2**32 - 1}),
    "finite": (["nan", "inf", "-inf", LARGE, "-1e300", "3.5e38", ""], {"0": 0, "-3.4e38": -3.4e38, "1e-300": 1e-300}),
    "above_0": (["nan", "inf", LARGE, "0", "-1", "1e-400", ""], {"3.4e38": 3.4e38, "1e-300": 1e-300}),
    "temperature": (["nan", "inf", LARGE, "-1", "1e-300", "1e-7", ""], {"0": 0, "-0": 0, "1e-6": 1e-6}),
    "seconds": (["nan", "inf", LARGE, "0", "-1", "1e10", ""], {"0.001": 0.001}),
    "fraction": (["nan", "inf", LARGE, "0", "-0.5", "1.0001", ""], {"1": 1, "1e-300": 1e-300}),
    "size": (["0GB", "-1GB", "nanGB", "1e3GB", "5", "GB", "9" * 18 + "GB", ""], {"1KB": 1000, "5GB": 5 * 10**9}),
    "memory": (["-1", "1e3", "nan", "48GB", "1.5G", ""], {}),
    "gpus": (["0", "-1", "nan", "a100:0", "1.5", ""], {}),
}  # fmt: skip


def kinds_of_flags() -> set[str]:
    """The kinds of numbers that the parsers of all scripts take, from their sources."""
    found = set()
    for file in [*(ROOT / "scripts").glob("*.py"), ROOT / "src/stepladder/model/merge/combination.py"]:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            kinds = [word.value for word in call.keywords if word.arg == "type"]
            found.update(kind.attr for kind in kinds if isinstance(kind, ast.Attribute))
            assert not any(isinstance(kind, ast.Name) and kind.id in ("int", "float") for kind in kinds), file
    return found - {"path"}


def test_each_kind_of_number_is_refused_at_its_ends() -> None:
    """Guards against a number that a computer cannot count with, and a flag whose kind has no row here."""
    assert kinds_of_flags() == ENDS.keys(), "a kind of number without a row, or a row without a flag"
    for kind, (refused, taken) in ENDS.items():
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--flag", type=getattr(flags, kind))
        for text in refused:
            with pytest.raises(argparse.ArgumentError):
                parser.parse_args([f"--flag={text}"])
        for text, value in taken.items():
            assert parser.parse_args([f"--flag={text}"]).flag == value, (kind, text)
