"""Properties of every recipe, tried on many: no slip of the finger survives, every valid recipe does."""

from __future__ import annotations

import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from stepladder.errors import RecipeError, RecipeErrors
from stepladder.recipe import convert, legacy_keys, load, rules
from stepladder.recipe.rule_engine import RuleBreak
from stepladder.recipe.schema import Key, known_keys

RECIPES = ROOT / "recipes"
SHIPPED = {
    path.relative_to(RECIPES): path.read_text(encoding="utf-8").splitlines() for path in sorted(RECIPES.rglob("*.yaml"))
}
# Each key of each shipped recipe, with its line.
PLACES = [
    (path, number, key)
    for path, lines in SHIPPED.items()
    for number, line in enumerate(lines)
    if (key := line.split(":")[0]) in known_keys()
]
LETTERS = string.ascii_letters + string.digits + "_-."
OLD_NAMES = {*legacy_keys.COMPUTED_KEYS}.union(
    *(legacy_keys.table()[kind] for kind in ("renamed", "switches", "removed"))
)


@st.composite
def slips(draw: st.DrawFn, word: str) -> str:
    """The word with one letter inserted, left out, replaced, or swapped with its neighbour."""
    kind = draw(st.sampled_from(("insert", "delete", "replace", "swap")))
    at = draw(st.integers(0, len(word) - (kind == "swap") - (kind != "insert")))
    letter = draw(st.sampled_from(LETTERS))
    return {
        "insert": word[:at] + letter + word[at:],
        "delete": word[:at] + word[at + 1 :],
        "replace": word[:at] + letter + word[at + 1 :],
        "swap": word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
    }[kind]


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipes in a folder of their own, where a recipe with a slip finds its parent too."""
    return Path(shutil.copytree(RECIPES, tmp_path_factory.mktemp("shipped") / "recipes"))


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_a_slip_in_any_key_of_any_shipped_recipe_is_caught(copied: Path, data: st.DataObject) -> None:
    """Guards the purpose of strictness: one wrong letter is one error, at its line, with the right key named."""
    path, number, key = data.draw(st.sampled_from(PLACES))
    slip = data.draw(slips(key))
    assume(slip not in known_keys() and slip.replace("-", "_") not in OLD_NAMES)
    lines = list(SHIPPED[path])
    lines[number] = slip + lines[number][len(key) :]
    changed = (copied / path).with_name("slip.yaml")
    changed.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(RecipeErrors) as caught:
        load.load(str(changed), [])
    (error,) = caught.value.errors
    assert error.what == f"unknown key '{slip}'" and error.where == f"{changed}:{number + 1}:1"
    assert f"'{key}'" in error.help


WHOLE = st.one_of(st.integers(-1, 5000), st.sampled_from((-1, 0, 1, 2, 10**6)))
# A NUL, and half of a surrogate pair, which no file name can hold: they are refused.
WITHOUT_NUL = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
NUMBERS = st.one_of(WHOLE, st.floats(0, 1), st.floats(1e-12, 1e12), st.sampled_from((1e-4, 0.5, 1e16)))


def value_of(key: Key, above: str = "") -> st.SearchStrategy[Any]:
    """Any value that a key may have, of each of its types."""
    name = f"{above}{key.name}"
    if key.nested:
        known = {nested.name: value_of(nested, f"{name}.") for nested in key.nested if nested.name not in rules.OWN_KEY}
        needed = {nested.name: known.pop(nested.name) for nested in key.nested if nested.required}
        block = st.fixed_dictionaries(needed, optional=known)
        return st.lists(block, max_size=3) if "list" in key.types else block
    text = st.sampled_from(key.choices) if key.choices else st.text(WITHOUT_NUL, min_size=1, max_size=20)
    inside = (lambda x: convert.HOLDS[convert.RANGES[name]](x)) if name in convert.RANGES else (lambda x: True)
    element = st.booleans() if key.items == ("bool",) else WHOLE.filter(inside) if "int" in key.items else text
    by_type = {
        "bool": st.booleans(),
        "dict": st.dictionaries(st.text(WITHOUT_NUL, max_size=10), element, max_size=3),
        "float": NUMBERS.filter(inside).map(float),
        "int": WHOLE.filter(inside),
        "list": st.lists(element, max_size=3),
        "none": st.none(),
        "str": text,
    }
    return st.one_of(*(by_type[kind] for kind in key.types if kind in by_type))


VALUES = {
    key.name: value_of(key) for key in known_keys().values() if key.name not in rules.REFUSED and key.name != "extends"
}


def loaded(path: Path, values: dict[str, Any]) -> load.Recipe:
    """The recipe of these values; those that the rules refuse together are taken out."""
    while True:
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        try:
            return load.load(str(path), [])
        except RecipeErrors as caught:
            assert all(isinstance(error, RuleBreak) for error in caught.errors), caught.render()
            for key in caught.errors[0].keys:
                values.pop(key.split(".")[0], None)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(chosen=st.lists(st.sampled_from(sorted(VALUES)), unique=True, min_size=1, max_size=15), data=st.data())
def test_a_valid_recipe_survives_its_own_resolution(chosen: list[str], data: st.DataObject, tmp_path_factory) -> None:
    """Guards the promise that the run folder's recipe.yaml is the same run: values, types and hash, no note."""
    folder = tmp_path_factory.getbasetemp()
    first = loaded(folder / "first.yaml", {name: data.draw(VALUES[name], label=name) for name in chosen})
    (folder / "resolved.yaml").write_text(first.to_yaml(), encoding="utf-8")
    again = load.load(str(folder / "resolved.yaml"), [])
    assert repr(again.values) == repr(first.values)
    assert again.hash() == first.hash() and again.notes == []
    assert again.to_yaml() == first.to_yaml()


FRAGMENTS = [
    *(
        "{",
        "}",
        "[",
        "]",
        ": ",
        "- ",
        "\n",
        "\t",
        "&a ",
        "*a",
        "<<: ",
        '"',
        "'",
        " #",
        "|",
        ">",
        "%",
        "@",
        "---\n",
        "? ",
    ),
    *("null", "~", "1e999", ".nan", "0x1f", "010", "1:30", "2024-01-01", "no", "é", "🙂", "\u2028", "\x07"),
    *("!!bool x", "!!int x", "!!set {a}", "!!omap [a: 1]", "!!binary x", "!!python/name:os.system"),
    *("datasets: x\n", "dataset_mixer: x\n", "dataset_mixture: [x]\n", "dataset_kwargs: [x]\n", "extends: [x]\n"),
    *(
        "lr_scheduler_kwargs: x\n",
        "accelerator_config: x\n",
        "report_to: {a: b}\n",
        "optim: [x]\n",
        "warmup_ratio: [x]\n",
    ),
]
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent / "fixtures/recipes").iterdir())]


@settings(max_examples=300, deadline=None)
@given(
    text=st.sampled_from(TEXTS),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.sampled_from(FRAGMENTS)), min_size=1, max_size=6),
    flags=st.lists(
        st.sampled_from(("--", "--=", "--seed=", "--optim", "-1", "{", "[{", "--dataset_mixer", "🙂")), max_size=3
    ),
)
def test_whatever_a_file_holds_the_answer_is_a_message(
    text: str, changes: list[tuple[float, int, str]], flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Guards against a traceback: a damaged recipe loads, or is refused with a place and words that are not empty."""
    for place, left_out, fragment in changes:
        at = int(place * len(text))
        text = text[:at] + fragment + text[at + left_out :]
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load.load(str(path), flags)
    except RecipeError as caught:
        for error in getattr(caught, "errors", [caught]):
            assert error.what and (error.where.startswith((str(path), load.COMMAND_LINE)))
