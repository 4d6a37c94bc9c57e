"""A stage: what a recipe takes from the hub as one folder, to be copied to machines that do not reach it.

DIR/hub is a cache of the hub as huggingface_hub writes it without symbolic links, so that Transformers and `datasets`
find there what they would fetch; STEPLADDER_STAGE=DIR makes it theirs (`stepladder/__init__.py`). DIR/stage.json lists
the files of each repository once all of them are there, so that a stage that is half fetched or half copied is noticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder import console, files, installation, requirements
from stepladder.data import mixture
from stepladder.errors import LaunchError, first_line
from stepladder.model import pretrained, start
from stepladder.recipe.recipe import Recipe

VARIABLE = "STEPLADDER_STAGE"
CONTENT, HUB, WHEELS, LOCK = "stage.json", "hub", "wheels", ".lock"
EXTRAS = ("", "deepspeed", "monitoring", "dev")  # what `make install` installs
TOOLS = ("pip", "setuptools>=77", "wheel")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, as much of it as a recipe needs.

    Attributes:
        kind: `model` or `dataset`.
        patterns: of its files; None for all.
        where: the place in the recipe that names it.
    """

    kind: str
    id: str
    revision: str
    patterns: tuple[str, ...] | None
    where: str

    @property
    def label(self) -> str:
        """What stage.json calls it."""
        part = "tokenizer" if self.patterns == pretrained.SMALL_FILES else self.kind
        return f"{part} {self.id}@{self.revision}"


def list_repositories(recipe: Recipe, hub: Path) -> Iterator[Repository]:
    """What a recipe takes from the hub; what is a local file or folder is left out.

    An adapter's base is known once the adapter is in `hub`: fetch each before asking for the next.

    Raises:
        StepladderError: a local model that is not there, data at an address, a kernel of the hub.
    """
    kernel, key = str(recipe.get("attn_implementation")), start.MODEL_KEY
    if "/" in kernel:
        raise LaunchError(
            f"attn_implementation: {kernel} comes from the hub, and a stage does not hold it",
            where=recipe.where("attn_implementation"),
            help="attn_implementation: sdpa; or flash_attention_2, with the package flash-attn installed",
        )
    code = ("*.py",) if recipe.get("trust_remote_code") else ()
    weights, where = (*pretrained.SMALL_FILES, "*.safetensors", *code), recipe.where(key)
    name, revision = recipe.get(key), recipe.get("model_revision")
    for _ in range(2):  # an adapter, then its base
        start.check_source(name, where)
        folder: Path | None = Path(name)
        if not Path(name).is_dir():
            model = Repository("model", name, revision or "main", weights, where)
            yield model
            folder = _cached(hub, model, start.ADAPTER_CONFIG)
        source = start.resolve_model(str(folder)) if folder else None
        if source is None or source.adapter is None:
            break
        name, revision, where = source.base, source.revision, source.config_file
    template = recipe.get("chat_template_path")
    if template and not os.path.exists(template):
        yield Repository("model", template, "main", pretrained.SMALL_FILES, recipe.where("chat_template_path"))
    for rows in {rows.path: rows for rows in mixture.sources(recipe)}.values():
        if not rows.local and "://" in f"{rows.path} {rows.data_files}":
            raise LaunchError(
                f"{rows.label} is read from an address, and a stage holds repositories of the hub",
                where=rows.where,
                help="fetch the file, and name it by its path",
            )
        if not rows.local:
            yield Repository("dataset", rows.path, "main", None, rows.where)


def _cached(hub: Path, repository: Repository, file: str) -> Path | None:
    """The folder of a repository's files in the stage, where it has this one."""
    from huggingface_hub import try_to_load_from_cache

    kind, revision = repository.kind, repository.revision
    found = try_to_load_from_cache(repository.id, file, hub, revision, kind)
    return Path(found).parent if isinstance(found, str) else None


def check_stage(recipe: Recipe) -> str:
    """Whether the stage of STEPLADDER_STAGE holds all that the recipe takes from the hub.

    Returns:
        What it is, for a person; empty where no stage is set.

    Raises:
        LaunchError: it is no stage, or lacks a repository, or a file of one.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return ""
    folder, count = Path(name), 0
    content = read_content(folder)
    for repository in list_repositories(recipe, folder / HUB):
        count += 1
        again = f"{installation.command('stage')} --recipe {recipe.name} --to DIR"
        again += ", with the same keys, where the hub is reached"
        if repository.label not in content["repositories"]:
            raise LaunchError(f"the stage {folder} lacks {repository.label}", where=repository.where, help=again)
        if faults := _damage(folder, content["repositories"][repository.label]):
            what = f"the stage {folder} holds a part of {repository.label}: {next(iter(faults.values()))}"
            raise LaunchError(what, where=repository.where, help=again)
    return f"{count} repositories in {folder}"


def read_content(folder: Path) -> dict[str, Any]:
    """stage.json.

    Raises:
        LaunchError: the folder is no stage, or the file cannot be used.
    """
    try:
        content = files.read_object(folder / CONTENT)
        repositories = content["repositories"].values()
        paths = [(path, size) for one in (*repositories, content.get("wheels") or {"files": {}})
                 for path, size in one["files"].items()]  # fmt: skip
        within = all(not path.startswith("/") and ".." not in path.split("/") for path, _ in paths)
        whole = all(type(size) is int for _, size in paths) and all(str(one["commit"]) for one in repositories)
        if not (within and whole):
            raise TypeError
    except ValueError as error:
        filled = f"{VARIABLE}=DIR with the folder that {installation.command('stage')} --to DIR has filled"
        help = f"{filled}; or unset {VARIABLE}"
        raise LaunchError(f"{folder} is no stage: {CONTENT}: {error}", help=help) from None
    except (KeyError, TypeError, AttributeError):
        raise LaunchError(f"{folder / CONTENT} cannot be used", help="copy or fill the stage again") from None
    return content


def _damage(folder: Path, entry: dict[str, Any]) -> dict[str, str]:
    """What is wrong with the files of an entry of stage.json, by their paths."""
    faults = {}
    for path, size in entry["files"].items():
        try:
            found = (folder / path).stat().st_size
        except OSError as error:
            faults[path] = f"{path}: {error.strerror}"
            continue
        if found != size:
            faults[path] = f"{path} has {found:,} bytes instead of {size:,}"
    return faults


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[dict[str, Any]]:
    """A folder to fill, and what it lists; nobody else fills it within the block."""
    if os.environ.get(VARIABLE):
        raise LaunchError(f"{VARIABLE} is set, so the hub is not asked", help=f"unset {VARIABLE}")
    if Path.cwd() in [folder.resolve(), *folder.resolve().parents]:
        why = "git, and every copy of Stepladder's folder, would take it along"
        raise LaunchError(f"--to {folder} lies in this folder", why=why, help="a folder elsewhere")
    files.make_folder(folder)
    if any(file.name != LOCK for file in folder.iterdir()) and not (folder / CONTENT).is_file():
        raise LaunchError(f"--to {folder} holds other files than a stage's", help="an empty folder, or a new one")
    try:
        lock = files.lock_file(folder / LOCK)
    except BlockingIOError:
        raise LaunchError(f"another process fills {folder}", help="wait for its end") from None
    with lock:
        content = {"repositories": {}} if not (folder / CONTENT).is_file() else read_content(folder)
        _write(folder, content)
        yield content


def _write(folder: Path, content: dict[str, Any]) -> None:
    files.write_atomic(folder / CONTENT, json.dumps(content, indent=1) + "\n")


def fill(recipe: Recipe, folder: Path, wheels: bool) -> None:
    """Fetch what the folder lacks of a recipe's repositories, and of the wheels where asked; prints what it does.

    What it holds is kept as it is, whatever the hub has by now.

    Raises:
        LaunchError: the folder cannot be filled, or the hub refuses.
    """
    console.quiet_libraries()
    with _claim(folder) as content:
        entries = content["repositories"]
        for repository in list_repositories(recipe, folder / HUB):
            label = repository.label
            faults = _damage(folder, entries[label]) if label in entries else {}
            found = label in entries and not faults
            if not found:
                for path in faults:  # the hub's client takes a file that is there for whole
                    (folder / path).unlink(missing_ok=True)
                entries[label] = _fetch(repository, folder)
                _write(folder, content)
            size = sum(entries[label]["files"].values())
            words = f"{label} at {entries[label]['commit'][:12]}, {_in_words(size)}"
            console.say(f"✔ {words}" + " (there already)" * found)
        if wheels:
            content["wheels"] = _build_wheels(folder, content.get("wheels"))
            _write(folder, content)
        shutil.rmtree(folder / HUB / ".locks", ignore_errors=True)


def local_inputs(recipe: Recipe) -> list[str]:
    """The recipe's local files and folders: a stage does not hold them."""
    named = [recipe.get(start.MODEL_KEY), recipe.get("chat_template_path")]
    named = [name for name in named if name and os.path.exists(name)]
    return sorted({*named, *(source.label for source in mixture.sources(recipe) if source.local)})


def _fetch(repository: Repository, folder: Path) -> dict[str, Any]:
    """Fetch a repository into the stage; returns its entry in stage.json."""
    from huggingface_hub import constants, snapshot_download

    what: dict[str, Any] = {
        "repo_id": repository.id, "repo_type": repository.kind, "revision": repository.revision,
        "cache_dir": folder / HUB, "allow_patterns": repository.patterns and list(repository.patterns),
    }  # fmt: skip
    before = constants.HF_HUB_DISABLE_SYMLINKS
    constants.HF_HUB_DISABLE_SYMLINKS = True  # a copy may follow links, or lose them
    try:
        missing = sum(file.file_size for file in snapshot_download(**what, dry_run=True) if file.will_download)
        if missing > (free := shutil.disk_usage(folder).free):
            raise LaunchError(
                f"{repository.label} takes {_in_words(missing)}, and {folder} has {_in_words(free)} free",
                help="make room, or another --to",
            )
        console.say(f"  {repository.label}: {_in_words(missing)} …")
        snapshot = Path(snapshot_download(**what))
    except LaunchError:
        raise
    except Exception as error:  # the hub's client raises its own, httpx's and OSErrors
        raise _fetch_error(repository, error) from None
    finally:
        constants.HF_HUB_DISABLE_SYMLINKS = before
    found = [path for path in sorted(snapshot.rglob("*")) if path.is_file()]
    if repository.patterns and not any(path.name == "config.json" or path.suffix == ".json" for path in found):
        raise LaunchError(f"{repository.label} holds no model", where=repository.where, help="check the id")
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    return {"commit": snapshot.name, "files": sizes}


def _fetch_error(repository: Repository, error: Exception) -> LaunchError:
    """What a person reads of an error of the hub's client."""
    hides = type(error).__name__ in ("DryRunError", "LocalEntryNotFoundError")  # they say only what followed
    cause = error.__cause__ if hides and error.__cause__ else error
    name = type(cause).__name__
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{'datasets/' * (repository.kind == 'dataset')}"
    what, help = f"{repository.label} could not be fetched", "the same command again goes on where it ended"
    if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
        what, help = f"{what}: {os.strerror(error.errno)}", "make room (df -h, quota), then the same command again"
    elif name == "GatedRepoError":
        help = f"ask for access on {page}{repository.id}, then hf auth login, or export HF_TOKEN=…"
    elif name == "RepositoryNotFoundError":
        help = "check the id; for a private repository: hf auth login, or export HF_TOKEN=…"
    elif name == "RevisionNotFoundError":
        help = "model_revision: a branch, tag or commit of it"
    elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        help = "HF_HUB_OFFLINE=0, on a machine that reaches the hub"
    elif "LocalEntryNotFound" in name or "Connect" in name or "Timeout" in name:
        help = f"run it on a machine that reaches {page}"
    return LaunchError(what, where=repository.where, why=first_line(cause), help=help)


def _build_wheels(folder: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """The packages that `make install` installs as wheels in DIR/wheels; returns their entry in stage.json."""
    constraints = Path("constraints.txt")
    if not constraints.is_file():
        raise LaunchError(
            "--wheels takes the versions of constraints.txt, which is not here",
            where="command line",
            why="they are those of `make install`, which a clone has",
            help="run it in a clone of Stepladder; or pip download, for an installation by pip",
        )
    made_for = {
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "platform": sysconfig.get_platform(),
        "constraints": files.hash_file(constraints),
    }
    if before and made_for.items() <= before.items() and not _damage(folder, before):
        console.say(f"✔ {len(before['files'])} wheels (there already)")
        return before
    packages = [one for extra in EXTRAS for one in requirements.list_declared(extra)]
    wanted = sorted({str(one).partition(";")[0] for one in packages})  # without its marker, which pip would not match
    part, target = folder / f".{WHEELS}{files.PART_SUFFIX}", folder / WHEELS
    shutil.rmtree(part, ignore_errors=True)
    console.say(f"  {len(wanted)} packages and what they need, as wheels …")
    # DeepSpeed has no wheel, and its build imports torch: that of this environment.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(part), "--no-build-isolation",
               "--constraint", str(constraints), *TOOLS, *wanted]  # fmt: skip
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env={**os.environ, "DS_ACCELERATOR": "cpu"})
    if done.returncode:
        shutil.rmtree(part, ignore_errors=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise LaunchError("the wheels could not be fetched", why="\n".join(lines[-3:]), help="pip's own settings")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(target.iterdir())}
    console.say(f"✔ {len(sizes)} wheels for Python {made_for['python']} on {made_for['platform']}, "
                f"{_in_words(sum(sizes.values()))}")  # fmt: skip
    return made_for | {"files": sizes}


def _in_words(size: int) -> str:
    if size >= 2**30:
        return f"{size / 2**30:,.1f} GiB"
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"
