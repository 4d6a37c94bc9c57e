"""What is shown on a terminal: no text of others steers it, names are quoted, and tables fit it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, run
from stepladder.console import CONTROLS, printable, quote_for_shell

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Clears the screen, sets the title, begins a sequence by one character, goes back, reorders the line.
HOSTILE = "a\x1b[2J\x1b]0;title\x07\x9b31m\rb\x7f\u202ec"
ESCAPED = r"a\x1b[2J\x1b]0;title\x07\u009b31m\x0db\u007f\u202ec"


def on_a_terminal(words: list[Any], columns: int, **env: str) -> tuple[int, str]:
    """The exit code of a command and what a terminal of so many columns gets."""
    screen, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdin=side, stdout=side, stderr=side,
        env=clean | {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", **env},
    )  # fmt: skip
    os.close(side)
    shown = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(screen)
    return process.wait(), shown.decode().replace("\r\n", "\n")


def test_control_characters_are_escaped() -> None:
    """Guards the terminal against what a model, a row or a name holds, and JSON against other escapes than its own."""
    assert printable(HOSTILE) == ESCAPED and printable("é 🎉\ttab\nline") == "é 🎉\ttab\nline"
    text = json.dumps({"text": HOSTILE}, ensure_ascii=False)
    assert json.loads(printable(text)) == {"text": HOSTILE}


def test_commands_are_typed_as_they_stand(tmp_path: Path) -> None:
    """Guards who types a printed command: a name ran as one, or became several."""
    names = ["$(touch ran)", "a b", "it's", "new\nline\x1b[2J'\\", "`ls`", "", "plain/é", "~", os.fsdecode(b"\xff$1")]
    assert quote_for_shell("\ud83d") == r"$'\xed\xa0\xbd'"  # which no file has, and a recipe may
    line = quote_for_shell("printf", r"%s\0", *names)
    assert "\n" not in line and not CONTROLS.search(line)
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, check=True)
    assert [os.fsdecode(name) for name in done.stdout.split(b"\0")[:-1]] == names and not list(tmp_path.iterdir())


PROGRAM = """
import os, sys
from rich.table import Table
from stepladder import console, errors
from stepladder.screen import Screen
hostile = os.environ["HOSTILE"].encode().decode("unicode_escape")
def main():
    print(hostile)
    console.say(hostile)
    table = Table(hostile, title=hostile)
    table.add_row(hostile, style="bold")
    Screen(plain=100).print(table)
    console.redraw("redrawn\\n")
    from rich.progress import Progress
    with Progress(console=Screen(), redirect_stderr=False) as bar:
        bar.add_task(hostile, total=1)
        console.say("in between " + hostile)
    raise errors.DataError(hostile, why=hostile)
errors.exit_with(main)
"""


@pytest.mark.parametrize("coloured", [True, False], ids=["a terminal", "a log"])
def test_what_is_printed_steers_nothing(coloured: bool) -> None:
    """Guards every way to the terminal: print, say, tables, beside a bar, and messages; our own colours stay."""
    hostile = HOSTILE.encode("unicode_escape").decode()
    if coloured:
        _, shown = on_a_terminal(["-c", PROGRAM], 100, HOSTILE=hostile)
        assert COLOURS.search(shown) and "\rredrawn" in shown
        shown = re.sub(r"\x1b\[([0-9;]*m|\?25[lh]|[12]?[AK])|\r", "", shown)  # rich's colours, cursor and bar
    else:
        done = run(sys.executable, "-c", PROGRAM, HOSTILE=hostile)
        assert done.code == 2, done
        shown = done.out.replace("\rredrawn", "") + done.err
    assert not CONTROLS.search(shown), ascii(CONTROLS.findall(shown))
    assert shown.count(ESCAPED) >= 7 and "in between " + ESCAPED in shown, shown
    assert not re.search(r"\\x1b\[(2K|38|\?)", shown), "rich's own sequences are escaped"


def test_the_plan_fits_80_columns() -> None:
    """Guards the figures that decide: at 80 columns none was shown, and at 120 some were cut."""
    words = ["--recipe", "lora", "--gpus", 2, "--strategy", "zero3_offload", "--parts"]
    code, shown = on_a_terminal(["scripts/plan.py", *words], 80)
    lines = COLOURS.sub("", shown).splitlines()
    tables = [line for line in lines if not line.startswith(("accelerate", "sbatch"))]  # which are copied whole
    assert code == 0 and max(map(len, tables)) <= 80 and "…" not in shown, shown
    head = next(line for line in lines if "tokens/s" in line)
    assert head.split() == ["strategy", "ckpt", "batch", "peak", "fits", "host", "tokens/s", "hours"]
    assert any("activ" in line and "load" in line for line in lines), shown


def test_the_import_is_not_torn_at_80_columns(tmp_path: Path) -> None:
    """Guards the account of an Axolotl configuration: its columns were cut to pieces, keys too."""
    file = ROOT / "tests/fixtures/axolotl/seed.yml"
    for columns in (80, 200):
        words = ["scripts/import_axolotl.py", file, "-o", tmp_path / "r.yaml", "--force", "--overwrite"]
        code, shown = on_a_terminal(words, columns)
        plain = COLOURS.sub("", shown)
        assert code == 0 and "…" not in plain and "gradient_accumulation_steps" in plain, plain
        keys = [line for line in plain.splitlines() if line.startswith(("sequence_len", " sequence_len"))]
        assert len(keys) == 1 and ("translated" in keys[0]) == (columns == 200), keys
