"""Run sft.py several times in one process, or in each rank of one launch: importing takes longer than a tiny run.

    accelerate launch … tests/in_turn.py COMMANDS.json

The file holds a list. A list of words in it is a command line of sft.py; `{"cut": [FROM, TO, STEP]}` copies a run
to what a kill after its checkpoint STEP would have left; `{"copy": [FROM, TO]}` copies a file over another one;
`{"env": {NAME: VALUE}}` sets variables for what follows, or removes them where VALUE is null. The exit codes are
written to COMMANDS.json.codes.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

FIRST = os.environ.get("RANK", "0") == "0"


def cut(source: str, target: str, step: int) -> None:
    """Later checkpoints are not there yet, later metrics are, and a last line is half written."""
    folder = Path(target)
    shutil.copytree(source, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(manifest | {"status": "running"}))
    with (folder / "metrics.jsonl").open("a") as out:
        out.write('{"step": 99, "lo')


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    import sft
    from accelerate.state import AcceleratorState

    from stepladder import errors
    from stepladder.training.guard import signals

    file = Path(sys.argv[1])
    codes: list[int] = []
    for command in json.loads(file.read_text()):
        if isinstance(command, dict):
            for name, value in command.get("env", {}).items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            if FIRST and "cut" in command:
                cut(*command["cut"])
            if FIRST and "copy" in command:
                shutil.copyfile(*command["copy"])
            continue
        sys.argv = ["sft.py", *map(str, command)]
        signals.asked = None  # a process of its own would not have heard of it
        print("$", *sys.argv, flush=True)
        try:
            codes.append(sft.main() or 0)
        except errors.StepladderError as error:
            print(error.render(), flush=True)
            codes.append(error.exit_code)
        except Exception:
            traceback.print_exc()
            codes.append(errors.EXIT_FAILED)
        AcceleratorState._reset_state()
        gc.collect()  # the lock of the run folder ends with its process
    if FIRST:
        file.with_name(f"{file.name}.codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
