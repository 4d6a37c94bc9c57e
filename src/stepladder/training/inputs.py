"""The inputs that a run's curve depends on beside its recipe: recorded at its start, compared when it resumes.

A recipe names a base model, a template and evaluation rows, and their files may have other contents at the next
start. run.json holds a short hash of each of their parts as `inputs`: `{input: {part: hash}}`. (The training rows are
in its `datasets`; see `Run.begin`.)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.data import templates
from stepladder.data.rows import Rows
from stepladder.errors import LaunchError, ModelError
from stepladder.model import fingerprint
from stepladder.model.fingerprint import Parts
from stepladder.recipe.recipe import BY_METRIC, Recipe
from stepladder.run import package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL, TOKENIZER, TEMPLATE, EVALUATION = "model", "tokenizer", "chat_template", "evaluation_rows"
MODEL_KEYS = ("model_name_or_path", "model_revision")
# Keys that decide which training rows are held out for evaluation.
SPLIT_KEYS = ("dataset_name", "datasets", "dataset_test_split", "test_split_size", "seed")
ELSEWHERE = {"gguf_file", "subfolder", "variant"}  # keys of model_init_kwargs that load other files than the usual ones
SHOWN_PARTS = 3  # of an input, named in a message


class Inputs:
    """The inputs of this start, and of the run that it resumes.

    Every rank creates it; rank 0 alone reads and compares: `claim` compares what is known before torch is
    imported, `add_tokenizer` and `add_template` the rest.

    Args:
        evaluation: the rows that the run is evaluated on, if it is.
        reads: whether this is rank 0.

    Attributes:
        found: what run.json records of this start.
        notes: on differences that are not refused.

    Raises:
        ModelError: a file of the base model cannot be read.
    """

    def __init__(self, recipe: Recipe, evaluation: Rows | None, reads: bool):
        self.recipe, self.reads = recipe, reads
        self.found: dict[str, Parts] = {}
        self.notes: list[str] = []
        self._before: dict[str, Any] | None = None  # run.json of the run that is resumed
        self._allowed: set[str] = set()
        self._folder = Path()
        if not reads:
            return
        name = recipe.get("model_name_or_path")
        apart = ELSEWHERE & {*(recipe.get("model_init_kwargs") or {})}
        try:
            code = bool(recipe.get("trust_remote_code"))
            self.found[MODEL] = {} if apart else fingerprint.hash_model(name, recipe.get("model_revision"), code)
        except OSError as error:
            what, why = f"{error.filename or name} cannot be read", error.strerror or str(error)
            raise ModelError(what, why=why, where=recipe.where("model_name_or_path")) from None
        if evaluation:
            self.found[EVALUATION] = {"rows": evaluation.fingerprint()["sha256"][:16]}

    def resume(self, before: dict[str, Any], allowed: Iterable[str], folder: Path) -> None:
        """Compare weights and evaluation rows with those of the run that is resumed, and later all that is added.

        Args:
            before: its run.json.
            allowed: keys of the recipe whose inputs may differ.
            folder: the run's, for messages.

        Raises:
            LaunchError: they differ.
        """
        self._before, self._folder = before, folder
        self._allowed = {key.replace("-", "_") for key in allowed}
        recorded, now = before.get("started_with") or before.get("packages") or {}, package_versions()
        if changed := [
            f"{name} {recorded.get(name, 'none')} → {now.get(name, 'none')}"
            for name in {**recorded, **now}
            if recorded.get(name) != now.get(name)
        ]:
            self.notes.append(f"{', '.join(changed)} since the run began")
        if "inputs" not in before:
            self.notes.append(
                "run.json is of an earlier version: whether base model, tokenizer, chat template and evaluation rows "
                "are those that the run began with is not known"
            )
        self._compare(MODEL, EVALUATION)
        for name, parts in before.get("inputs", {}).items():  # what is not known of this start: evaluation is off
            if not self.found.get(name):
                self.found[name] = parts

    def add_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Call it before `templates.prepare`, which adds tokens. Raises LaunchError as `resume` does."""
        if self.reads:
            self.found[TOKENIZER] = fingerprint.hash_tokenizer(tokenizer)
            self._compare(TOKENIZER)

    def add_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Call it after `templates.prepare`. Raises LaunchError as `resume` does."""
        if self.reads:
            self.found[TEMPLATE] = {"text": fingerprint.hash_text(templates.source(tokenizer))}
            self._compare(TEMPLATE)

    def _compare(self, *names: str) -> None:
        if self._before is None:
            return
        refused: dict[str, str] = {}  # what differs, by the key that allows it
        for name in names:
            before, now = self._before.get("inputs", {}).get(name), self.found.get(name)
            if not (before and now) and "inputs" in self._before and name != EVALUATION:
                unknown = f"{name.replace('_', ' ')}: whether it is the one that the run began with is not known"
                why = "a commit on the hub that cannot be told, or model_init_kwargs with " + ", ".join(
                    sorted(ELSEWHERE)
                )
                self.notes.append(f"{unknown} ({why})" if name == MODEL else unknown)
            if not before or not now or before == now:
                continue
            keys = self._keys(name)
            what = f"{name.replace('_', ' ')} ({_with_value(self.recipe, keys[0])}): {_differences(before, now)}"
            if name == EVALUATION and (schedule := self.recipe.get("lr_scheduler_type")) in BY_METRIC:
                raise LaunchError(
                    f"the run in {self._folder} was begun with other evaluation rows",
                    where=self.recipe.where(keys[0]),
                    why=f"{what}\n{schedule} derives each rate from the evaluations so far",
                    help="put back what it began with, or another --output_dir",
                )
            if by := self._allowed.intersection(keys):
                self.notes.append(f"changed since the run began, which --allow_change {min(by)} allows: {what}")
            elif name == EVALUATION and self._meant_and_not_decisive():
                self.notes.append(f"evaluation losses from here on do not compare with those before: other {what}")
            else:
                refused[keys[0]] = f"{refused[keys[0]]}\n{what}" if keys[0] in refused else what
        if refused:
            curve = [key for key, what in refused.items() if not what.startswith("evaluation rows")]
            reason = "its curve would not go on as it began" if curve else "losses on other rows do not compare"
            raise LaunchError(
                f"the run in {self._folder} was begun with another content of {' and '.join(refused)}",
                where=self.recipe.where(next(iter(refused))),
                why="\n".join([*refused.values(), reason]),
                help="put back what it began with, or another --output_dir; or to go on with the change: "
                + " ".join(f"--allow_change {key}" for key in refused),
            )

    def _keys(self, name: str) -> list[str]:
        """The keys that decide an input, the one to name first; of those the run began with too."""
        if name in (MODEL, TOKENIZER):
            return [*MODEL_KEYS]
        if name == EVALUATION:
            if self.recipe.get("eval_dataset_name"):
                return ["eval_dataset_name"]
            return ["datasets" if self.recipe.get("datasets") else "dataset_name", *SPLIT_KEYS]
        began = (self._before or {}).get("recipe", {})
        chosen = [key for key in templates.TEMPLATE_KEYS if self.recipe.get(key)][:1]
        model = [] if chosen == ["chat_template_path"] else MODEL_KEYS
        return [*chosen, *model, *(key for key in templates.TEMPLATE_KEYS if began.get(key))]

    def _meant_and_not_decisive(self) -> bool:
        """Whether the recipe names other evaluation rows than before, and nothing follows their losses."""
        began = (self._before or {}).get("recipe", {})
        another = began.get("eval_dataset_name") != self.recipe.values.get("eval_dataset_name")
        return another and not any(map(self.recipe.get, ("load_best_model_at_end", "early_stopping_patience")))


def _with_value(recipe: Recipe, key: str) -> str:
    value = recipe.get(key)
    return f"{key} {value}" if isinstance(value, str) and len(value) <= 200 and "\n" not in value else key


def _differences(before: Parts, now: Parts) -> str:
    """`file: old → new` of the parts that differ."""
    parts = [part for part in {**before, **now} if before.get(part) != now.get(part)]
    shown = [f"{part} {before.get(part, 'none')[:8]} → {now.get(part, 'none')[:8]}" for part in parts[:SHOWN_PARTS]]
    return ", ".join(shown) + f" and {len(parts) - SHOWN_PARTS} more" * (len(parts) > SHOWN_PARTS)
