"""An Axolotl configuration becomes a recipe, and an account of every key in it.

`config.read` → `translate`, by the rows of `keys`, `data` and `defaults` → `Translation` → `write`
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder.errors import RecipeError, RecipeErrors, suggest
from stepladder.recipe import load
from stepladder.recipe.axolotl import data, strategy, values
from stepladder.recipe.axolotl.config import EMPTY, Config
from stepladder.recipe.axolotl.defaults import DEFAULTS
from stepladder.recipe.axolotl.keys import KEYS
from stepladder.recipe.axolotl.outcome import Outcome, Rule, dropped, left_out, sets, unsupported
from stepladder.recipe.axolotl.translation import Row, Translation

SECRET = re.compile(r"api_key|secret|password|(hf|hub)_token")


def translate(config: Config) -> Translation:
    """Account for every key of the configuration.

    Raises:
        RecipeError: a number or a list is needed for arithmetic, and is not one.
    """
    result = Translation(config.file)
    for key, value in config.values.items():
        for row in _account(key, value, _name(key), config):
            result.take(row)
    for row in _not_set(config):
        result.take(row)
    result.finish()
    return result


def _not_set(config: Config) -> Iterator[Row]:
    """What Axolotl would do by default, where that is not what happens here."""
    for key, default, note in DEFAULTS:
        if not config.has(key) and (recipe := default(config)):
            why = f"Axolotl's default; {note}".rstrip("; ")
            yield Row(f"({key})", None, sets(why, **recipe), str(config.file))
    if config.has("fsdp_config") and not config.has("fsdp"):
        yield Row("(fsdp)", None, strategy.fsdp(None, config), str(config.file))
    if values.keeps_best(config) and config.get("load_best_model_at_end") is None:
        outcome = left_out("Axolotl ends with the best checkpoint, here with the last: load_best_model_at_end: true")
        yield Row("(load_best_model_at_end)", None, outcome, str(config.file))
    if not config.has("excess_length_strategy"):
        pieces = any(entry.get("type") == "completion" for entry in config.entries("datasets"))
        text = " and cuts longer texts of type completion into pieces" if pieces else ""
        outcome = left_out(f"Axolotl takes out rows that are longer than sequence_len{text}; here they are cut")
        yield Row("(excess_length_strategy)", None, outcome, str(config.file))


def _name(key: str) -> str:
    """A key as the tables have it: a dot in it leads nowhere."""
    return re.sub(r"[.\[\]*]", " ", key)


def _account(path: str, value: Any, name: str, config: Config) -> Iterator[Row]:
    """The row of one key, or those of the keys in its block; `name` is the path without list positions."""
    inside = f"{name}[]"
    if isinstance(value, dict) and value and _leads_on(f"{name}."):
        block = {str(key): item for key, item in value.items()}
        below = Config(block, config.places, config.file, config.root, f"{path}.")
        for key, item in block.items():
            plain = key.removeprefix("fsdp_") if name == "fsdp_config" else key
            yield from _account(f"{path}.{key}", item, f"{name}.{_name(plain)}", below)
    elif value and _leads_on(inside):
        items = config.entries(name) if _leads_on(f"{inside}.") else value if isinstance(value, list) else [value]
        for number, item in enumerate(items):
            yield from _account(f"{path}[{number}]", item, inside, config)
    else:
        shown = "…" if SECRET.search(name) else value
        yield Row(path, shown, _outcome(path, value, name, config), config.places.get(path, str(config.file)))


def _leads_on(start: str) -> bool:
    return any(known.startswith(start) for known in KEYS)


def _outcome(path: str, value: Any, name: str, config: Config) -> Outcome:
    rule = _rule(name)
    if rule is None:
        if _leads_on(f"{name}.") or _leads_on(f"{name}["):
            return unsupported("it takes a block of keys") if value else dropped("empty")
        start, _, last = name.rpartition(".")
        beside = (known for known in KEYS if known.rpartition(".")[0] == start and not known.endswith("*"))
        near = suggest(last, (known.rpartition(".")[2] for known in beside))
        return unsupported(f"no key that is known here; {near or 'a slip?'}")
    if value in EMPTY:
        return dropped("empty")
    if re.match(r"test_datasets\[[1-9]", path):
        return left_out("a recipe evaluates on one set: the first")
    outcome = rule(value, config)
    if name.startswith("test_datasets"):
        return data.for_evaluation(path.rpartition(".")[2], value, config, outcome)
    return outcome


def _rule(name: str) -> Rule | None:
    if name in KEYS:
        return KEYS[name]
    families = [known for known in KEYS if known.endswith("*") and name.startswith(known[:-1])]
    return KEYS[max(families, key=len)] if families else None


def check_output(config: Path, output: Path, overwrite: bool) -> None:
    """Refuse to write over the configuration, or over a file that `overwrite` does not give up."""
    if output.is_dir():
        raise RecipeError(f"{output} is a folder", where=load.COMMAND_LINE, help=f"-o {output / 'recipe.yaml'}")
    if output.exists() and config.exists() and output.samefile(config):
        raise RecipeError(f"{output} is the configuration itself", where=load.COMMAND_LINE, help="another -o")
    if output.exists() and not overwrite:
        raise RecipeError(f"{output} exists", where=load.COMMAND_LINE, help="another -o, or --overwrite")


def write(translation: Translation, output: Path) -> None:
    """Write the recipe, once it is proved to load; else leave nothing.

    Raises:
        RecipeError: it cannot be written, or does not load.
    """
    draft = output.with_name(f".{output.name}.draft")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(translation.to_yaml(str(output)), encoding="utf-8")
        load.load(str(draft), [])
        draft.replace(output)
    except OSError as error:
        raise RecipeError(f"{output} cannot be written: {error.strerror}", where=load.COMMAND_LINE) from None
    except RecipeError as error:
        faults = getattr(error, "errors", [error])
        source = str(translation.source)
        raise RecipeErrors([RecipeError(f.what, where=source, why=f.why, help=f.help) for f in faults]) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
