"""Numbers on the command line: what is out of range is refused by its name before anything is loaded."""

from __future__ import annotations

import pytest

from conftest import script


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("check", ["--nodes", "0"], "--nodes: 0 is less than 1"),
        ("check", ["--gpus", "-2"], "--gpus: -2 is less than 0"),
        ("plan", ["--gpus", "0"], "--gpus: 0 is less than 1"),
        ("plan", ["--gpu_memory", "nan"], "nan is not above 0"),
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
