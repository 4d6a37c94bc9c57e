"""Asking a model: answers as they come, chats, transcripts; and what people get wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from conftest import ROOT, script
from stepladder.errors import DataError, ModelError
from stepladder.evaluation import questions, sides
from stepladder.evaluation.questions import Question


@pytest.fixture(scope="module")
def generate():
    """scripts/generate.py as a module: its main is called as the command line calls it."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "scripts/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module, monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    module.main()


def test_a_transcript_is_the_bases_side(generate, tiny, monkeypatch, tmp_path: Path) -> None:
    """Guards 'keep this output to compare': what generate.py keeps answers compare.py's questions."""
    (tmp_path / "q.txt").write_text("Where is my order?\n\nWho are you?\n")
    kept = tmp_path / "kept.jsonl"
    call(generate, monkeypatch, "--model", tiny, "--prompts", tmp_path / "q.txt", "--transcript", kept,
         "--max_new_tokens", 6)  # fmt: skip
    asked = questions.read_prompts(tmp_path / "q.txt")
    side = sides.measure(str(kept), sides.Measured(asked), 6)
    assert side.texts == sides.measure(str(tiny), sides.Measured(asked), 6).texts and not side.losses
    with pytest.raises(DataError, match="1 of 2"):
        questions.transcript_answers(kept, [asked[0], Question([{"role": "user", "content": "Another?"}])])
    under = Question([{"role": "system", "content": "Be brief."}, *asked[0].messages])
    with pytest.raises(DataError, match="another conversation"):
        questions.transcript_answers(kept, [under])
    assert sides.choose_length([str(kept)], None, []) == 6, "models answer within what the transcript's did"
    with pytest.raises(DataError, match="within 6 tokens"):
        sides.choose_length([str(kept)], 7, [])


def test_a_chat_remembers_until_reset(generate, tiny, monkeypatch, capsys, tmp_path: Path) -> None:
    """Guards the history: a second question comes with the first one's answer, none of it after /reset."""
    said = iter(["first", "second", "/reset", "/what", "third", "/system Be kind.", "fourth", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    call(generate, monkeypatch, "--model", tiny, "--chat", "--system", "Be brief.", "--transcript",
         tmp_path / "t.jsonl", "--max_new_tokens", 3)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    asked = [[turn["content"] for turn in row["messages"] if turn["role"] != "assistant"] for row in rows]
    assert asked == [["Be brief.", "first"], ["Be brief.", "first", "second"], ["Be brief.", "third"],
                     ["Be kind.", "fourth"]]  # fmt: skip
    assert "a new conversation" in capsys.readouterr().out


def test_the_answer_appears_as_it_is_made(generate, tiny, monkeypatch, capsys, tmp_path: Path) -> None:
    """Guards the streaming: the text is on the screen a piece at a time, and is the answer that is kept."""
    import transformers

    seen = []

    class Watched(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(text, stream_end)
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(transformers, "TextStreamer", Watched)
    call(generate, monkeypatch, "--model", tiny, "--prompt", "Where is my order?", "--max_new_tokens", 12,
         "--transcript", tmp_path / "t.jsonl")  # fmt: skip
    (row,) = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len([text for text in seen if text.strip()]) > 1, seen
    assert "".join(seen).strip() == row["messages"][-1]["content"]
    assert (row["max_new_tokens"], row["temperature"]) == (12, 0)


def test_a_transcript_is_the_base_on_the_command_line(generate, tiny, monkeypatch, tmp_path: Path) -> None:
    """Guards `compare.py --base kept.jsonl`: the same answers, the same length, and notes on what is not measured."""
    kept = tmp_path / "kept.jsonl"
    call(generate, monkeypatch, "--model", tiny, "--prompts", "docs/workshop/questions.txt", "--transcript", kept,
         "--max_new_tokens", 5, "--temperature", 0.7)  # fmt: skip
    words = ("--base", kept, "--tuned", tiny, "--prompts", "docs/workshop/questions.txt")
    done = script("compare", *words, "--output_dir", tmp_path / "out")
    assert done.code == 0, done
    facts = json.loads((tmp_path / "out/compare.json").read_text())
    rows = [json.loads(line)["messages"] for line in kept.read_text().splitlines()]
    assert facts["sides"][0]["answers"] == [row[-1]["content"] for row in rows] and facts["max_new_tokens"] == 5
    notes = "\n".join(facts["notes"])
    assert "sampled at temperature 0.7" in notes and "tells no losses" in notes and "without --data" in notes
    done = script("compare", *words, "--output_dir", tmp_path / "other", "--max_new_tokens", 6)
    assert done.code == 2 and "answers within 5 tokens" in done.err and not (tmp_path / "other").exists(), done


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_new_tokens", 0], "less than 1"),
        (["--seed", -1], "less than 0"),
        (["--temperature", -1], "not above 0"),
        (["--top_p", 0.9], "need --temperature"),
        (["--temperature", 1, "--top_p", 1.5], "more than 1"),
        (["--transcript", "docs"], "name a file in it"),
        (["--transcript", "README.md"], "is there already"),
        (["--overwrite"], "--overwrite needs --transcript"),
    ],
)
def test_slips_are_told_before_the_model_is_loaded(words: list, said: str, tiny) -> None:
    """Guards against a traceback after the answers, and against a flag without effect."""
    done = script("generate", "--model", tiny, "--prompt", "Hello", *words)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err and not done.out, done


def test_a_row_with_a_system_prompt_of_its_own_gets_no_second_one(tiny, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    done = script("generate", "--model", tiny, "--prompts", tmp_path / "q.jsonl", "--system", "Be brief.")
    assert done.code == 2 and "has one of its own: 'Be kind.'" in done.err, done


def test_a_question_that_the_template_refuses_is_named_before_any_is_answered(
    generate, tiny, monkeypatch, capsys, tmp_path: Path
) -> None:
    """Guards against a model that is asked without its tools, and against half a transcript."""
    rows = [{"instruction": "Say hi", "input": ""}, {"prompt": "Rome?", "tools": [{"name": "weather"}], "id": 1}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"asked 'Rome.': the chat template does not render"):
        call(generate, monkeypatch, "--model", tiny, "--prompts", tmp_path / "q.jsonl", "--transcript",
             tmp_path / "t.jsonl")  # fmt: skip
    said = capsys.readouterr()
    assert not said.out and not (tmp_path / "t.jsonl").exists()
    assert said.err.count("columns that are not used: id (1 row)") == 1


def test_a_model_that_cannot_take_a_conversation_refuses_it(generate, tiny, monkeypatch, tmp_path: Path) -> None:
    """Guards against a system prompt that is dropped without a word, and jinja's and PyTorch's tracebacks."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from stepladder.evaluation.generation import generate_answers
    from stepladder.model.pretrained import load_for_inference

    _, tokenizer = load_for_inference(str(tiny))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=2))
    said = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ModelError, match="has 24 positions"):
        generate_answers(model, tokenizer, [said], max_new_tokens=24)
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match="no system role here"):
        generate_answers(model, tokenizer, [said], max_new_tokens=1)
    tokenizer.chat_template = None
    assert len(generate_answers(model, tokenizer, [said], max_new_tokens=4)) == 1
    model.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    for words in (["--prompt", "Hello", "--system", "Be brief."], ["--chat"]):
        with pytest.raises(ModelError, match="has no chat template"):
            call(generate, monkeypatch, "--model", tmp_path / "bare", *words)


def test_a_damaged_or_unfinished_model_is_named(generate, monkeypatch, tmp_path: Path) -> None:
    """Guards a run folder that was preempted, and an adapter whose configuration was cut short."""
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)
    (run / "run.json").write_text('{"status": "preempted"}')
    (run / "checkpoint-4/model.safetensors").write_text("")
    done = script("generate", "--model", run, "--prompt", "Hello")
    assert done.code == 2 and "has not finished" in done.err and "checkpoint-4" not in done.err, done
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model')
    (adapter / "adapter_model.safetensors").write_text("")
    with pytest.raises(ModelError, match=r"adapter_config\.json.*cannot be (read|used)"):
        call(generate, monkeypatch, "--model", adapter, "--prompt", "Hello")


def test_a_base_that_has_moved(generate, tiny, monkeypatch, capsys, tmp_path: Path) -> None:
    """Guards an adapter whose base lies elsewhere now: the message named the adapter, and no flag the place."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "moved")
    file = tmp_path / "moved/adapter_config.json"
    file.write_text(file.read_text().replace(str(tiny), "/gone/base"))
    words = ["--prompt", "Which door?", "--max_new_tokens", "8", "--model"]
    with pytest.raises(ModelError, match=r"the base of the adapter .*moved cannot be used: .*'/gone/base'") as caught:
        call(generate, monkeypatch, *words, tmp_path / "moved")
    assert "--base" in caught.value.help
    said = []
    for name in ("here", "moved"):
        capsys.readouterr()
        call(generate, monkeypatch, *words, tmp_path / name, *(["--base", tiny] if name == "moved" else []))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    on, moved = sides.Measured([], base=str(tiny)), str(tmp_path / "moved")  # of compare.py
    sides.check(moved, on)
    assert on.bases == {moved: str(tiny)} and "/gone/base, is not there" in on.notes[0]
    with pytest.raises(ModelError, match="is a model by itself"):
        call(generate, monkeypatch, *words, tiny, "--base", tiny)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 4}, r"lack model\.layers\.3\.\S+ and 8 more"),
        ({"intermediate_size": 40}, r"lack model\.layers\.0\.mlp\.down_proj\.weight as \[\d+, 40\], which is \["),
        ({"num_hidden_layers": 2}, r"has no place for model\.layers\.2\.\S+ and 8 more of its files: left out"),
    ],
)
def test_weights_and_configuration_that_disagree(change, said, tiny, tmp_path, settings, capsys) -> None:
    """Guards random layers in a trained or asked model, and layers that are left out: Transformers only warns of them,
    in a report that is not shown."""
    from stepladder.model import pretrained

    shutil.copytree(tiny, folder := tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    (folder / "config.json").write_text(json.dumps(config | change))
    for read in (
        lambda: pretrained.load_base(settings(model_name_or_path=str(folder)), "fp32"),
        lambda: pretrained.load_for_inference(str(folder)),
    ):
        with pytest.raises(ModelError, match=said) if "lack" in said else contextlib.nullcontext():
            read()
        assert "lack" in said or re.search(said, capsys.readouterr().err)


def test_code_beside_a_model_runs_only_where_it_is_trusted(tiny: Path, tmp_path: Path, settings, monkeypatch) -> None:
    """Guards against code that comes with a base: Transformers asked on the terminal and waited, and named no flag of
    ours. So does every reader of a base: generate.py, the plan, merge.py, a chat template's source."""
    import shutil

    from stepladder.data import templates
    from stepladder.model import pretrained
    from stepladder.planning import meta_model

    folder, marker = tmp_path / "own", tmp_path / "ran"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    readers = [
        lambda: pretrained.load_for_inference(str(folder)), lambda: pretrained.load_config(folder),
        lambda: meta_model.load_config(settings(model_name_or_path=str(folder))),
        lambda: pretrained.load_base(settings(model_name_or_path=str(folder)), "fp32"),
    ]  # fmt: skip
    for read in readers:
        with pytest.raises(ModelError, match=r"Python code(.|\n)*--trust_remote_code"):
            read()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.chdir(tmp_path)
    for read in (lambda: pretrained.load_tokenizer(str(folder)), lambda: templates.from_path("own")):
        with contextlib.suppress(ModelError):  # a tokenizer's file may do without its code
            read()
    assert not marker.exists()
    shutil.copy(tiny / "tokenizer_config.json", folder)
    done = script("generate", "--model", folder, "--prompt", "Hi", "--max_new_tokens", 2, "--trust_remote_code",
                  HF_MODULES_CACHE=str(tmp_path / "modules"))  # fmt: skip
    assert done.code == 0 and marker.exists(), done
