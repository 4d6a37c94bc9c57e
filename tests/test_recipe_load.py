"""Recipes are read strictly: what is wrong is said at its place, with what helps, all of it at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, script
from stepladder.errors import RecipeError, RecipeErrors
from stepladder.recipe import convert, load
from stepladder.recipe.schema import Key, known_keys
from stepladder.suggest import ALIASES, nearest, suggest


@pytest.fixture
def recipe(tmp_path: Path):
    """Load a recipe's text, with flags after it."""

    def read(text: str, *flags: str) -> load.Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load.load(str(path), list(flags))

    return read


@pytest.fixture
def faults(recipe, tmp_path: Path):
    """The errors of a recipe's text, each rendered, with its path left out."""

    def read(text: str, *flags: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            recipe(text, *flags)
        errors = getattr(caught.value, "errors", [caught.value])
        return [error.render().replace(f"{tmp_path / 'recipe.yaml'}:", "") for error in errors]

    return read


# ---- unknown keys ----


@pytest.mark.parametrize(
    ("text", "where", "known"),
    [
        ("learing_rate: 1.0e-4", "1:1", "learning_rate"),
        ("Learning_Rate: 1.0e-4", "1:1", "learning_rate"),
        ("learning-rate: 1.0e-4", "1:1", "learning_rate"),
        ("epochs: 3", "1:1", "num_train_epochs"),
        ("datasets:\n  - path: a\n    spilt: train", "3:5", "split"),
        ("accelerator_config:\n  even_batch: true", "2:3", "even_batches"),
        ("accelerator_config:\n  gradient_accumulation_kwargs:\n    num_step: 2", "3:5", "num_steps"),
        ("gradient_checkpointing_kwargs: {use_reentrent: true}", "1:33", "use_reentrant"),
        (
            "activation_checkpointing: true\nactivation_checkpointing_kwargs:\n  every_n_layer: 2",
            "3:3",
            "every_n_layers",
        ),
        ("lr_scheduler_kwargs:\n  num_cycle: 1", "2:3", "num_cycles"),
        ("model_init_kwargs:\n  use_kernel: true", "2:3", "use_kernels"),
        ("use_liger_kernel: true\nliger_kernel_config:\n  rms_nrom: true", "3:3", "rms_norm"),
    ],
)
def test_an_unknown_key_at_its_place(text: str, where: str, known: str, faults) -> None:
    """Guards against what TRL, Axolotl and alignment-handbook do: a typo that trains something else."""
    (fault,) = faults(text)
    assert fault.startswith(f"✘ recipe: {where}: unknown key") and f"'{known}'" in fault


def test_suggestions_are_near() -> None:
    """Guards against a list of guesses: the best comes first, and far ones are dropped."""
    keys = list(known_keys())
    assert nearest("eval_stpes", keys)[0] == "eval_steps"
    assert nearest("learning_rate", keys) == ["learning_rate"]
    assert nearest("LORA_R", keys) == ["lora_r"]
    assert nearest("use_pfet", keys) == ["use_peft"]
    assert suggest("xy", keys) == "" and suggest("completely_else", keys) == ""


def test_short_forms_of_other_tools_are_known(faults) -> None:
    """Guards `--lr` and its like: the nearest letters were `remove it`, or a key that does something else."""
    keys = known_keys()
    assert all(name in keys for names in ALIASES.values() for name in names) and not ALIASES.keys() & keys
    words = [word for name in ALIASES for word in (f"--{name}", "1")]
    for fault, (name, meant) in zip(faults("", *words), ALIASES.items(), strict=True):
        assert f"--{name}: unknown key" in fault and "did you mean " + " or ".join(map(repr, meant)) in fault


def test_all_faults_are_told_at_once_in_their_order(faults) -> None:
    """Guards against mending one fault a start: file and command line, keys, values and rules together."""
    text = "seed: x\nlora_r: 8\nlearing_rate: 1\nmax_steps: 5\nmax_steps: 6\n"
    found = faults(text, "--learning_rate", "-1", "--batch_size", "3")
    starts = ["1:1: seed takes", "2:1: lora_r has no effect", "3:1: unknown key", "5:1: 'max_steps' stands twice"]
    starts += ["command line --learning_rate: learning_rate is -1", "command line --batch_size: unknown key"]
    assert [
        fault.splitlines()[0][len("✘ recipe: ") :][: len(s)] for fault, s in zip(found, starts, strict=True)
    ] == starts


def test_the_parents_file_is_named(tmp_path: Path) -> None:
    """Guards the places of inherited faults: they lie in the parent's file."""
    (tmp_path / "base.v2.yaml").write_text("learing_rate: 1\n")
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {tmp_path}/base.v2\nseed: x\n")
    with pytest.raises(RecipeErrors) as caught:
        load.load(str(child), [])
    assert [error.where for error in caught.value.errors] == [f"{tmp_path / 'base.v2.yaml'}:1:1", f"{child}:2:1"]


# ---- values ----


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("max_steps: many", "max_steps takes a whole number, found text (many)"),
        ("max_steps: 1.5", "found a number (1.5)"),
        ("max_steps: [1]", "found a list"),
        ("max_steps: {a: 1}", "found a block of keys"),
        ("packing: 1", "packing takes true or false, found a whole number (1)"),
        ("lr_scheduler_type: cosin", "did you mean 'cosine'?"),
        ("optim: AdamW_Torch", "did you mean 'adamw_torch'?"),
        ("report_to: wanbd", "report_to: 'wanbd' is not an allowed value"),
        ("debug: x", "debug: 'x' is not an allowed value"),
        ("report_to: [wandb, tensorbord]", "report_to[1]: 'tensorbord' is not an allowed value"),
        ("bf16: atuo", "did you mean 'auto'?"),
        ("num_train_epochs: null", "remove it: the default is 3.0"),
        ("datasets: {path: a}", "datasets takes a list, found a block of keys"),
        ("datasets: [{split: train}]", "datasets[0] has no 'path'"),
        ("lora_target_modules: [q_proj, [v_proj]]", "lora_target_modules[1] takes text, found a list"),
        ("column_map: {input: [a, b]}", "column_map.input takes text, found a list"),
        ("learning_rate: .nan", "it must be finite"),
        ("learning_rate: 1e999", "it must be finite"),
        ("max_steps: 0", "max_steps is 0; it must be -1 (off), or 1 or more"),
        ("warmup_steps: 1.5", "a whole number from 1 up"),
        ("test_split_size: 1.5", "a whole number from 1 up"),
        ("datasets: [{path: a, fraction: 1.5}]", "datasets[0].fraction is 1.5; it must be above 0 and at most 1"),
        ("lr_scheduler_kwargs: {num_cycles: 0}", "lr_scheduler_kwargs.num_cycles is 0; it must be above 0"),
        ("seed: -1", "from 0 to 4294967295"),
        ("use_peft: !!python/object:os.system {}", "use_peft takes"),
        ("seed: !!python/name:os.system x", "could not determine a constructor"),
    ],
)
def test_a_wrong_value(text: str, part: str, faults) -> None:
    """Guards types, allowed values and ranges: each is refused before anything is loaded."""
    assert part in "\n".join(faults(text))


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 16.0", "max_steps", 16),
        ("max_steps: 1_000", "max_steps", 1000),
        ('max_steps: "20"', "max_steps", 20),
        ("max_length: none", "max_length", None),
        ("packing: 'true'", "packing", True),
        ("eval_delay: 2", "eval_delay", 2.0),
        ("lora_target_modules: all-linear\nuse_peft: true", "lora_target_modules", ["all-linear"]),
        ("eos_token: 2024-01-01", "eos_token", "2024-01-01"),
        ("model_revision: 0123", "model_revision", "0123"),
        ("pad_to_multiple_of: 8", "pad_to_multiple_of", 8),
        ("accelerator_config: '{\"even_batches\": true}'", "accelerator_config", {"even_batches": True}),
        ("model_init_kwargs: {rope_parameters: {a: 2.0}}", "model_init_kwargs", {"rope_parameters": {"a": 2.0}}),
        ("datasets: [{path: json, data_files: {train: a.json}}]", "datasets",
         [{"path": "json", "data_files": {"train": "a.json"}}]),
    ],
)  # fmt: skip
def test_a_value_in_the_type_that_is_meant(text: str, key: str, value: object, recipe) -> None:
    """Guards what people write and mean: 1 for 1.0, a word for a list of one, a revision made of digits."""
    eval_delay = ("--eval_strategy", "epoch") if key == "eval_delay" else ()
    found = recipe(text, *eval_delay).values[key]
    assert found == value and type(found) is type(value)


def test_every_number_has_a_range() -> None:
    """Guards against a new key of the libraries that takes any number, and against a range for no key."""

    def numbers(keys: list[Key], above: str = "") -> set[str]:
        found = set()
        for key in keys:
            name = f"{above}{key.name}"
            if {"int", "float"} & {*key.types} and "dict" not in key.types:
                found.add(name)
            found |= numbers(list(key.nested), f"{name}.")
        return found

    assert numbers(list(known_keys().values())) == convert.RANGES.keys()


def test_an_example_in_a_message_is_an_allowed_value(recipe) -> None:
    """Guards the library's default as the example where a range of ours leaves it out: OFT's `r` of 0."""
    with pytest.raises(RecipeErrors) as caught:
        recipe("use_peft: true\npeft_type: vera\npeft_kwargs: {r: many}")
    assert [error.help for error in caught.value.errors] == ["for example peft_kwargs.r: 1"]


# ---- YAML's traps ----


def test_no_is_read_as_the_word_where_it_is_one(recipe, faults) -> None:
    """Guards `eval_strategy: no`, a boolean to YAML 1.1; where no word of that name exists it is an error."""
    assert recipe("eval_strategy: no\nsave_strategy: No").values == {"eval_strategy": "no", "save_strategy": "no"}
    assert 'eval_strategy: "off"; allowed: no, steps, epoch' in faults("eval_strategy: off")[0]
    assert "YAML reads on as true" in faults("report_to: wandb\nrun_name: on")[0]
    assert "YAML reads yes as true" in faults("use_peft: true\nlora_target_modules: [q_proj, yes]")[0]


def test_numbers_that_are_text_to_yaml(recipe) -> None:
    """Guards `1e-4`, which YAML 1.1 reads as text: it is the number, and a note says so."""
    found = recipe("learning_rate: 1e-4\nweight_decay: 1.e-2\nadam_epsilon: 1.0e-8\nmax_steps: 1e3")
    assert found.values == {"learning_rate": 1e-4, "weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_steps": 1000}
    assert [note.split(": ")[1] for note in found.notes] == ["learning_rate", "max_steps"]


@pytest.mark.parametrize("number", ["010", "1:30", "0x10", "0b11"])
def test_numbers_that_are_others_to_yaml(number: str, faults) -> None:
    """Guards against 010 that trains 8 steps, and 1:30 that trains 90."""
    assert f"YAML reads {number} as" in faults(f"max_steps: {number}")[0]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rate: 1\n\tseed: 3", ["2:1: a tab", "spaces"]),
        ("model_init_kwargs:\n\tuse_kernels: true", ["2:1: a tab"]),
        ("prompt_template: User: {input}", ["invalid YAML", "': '"]),
        ("eos_token: @end", ["invalid YAML", "begins with one of"]),
        ("chat_template: {% for m in messages %}", ["invalid YAML", "begins with one of"]),
        ("prompt_template: {input}", ["YAML reads {…} as a block", "quotes"]),
        ("prompt_template: # {input}", ["has no value", "what follows a # is a comment"]),
        ("seed:", ["seed has no value"]),
        ('run_name: ""', ["1:1: run_name is empty", "remove run_name"]),
        ("a: &x\n  b: *x", ["contains itself"]),
        ("<<: {seed: 3}", ["merge key", "extends"]),
        ("? [a]\n: 1", ["a key is one word"]),
        ("- seed: 3", ["a recipe is a block"]),
        ("seed: 3\n---\nseed: 4", ["invalid YAML"]),
        ("datasets:\n  - path: a\n    path: b", ["3:5: 'path' stands twice, first on line 2"]),
        ("lr_scheduler_kwargs: {num_cycles: 1, num_cycles: 2}", ["1:38: 'num_cycles' stands twice"]),
    ],
)
def test_traps_are_named(text: str, parts: list[str], faults) -> None:
    """Guards against messages of the parser's that nobody understands, and against silence."""
    found = "\n".join(faults(text))
    assert all(part in found for part in parts), found


def test_a_value_that_a_comment_cuts(recipe) -> None:
    """Guards `run_name: try #3`, of which YAML keeps `try`: a note shows the rest. A comment apart is none."""
    found = recipe("report_to: wandb # where it is watched\nrun_name: try #3\n")
    assert found.values["run_name"] == "try" and len(found.notes) == 1 and "'#3'" in found.notes[0]


def test_json_is_yaml(recipe, faults) -> None:
    """Guards recipes that programs write: JSON in a .yaml file, with the places of its faults."""
    assert recipe(json.dumps({"learning_rate": 1e-05, "datasets": [{"path": "a"}]}, indent=1)).values == {
        "learning_rate": 1e-05, "datasets": [{"path": "a"}]
    }  # fmt: skip
    assert faults('{\n "learing_rate": 1}')[0].startswith("✘ recipe: 2:2: unknown key")


def test_bom_and_crlf(tmp_path: Path) -> None:
    """Guards files from Windows: byte order mark and line ends are no part of a key."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\r\nmax_steps: 5\r\n")
    assert load.load(str(path), []).values == {"seed": 3, "max_steps": 5}
    path.write_bytes(b"seed: 3 # caf\xe9\n")
    with pytest.raises(RecipeError, match="UTF-8"):
        load.load(str(path), [])


# ---- extends ----


def test_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards inheritance: the parent's keys first, by a path from the current folder, with or without .yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/root.yaml").write_text("seed: 1\nmax_steps: 10\nlr_scheduler_kwargs: {num_cycles: 2}\n")
    (tmp_path / "base/middle.yaml").write_text("extends: base/root\nlr_scheduler_type: cosine\nseed: 2\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base/middle.yaml\nlr_scheduler_kwargs: {num_cycles: 3}\n")
    found = load.load(str(child), ["--max_steps=12"])
    assert found.values == {
        "seed": 2, "max_steps": 12, "lr_scheduler_kwargs": {"num_cycles": 3}, "lr_scheduler_type": "cosine"
    }  # fmt: skip
    assert found.where("seed") == "base/middle.yaml:3:1"
    assert found.where("lr_scheduler_kwargs.num_cycles") == f"{child}:2:23"
    assert found.where("max_steps") == "command line --max_steps"


def test_extends_faults(tmp_path: Path, faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards circles, missing parents and other values: each is named at its line, and the other keys are read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parent.yaml").write_text("extends: recipe\n")
    assert "in a circle: recipe.yaml → parent.yaml → recipe.yaml" in faults("extends: parent")[0]
    assert "in a circle: recipe.yaml → recipe.yaml" in faults("seed: 3\nextends: recipe")[0]
    missing, unknown = faults("extends: lroa\nlearing_rate: 1")
    assert "1:1: extends: there is no recipe 'lroa'" in missing and "did you mean 'lora'" in missing
    assert f"looked in {tmp_path}" in missing
    assert "2:1: unknown key" in unknown
    assert "extends takes text, found a list" in faults("extends: [parent]")[0]


# ---- the command line ----


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--max_steps=-1"], {"max_steps": -1}),
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--packing"], {"packing": True}),
        (["--packing", "--max_steps", "3"], {"packing": True, "max_steps": 3}),
        (["--packing", "no"], {"packing": False}),
        (["--eval_strategy", "no"], {"eval_strategy": "no"}),
        (["--eos_token", "no"], {"eos_token": "no"}),
        (["--prompt_template", "### User: {input} #3"], {"prompt_template": "### User: {input} #3"}),
        (["--prompt_template", "{input}: 'so', [she] said"], {"prompt_template": "{input}: 'so', [she] said"}),
        (["--prompt_template=--- {input}"], {"prompt_template": "--- {input}"}),
        (["--prompt_template", "two\nlines"], {"prompt_template": "two\nlines"}),
        (["--eos_token", "null"], {"eos_token": None}),
        (["--max_length", "null"], {"max_length": None}),
        (["--report_to", "wandb"], {"report_to": "wandb"}),
        (["--report_to", "wandb", "tensorboard"], {"report_to": ["wandb", "tensorboard"]}),
        (["--report_to", "[wandb, tensorboard]"], {"report_to": ["wandb", "tensorboard"]}),
        (["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--lr_scheduler_type=cosine"],
         {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "cosine"}),
        (["--datasets", '[{"path": "a b.jsonl"}]'], {"datasets": [{"path": "a b.jsonl"}]}),
        (["--max_seq_length", "64"], {"max_length": 64}),
        (["--label_names", "a, b", "no"], {"label_names": ["a, b", "no"]}),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)  # fmt: skip
def test_flags(flags: list[str], values: dict, recipe) -> None:
    """Guards what a shell hands over: it has been parsed once, and YAML's traps must not bite it again."""
    found = recipe("{}", *flags)
    assert found.values == values
    assert not any("YAML" in note for note in found.notes)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["seed", "3"], "unexpected word 'seed'"),
        (["--seed", "3", "--seed=4"], "--seed is given twice"),
        (["--max_length", "3", "--max_seq_length", "4"], "--max_length is given twice"),
        (["--learning-rate=1", "--learning_rate=2"], "--learning_rate is given twice"),
        (["--run_name", "my", "run"], "takes one value, found 2"),
        (["--seed"], "--seed has no value"),
        (["--output_dir", ""], "output_dir is empty"),
        (["--dataset_name="], "dataset_name is empty"),
        (["--column_map", '{input: ""}'], "column_map.input is empty"),
        (["--no-packing"], "unknown key 'no_packing'"),
        (["--extends", "lora"], "works in a file only"),
        (["--config", "lora.yaml"], "--recipe FILE"),
        (["--lr_scheduler_kwargs", "{num_cycle: 1}"], "unknown key 'num_cycle' in lr_scheduler_kwargs"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_wrong_flags(flags: list[str], part: str, faults) -> None:
    """Guards against a flag that is dropped, or read as another."""
    assert part in "\n".join(faults("{}", *flags))


def test_flags_through_the_script(tmp_path: Path) -> None:
    """Guards the way through argparse: negative numbers, blanks and quotes arrive as they were typed."""
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset_name: data/techco.jsonl\n")
    flags = ["--max_steps", "-1", "--prompt_template", "Q: {input} #1\nA: ", "--report_to", "wandb", "none", "--seed=7"]
    done = script("check", "--recipe", path, "--show", "--json", *flags)
    assert done.code == 0, done
    values = {entry["key"]: entry["value"] for entry in json.loads(done.out)["keys"]}
    assert values["prompt_template"] == "Q: {input} #1\nA: " and values["report_to"] == ["wandb", "none"]
    assert values["max_steps"] == -1 and values["seed"] == 7


# ---- the resolved recipe, and the time it takes ----


def test_the_resolved_recipe_survives_any_text(recipe, tmp_path: Path) -> None:
    """Guards the run folder's recipe.yaml: words that YAML reads as something else come back as they were."""
    texts = [
        "no",
        "1e-4",
        "null",
        "~",
        " x ",
        "2024-01-01",
        "a: b # c",
        "Grüße 🙂\n\ttab",
        "'",
        '"',
        "{x}",
        "\u2028",
        "010",
    ]
    for text in texts:
        first = recipe(yaml.safe_dump({"eos_token": text, "column_map": {text: text}, "label_names": [text, "x"]}))
        again = recipe(first.to_yaml())
        assert (
            again.values == first.values == {"eos_token": text, "column_map": {text: text}, "label_names": [text, "x"]}
        )
        assert again.hash() == first.hash() and not again.notes


@pytest.mark.parametrize(
    "text",
    [
        r'chat_template_path: "a\ud800"',
        r'eos_token: "\uDfff"',
        r'column_map: {"\ud83d": input}',
        r'column_map: {a: "\ud83d"}',
        r'report_to: ["none\udc00"]',
    ],
)
def test_half_a_character_is_refused(recipe, text: str) -> None:
    """Guards against the traceback of whatever encodes it first: a path, a tokenizer, the run's recipe.yaml."""
    with pytest.raises(RecipeErrors, match="holds half a character"):
        recipe(text)


def test_the_same_block_twice_has_no_anchor(recipe) -> None:
    """Guards the resolved recipe's look: YAML would write the second as *id001."""
    text = "datasets: [{path: a, columns: &c [x]}, {path: b, columns: *c}]"
    assert not re.search(r"[&*]id", recipe(text).to_yaml())


def test_recipes_are_read_without_the_heavy_libraries(tmp_path: Path) -> None:
    """Guards the second that a typo may take: nothing heavy is imported once the keys are known."""
    known_keys()  # the cache is warm
    code = (
        "import sys\nfrom stepladder.recipe import load\n"
        "load.load('lora', ['--learning_rate', '1e-4'])\n"
        "print(sorted({'torch', 'trl', 'transformers', 'datasets', 'peft', 'accelerate'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_cache_is_rebuilt_when_it_is_damaged(tmp_path: Path) -> None:
    """Guards a home that a full disk has left with half a file: the keys are read anew, and kept."""
    code = "from stepladder.recipe.schema import known_keys\nprint(len(known_keys()))"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def count() -> int:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        return int(done.stdout.split()[-1])

    (tmp_path / "stepladder").mkdir()
    first = count()
    (file,) = (tmp_path / "stepladder").glob("*.json")
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert count() == first == len(known_keys()) and file.read_text() == whole


# ---- texts with a meaning of their own ----

JINJA = (
    "{% for m in messages %}\n{{ '<|im_start|>' + m['role'] }}\t \n{{ m.content }}\u2028é<|im_end|>  \n\n{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("style", ["'", '"', "|", None])
def test_a_template_as_text_is_kept_to_the_letter(style: str | None, recipe) -> None:
    """Guards inline Jinja, as most public recipes of TRL hold it: from YAML to recipe.yaml and back."""
    written = yaml.dump({"chat_template": JINJA}, default_style=style, allow_unicode=True)
    loaded = recipe(written)
    assert loaded.values == {"chat_template": JINJA}
    assert recipe(loaded.to_yaml()).values == {"chat_template": JINJA}


def test_a_template_on_the_command_line(recipe) -> None:
    """Guards a text that begins with a brace: it is no block there."""
    for text in ("{{ messages[0].content }}", "{% for m in messages %}{{ m.content }}{% endfor %}"):
        assert recipe("max_length: 8\n", "--chat_template", text).values["chat_template"] == text
        assert recipe("max_length: 8\n", f"--chat_template={text}").values["chat_template"] == text


@pytest.mark.parametrize("pattern", [r"model.layers.[\d]+.(mlp|self_attn).(up|q)_proj", "[qk]_proj.*", r".*\.q_proj"])
def test_target_modules_as_a_pattern(pattern: str, recipe) -> None:
    """Guards a regular expression in place of names, in a file, on the command line and in recipe.yaml."""
    loaded = recipe(f"use_peft: true\nlora_target_modules: '{pattern}'\n")
    assert loaded.values["lora_target_modules"] == [pattern]
    assert recipe(loaded.to_yaml()).values == loaded.values
    assert recipe("use_peft: true\n", "--lora_target_modules", pattern).values == loaded.values


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("'(q|v'", "no regular expression"),
        ("'a{99999999999999999999}'", "no regular expression"),
        ("[q_proj, '.*v_proj']", "'.*v_proj' is no module name"),
        ("[all-linear, lm_head]", "'all-linear' is no module name"),
    ],
)
def test_target_modules_that_mean_nothing(value: str, said: str, faults) -> None:
    """Guards the place and the cause of what PEFT would raise on, or take for a name that no module has."""
    (error,) = faults(f"use_peft: true\nlora_target_modules: {value}\n")
    assert "2:1: " in error and said in error
