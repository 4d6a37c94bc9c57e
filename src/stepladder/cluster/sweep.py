"""A grid of runs: every combination of the values in a YAML file, one run folder each.

# slurm/sweeps/lora_rank.yaml
recipe: lora
strategy: ddp          # optional
max_steps: 60          # any key, the same for all
grid:
  lora_r: [8, 16, 32, 64]

python -m stepladder.cluster.sweep slurm/sweeps/lora_rank.yaml 0
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import yaml

from stepladder import console, errors, files


def elements(file: Path) -> list[list[str]]:
    """The arguments of each run of a sweep, in the order of the array's elements.

    Raises:
        RecipeError: the file is no sweep.
    """
    try:
        sweep = files.parse_yaml(files.read_text(file, files.YAML_BYTES))
    except ValueError as error:
        raise errors.RecipeError(f"not a sweep: {error}", where=str(file)) from None
    grid = sweep.get("grid") if isinstance(sweep, dict) else None
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise errors.RecipeError(
            "a sweep has a recipe and a grid: a list of values for each key that varies",
            where=str(file),
            help="recipe: lora\ngrid:\n  lora_r: [8, 16, 32, 64]",
        )
    if not isinstance(sweep.get("recipe"), str):
        raise errors.RecipeError("a sweep names its recipe", where=str(file), help="recipe: lora")
    if twice := set(grid) & set(sweep):
        raise errors.RecipeError(f"{', '.join(sorted(twice))} is in the grid and beside it", where=str(file))
    same = {key: value for key, value in sweep.items() if key not in ("grid", "output_dir")}
    root = Path(sweep.get("output_dir") or f"runs/{file.stem}")
    found = []
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={_text(value)}".replace("/", "_") for key, value in varied.items())
        keys = {**same, **varied, "output_dir": root / name}
        found.append([word for key, value in keys.items() for word in (f"--{key}", _text(value))])
    return found


def folders(file: Path) -> list[str]:
    """The run folder of each element."""
    return [words[words.index("--output_dir") + 1] for words in elements(file)]


def _text(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def main() -> None:
    match sys.argv[1:]:
        case [file, number] if number.isdecimal():
            found = elements(Path(file))
            if int(number) >= len(found):
                raise errors.RecipeError(f"element {number} of a sweep of {len(found)}", where=file,
                                         help=f"sbatch --array=0-{len(found) - 1} …")  # fmt: skip
            # for sweep.sbatch; a value may hold any sign but NUL
            console.write_exactly("".join(f"{word}\0" for word in found[int(number)]))
        case _:
            raise errors.RecipeError("sweep: FILE and the element's number", help=(__doc__ or "").split("\n")[-2])


if __name__ == "__main__":
    errors.exit_with(main)
