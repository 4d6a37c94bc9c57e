"""Translate keys that TRL, Transformers, alignment-handbook and open-r1 once had, so that older recipes load.

legacy.yaml lists the keys that need no arithmetic: renamed ones, and ones without a successor. Each translation adds a
note to the recipe; a key whose feature is gone is an error that says so.
"""

from __future__ import annotations

import functools
from typing import Any

import yaml

from stepladder import files
from stepladder.errors import RecipeError
from stepladder.recipe.convert import Pairs, Source, construct, mapping, unknown_key


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """The sections of legacy.yaml."""
    return files.read_table("recipe/legacy.yaml")


def is_one_of(value: Any, values: list[Any]) -> bool:
    """Whether a value of the same type is among them: false is not 0."""
    return any(value == item and type(value) is type(item) for item in values)


def translate(pairs: Pairs, source: Source, errors: list[RecipeError]) -> Pairs:
    """The keys of one file (or one flag) in today's words; a key that is not old comes back as it is."""
    translation = _Translation(pairs, source, errors)
    for name, (_, value) in pairs.items():
        translation.add(name, value)
    translation.rename_values()
    return translation.result


# Old keys that need more than a row of legacy.yaml; `_Translation` has a method for each.
COMPUTED_KEYS = ("warmup_ratio", "gradient_checkpointing_use_reentrant", "tokenizer_name_or_path", "dataset_kwargs",
        "dataset_mixture", "dataset_mixer", "dataset_splits", "dataset_configs")  # fmt: skip


class _Translation:
    """`result` holds today's keys with the nodes that they came from."""

    def __init__(self, pairs: Pairs, source: Source, errors: list[RecipeError]):
        self.pairs, self.source, self.errors = pairs, source, errors
        self.result: Pairs = {}

    def add(self, name: str, value: yaml.Node) -> None:
        if name in COMPUTED_KEYS:
            getattr(self, name)(name, value)
        elif name in table()["removed"]:
            self._leave_out(name, **table()["removed"][name])
        elif name in table()["switches"]:
            ((new, setting),) = table()["switches"][name].items()
            self._switch(name, new, setting)
        elif new := table()["renamed"].get(name):
            self._set(new, value, old=name)
            self._note(name, f"{name} is called {new} today")
        else:
            self.result[name] = self.pairs[name]

    def rename_values(self) -> None:
        for name, values in table()["renamed_values"].items():
            key, value = self.result.get(name, (None, None))
            if key and value and (new := values.get(old := str(_plain(value)))):
                self.result[name] = (key, _node(new, value))
                self.source.notes.append(f"{self.source.where(value)}: {name}: {old} is called {new} today")

    def _set(self, new: str, value: yaml.Node, old: str) -> None:
        """Set today's key, at the place of the old one."""
        if new in self.pairs or new in self.result:
            self._error(old, f"{old} and {new} are both set", why=f"{old} is an old name for it", help=f"keep {new}")
        else:
            self.result[new] = (self.pairs[old][0], value)

    def _leave_out(self, name: str, why: str, harmless: list[Any] | None = None, help: str = "remove it") -> None:
        value = self._value(name)
        if harmless is None or is_one_of(value, harmless):
            self._note(name, f"{name} is left out: {why}")
        else:
            self._error(name, f"{name}: {value} is not possible any more", why=why, help=help)

    def _switch(self, name: str, new: str, setting: str) -> None:
        if self._value(name) is True:
            self._set(new, _node(setting, self.pairs[name][1]), old=name)
            self._note(name, f"{name}: true is written {new}: {setting} today")
        elif self._value(name) is False:
            self._note(name, f"{name} is left out: {new} says it today")
        else:
            self._error(name, f"{name} takes true or false", why=f"it is an old name for {new}: {setting}")

    def _value(self, name: str) -> Any:
        return _plain(self.pairs[name][1]) if name in self.pairs else None

    def _note(self, name: str, text: str) -> None:
        self.source.notes.append(f"{self.source.where(self.pairs[name][0])}: {text}")

    def _error(self, name: str, what: str, why: str = "", help: str = "") -> None:
        where = self.source.where(self.pairs[name][0])
        self.errors.append(RecipeError(what, where=where, why=why, help=help))

    def warmup_ratio(self, name: str, value: yaml.Node) -> None:
        ratio = self._value(name)
        if isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and ratio >= 1:
            help = "warmup_steps takes a share or a count"
            return self._error(name, f"{name} is {ratio}; it must be below 1", help=help)
        self._set("warmup_steps", value, old=name)
        self._note(name, "warmup_ratio is called warmup_steps today, which takes a share below 1 as well as a count")

    def gradient_checkpointing_use_reentrant(self, name: str, value: yaml.Node) -> None:
        self._set("gradient_checkpointing_kwargs", _node({"use_reentrant": self._value(name)}, value), old=name)
        self._note(name, f"{name} is called use_reentrant today, in the block gradient_checkpointing_kwargs")

    def tokenizer_name_or_path(self, name: str, value: yaml.Node) -> None:
        if self._value(name) in (None, self._value("model_name_or_path")):
            return self._note(name, f"{name} is left out: the tokenizer is taken from the model")
        self._error(
            name,
            f"{name} names another tokenizer than the model's",
            why="the tokenizer is taken from the model, so that the two cannot differ",
            help="remove it; chat_template sets a template",
        )

    def dataset_kwargs(self, name: str, value: yaml.Node) -> None:
        """TRL once added special tokens, and a token between packed rows; both are off here, as in the handbook."""
        off = {"add_special_tokens", "append_concat_token"}
        pairs = value.value if isinstance(value, yaml.MappingNode) else []
        kept = [(k, v) for k, v in pairs if str(k.value) not in off or _plain(v) is not False]
        if len(kept) < len(pairs):
            names = ", ".join(sorted(off))
            self._note(name, f"{names} are left out of {name}: nothing is added to what the template renders")
            value = _node(dict(kept), value)
        if kept or not pairs:
            self.result[name] = (self.pairs[name][0], value)

    def dataset_mixture(self, name: str, value: yaml.Node) -> None:
        """alignment-handbook and open-r1: a block of `datasets`, `seed` and `test_split_size`."""
        for inner, (key, node) in mapping(value, self.source.file, self.errors).items():
            where = self.source.where(key)
            if inner in ("datasets", "test_split_size"):
                self._set(inner, _mixture_entries(node) if inner == "datasets" else node, old=name)
            elif inner == "seed":
                seed = f"{where}: {name}: seed is left out: the recipe's own seed decides which rows are drawn"
                self.source.notes.append(seed)
            else:
                self.errors.append(unknown_key(inner, ["datasets", "seed", "test_split_size"], where, block=name))
        renamed = "id is path, config is name, and weight (of a set's own rows) is rows"
        self._note(name, f"{name} is called datasets today; {renamed}")

    def dataset_mixer(self, name: str, value: yaml.Node) -> None:
        """The older handbook: `{id: share}`, with `dataset_splits` and `dataset_configs` beside it."""
        sets, splits = self._value(name), self._value("dataset_splits") or ["train", "test"]
        configs = self._value("dataset_configs") or ([None] * len(sets) if isinstance(sets, dict) else [])
        lists = isinstance(splits, list) and isinstance(configs, list)
        if not isinstance(sets, dict) or not lists or len(configs) != len(sets):
            help = "datasets:\n  - path: …"
            return self._error(name, f"{name} takes {{id: share}}, and as many dataset_configs", help=help)
        train = [split for split in splits if "test" not in str(split)]
        entries = [
            {"path": path, "name": config, "split": split, "rows": None if share == 1 else share}
            for (path, share), config in zip(sets.items(), configs, strict=True)
            for split in train
        ]
        written = [{k: v for k, v in entry.items() if v is not None} for entry in entries]
        self._set("datasets", _node(written, value), old=name)
        self._note(name, f"{name} is called datasets today, and the share of a set that is taken is its rows")
        evaluates = self._value("eval_strategy") or self._value("evaluation_strategy")
        if evaluates in ("steps", "epoch") and len(train) < len(splits) and sets:
            first, test = next(iter(sets)), next(split for split in splits if split not in train)
            self._set("eval_dataset_name", _node(first, value), old=name)
            self._set("dataset_test_split", _node(test, value), old=name)
            if len(sets) > 1:
                self._note(name, f"evaluated is the test split of the first data set alone, {first}")

    def dataset_splits(self, name: str, value: yaml.Node, help: str = "") -> None:
        if "dataset_mixer" not in self.pairs:  # else read with it
            help = help or "dataset_train_split and dataset_test_split"
            self._error(name, f"{name} is not possible any more", why="it belongs to dataset_mixer", help=help)

    def dataset_configs(self, name: str, value: yaml.Node) -> None:
        configs = self._value(name)
        alone = "dataset_mixer" not in self.pairs and "dataset_name" in self.pairs
        if alone and isinstance(configs, list) and len(configs) == 1:
            self._set("dataset_config", _node(configs[0], value), old=name)
            return self._note(name, "dataset_configs is called dataset_config today")
        self.dataset_splits(name, value, help="dataset_config: …")


def _mixture_entries(node: yaml.Node) -> yaml.Node:
    """The data sets of a `dataset_mixture` under today's names; a weight of 1 is the whole set: no `rows`."""
    names = {"id": "path", "config": "name", "weight": "rows"}
    if not isinstance(node, yaml.SequenceNode):
        return node
    entries: list[yaml.Node] = []
    for entry in node.value:
        kept = []
        for key, value in entry.value if isinstance(entry, yaml.MappingNode) else []:
            if not isinstance(key, yaml.ScalarNode):
                kept.append((key, value))
            elif key.value != "weight" or (share := _plain(value)) not in (1, None) or share is True:
                renamed = names.get(key.value, key.value)
                kept.append((yaml.ScalarNode(key.tag, renamed, key.start_mark, key.end_mark), value))
        entries.append(_node(dict(kept), entry) if isinstance(entry, yaml.MappingNode) else entry)
    return _node(entries, node)


def _plain(node: yaml.Node) -> Any:
    """The value of a node as Python has it; None if its tag does not fit it."""
    try:
        return construct(node)
    except ValueError:
        return None


def _node(value: Any, at: yaml.Node) -> yaml.Node:
    """A value as a YAML node that stands where `at` does; nodes in it stay as they are."""
    if isinstance(value, yaml.Node):
        return value
    if isinstance(value, dict):
        pairs = [(_node(key, at), _node(item, at)) for key, item in value.items()]
        return yaml.MappingNode("tag:yaml.org,2002:map", pairs, at.start_mark, at.end_mark)
    if isinstance(value, list):
        items = [_node(item, at) for item in value]
        return yaml.SequenceNode("tag:yaml.org,2002:seq", items, at.start_mark, at.end_mark)
    node = yaml.representer.SafeRepresenter().represent_data(value)
    return yaml.ScalarNode(node.tag, node.value, at.start_mark, at.end_mark, style="'")
