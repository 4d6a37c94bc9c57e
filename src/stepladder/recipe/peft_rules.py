"""The rules for `peft_kwargs`: fields of PEFT's configuration that the recipe has no key for.

The docstring of a rule's function is the reason that a person reads, unless peft.yaml has one for the field.
"""

from __future__ import annotations

import re
from typing import Any

from stepladder import files
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.rule_engine import Check, RuleBreak, conflict, idle
from stepladder.recipe.schema import Key, known_keys
from stepladder.suggest import suggest

KEY = "peft_kwargs"
TABLE = files.read_table("recipe/peft.yaml")
# Initializations that draw or compute the adapter's first weights and leave the base's as they are.
INITIALIZATIONS = ("true", "gaussian", "orthogonal")
ON_PLAIN_WEIGHTS = ("orthogonal",)  # PEFT computes them in the base's dtype, which is none where it is quantized
CHECKS: dict[str, Check] = {}


def register(check: Check) -> Check:
    CHECKS[check.__name__] = check
    return check


def _fields(recipe: Recipe) -> dict[str, Any]:
    return (recipe.get(KEY) or {}) if recipe.get("use_peft") else {}


def _keys() -> dict[str, Key]:
    return {key.name: key for key in known_keys()[KEY].nested}


def _conflict(recipe: Recipe, field: str, what: str, help: str, why: str = "") -> RuleBreak:
    found = conflict(recipe, f"{KEY}.{field} {what}", [KEY], help, at=f"{KEY}.{field.rstrip(':')}")
    found.why = why  # in place of the docstring
    return found


@register
def peft_kwargs_belong_to_the_method(recipe: Recipe) -> RuleBreak | None:
    """PEFT's configuration of this method has no such field."""
    method, fields, keys = recipe.get("peft_type"), _fields(recipe), _keys()
    wrong = [name for name in fields if method not in keys[name].owner.split()]
    if not wrong:
        return None
    if len(wrong) == len(fields) and not idle(recipe, "peft_type", [KEY]):
        return None  # the method was overridden, and the whole block is left out
    taken = ", ".join(TABLE["offered"].get(method, ())) or "none"
    help = f"{wrong[0]} belongs to {' and '.join(keys[wrong[0]].owner.split())}; {method} takes {taken}"
    return _conflict(recipe, wrong[0], f"has no effect with peft_type: {method}", help)


@register
def peft_kwargs_repeat_no_key(recipe: Recipe) -> RuleBreak | None:
    """A setting that the recipe has a key for is set by that key only."""
    own = TABLE["own"].get(recipe.get("peft_type"), {})
    for name in (name for name in _fields(recipe) if name in own):
        return _conflict(recipe, name, "cannot be used", f"{own[name]}: …")
    return None


@register
def peft_kwargs_are_offered(recipe: Recipe) -> RuleBreak | None:
    """Every method that is accepted keeps its curve on every strategy, resumes and merges."""
    method, keys = recipe.get("peft_type"), _keys()
    known = {*TABLE["own"].get(method, ()), *TABLE["offered"].get(method, ())}
    for name, value in _fields(recipe).items():
        taken = method in keys[name].owner.split()
        if taken and name not in known and value not in (keys[name].default, None):
            why = TABLE["why"].get(name, TABLE["otherwise"])
            return _conflict(recipe, name, "cannot be used", f"remove it; {method} takes {_offered(method)}", why)
    return None


def _offered(method: str) -> str:
    return ", ".join(TABLE["offered"][method])


@register
def initializations_are_offered(recipe: Recipe) -> RuleBreak | None:
    """PEFT draws or computes the adapter's first weights in one of its own ways."""
    field = "init_lora_weights"
    value = _fields(recipe).get(field)
    if value is None:
        return None
    name = str(value).lower() if isinstance(value, bool) else str(value)
    allowed = f"one of {', '.join(INITIALIZATIONS)}"
    if name not in INITIALIZATIONS:
        why = next((why for start, why in TABLE["initializations"].items() if name.startswith(start)), "")
        what = f"{name} cannot be used" if why else f"{name} is not an allowed value"
        help = allowed if why else suggest(name, INITIALIZATIONS) or allowed
        return _conflict(recipe, f"{field}:", what, help, why or f"allowed: {', '.join(INITIALIZATIONS)}")
    quantized = next((key for key in ("load_in_4bit", "load_in_8bit") if recipe.get(key)), "")
    if name in ON_PLAIN_WEIGHTS and quantized:
        why = "PEFT makes the matrices in the dtype of the base's weights, which quantized ones do not have"
        return _conflict(recipe, f"{field}:", f"{name} with {quantized}: true", "init_lora_weights: true", why)
    ranks = [recipe.get("lora_r"), *(_fields(recipe).get("rank_pattern") or {}).values()]
    if name == "orthogonal" and (odd := [r for r in ranks if isinstance(r, int) and r % 2]):
        why = "it splits an orthogonal matrix of that rank into two halves, for A and for B"
        return _conflict(recipe, f"{field}:", f"{name} with the odd rank {odd[0]}", "an even lora_r", why)
    return None


@register
def patterns_of_modules_are_patterns(recipe: Recipe) -> RuleBreak | None:
    """PEFT looks for the ends of module names, or for regular expressions over them."""
    fields = _fields(recipe)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (fields.get(field) or {}).items():
            if fault := _fault_of_pattern(pattern):
                return _conflict(recipe, field, f"'{pattern}' is no regular expression: {fault}", "a module's name")
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < 1:
                return _conflict(recipe, f"{field}.{pattern}", f"is {value}; it must be 1 or more", "a whole number")
    for field in ("exclude_modules", "target_modules", "feedforward_modules"):
        value = fields.get(field)
        if isinstance(value, str) and (fault := _fault_of_pattern(value)):
            return _conflict(recipe, field, f"'{value}' is no regular expression: {fault}", "a list of names")
        if value is not None and not value:
            return _conflict(recipe, field, "names nothing", "remove it")
    return None


def _fault_of_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    return ""


@register
def layers_are_chosen_among_named_modules(recipe: Recipe) -> RuleBreak | None:
    """PEFT chooses layers by their number only where the modules are a list of names."""
    fields, modules = _fields(recipe), recipe.get("lora_target_modules") or []
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern")
    if layers is None:
        if not patterns:
            return None
        return _conflict(recipe, "layers_pattern", "has no effect without layers_to_transform",
                         "layers_to_transform: [0, 1], or remove it")  # fmt: skip
    numbers = layers if isinstance(layers, list) else [layers]
    if not numbers or min(numbers) < 0:
        return _conflict(recipe, "layers_to_transform", f"is {layers}; layers count from 0", "[0, 1]", "there is none")
    if any(not name.replace(".", "_").isidentifier() for name in modules):
        named = "lora_target_modules: [q_proj, v_proj]"
        return _conflict(recipe, "layers_to_transform", f"with lora_target_modules: {', '.join(modules)}", named)
    return None
