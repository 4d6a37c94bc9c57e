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
from stepladder.settings import DECOMPOSED
from stepladder.suggest import suggest

KEY = "peft_kwargs"
TABLE = files.read_table("recipe/peft.yaml")
# PEFT's initializations, beside `true`. Those that begin as a part of the base's weights are saved converted
# (model/initial_factors.py); `pissa_niter_N` takes any number of iterations.
INITIALIZATIONS = ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")
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
    help = f"{wrong[0]} belongs to {', '.join(keys[wrong[0]].owner.split())}; {method} takes {_offered(method)}"
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
    """It is not tested on every strategy, resumed and merged, as all that is accepted is."""
    method, keys = recipe.get("peft_type"), _keys()
    known = {*TABLE["own"].get(method, ()), *TABLE["offered"].get(method, ())}
    for name, value in _fields(recipe).items():
        taken = method in keys[name].owner.split()
        if taken and name not in known and value not in (keys[name].default, None):
            why = TABLE["why"].get(name, "")
            return _conflict(recipe, name, "cannot be used", f"remove it; {method} takes {_offered(method)}", why)
    return None


def _offered(method: str) -> str:
    return ", ".join(TABLE["offered"][method])


@register
def initializations_are_offered(recipe: Recipe) -> RuleBreak | None:
    """PEFT draws or computes the first weights in ways of its own, which bear these names."""
    field = "init_lora_weights"
    value = _fields(recipe).get(field)
    if value is None or value is True:
        return None
    name = "false" if value is False else str(value)
    allowed = f"one of {', '.join(['true', *INITIALIZATIONS])}"
    if name not in INITIALIZATIONS and not re.fullmatch(r"pissa_niter_\d{1,3}", name):
        why = TABLE["initializations"].get(name, "")
        what = f"{name} cannot be used" if why else f"{name} is not an allowed value"
        near = "true, without quotes" if name == "true" else suggest(name, INITIALIZATIONS)
        help = allowed if why else near or allowed
        return _conflict(recipe, f"{field}:", what, help, why)
    if name == "gaussian":
        return None
    if quantized := next((key for key in ("load_in_4bit", "load_in_8bit") if recipe.get(key)), ""):
        why = "it is computed in the dtype of the base's weights, or changes them, and these are quantized"
        return _conflict(recipe, f"{field}:", f"{name} with {quantized}: true", "init_lora_weights: true", why)
    if name.startswith(DECOMPOSED):
        return _fault_of_decomposition(recipe, name)
    ranks = [recipe.get("lora_r"), *(_fields(recipe).get("rank_pattern") or {}).values()]
    if odd := [r for r in ranks if isinstance(r, int) and r % 2]:
        why = "it splits an orthogonal matrix of that rank into two halves, for A and for B"
        return _conflict(recipe, f"{field}:", f"{name} with the odd rank {odd[0]}", "an even lora_r", why)
    return None


def _fault_of_decomposition(recipe: Recipe, name: str) -> RuleBreak | None:
    at, fields = "init_lora_weights:", _fields(recipe)
    if recipe.get("dtype") not in (None, "float32"):
        why = "it changes the base's weights, and in 16 bits what the change leaves over would be rounded"
        return _conflict(recipe, at, f"{name} with dtype: {recipe.get('dtype')}", "dtype: float32", why)
    keys = ("use_dora", "use_rslora", "lora_target_parameters")
    patterns = [pattern for pattern in ("rank_pattern", "alpha_pattern") if fields.get(pattern)]
    if others := [*(key for key in keys if recipe.get(key)), *patterns]:
        why = "its result is converted to LoRA of twice the rank on the original base, which that would not be"
        return _conflict(recipe, at, f"{name} with {others[0]}", f"remove {others[0]}", why)
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
