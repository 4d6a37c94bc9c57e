"""Labels train the assistant's words and its end of turn, nothing else."""

from __future__ import annotations

import json

import pytest

from stepladder.data import mixture, render, templates
from stepladder.errors import DataError, ModelError, RecipeError


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def base_tokenizer(smollm2):
    """A base model's tokenizer: no template, no turn tokens, `<|endoftext|>` as its end (as distilgpt2's)."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = json.loads((smollm2 / "tokenizer.json").read_text())
    turn_tokens = {"<|im_start|>", "<|im_end|>"}
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in turn_tokens]
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {("Ġunused" + k[2:-2] if k in turn_tokens else k): i for k, i in vocab.items()}
    spec["post_processor"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def rows(tmp_path, *items: dict) -> mixture.Rows:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return mixture.from_name(str(file))


def test_only_the_answer_and_its_end_are_trained(tokenizer, tmp_path) -> None:
    """Guards the commonest silent fault of fine-tuning: prompts in the loss, or an end never learned."""
    row = render.render(rows(tmp_path, {"input": "What is two and two?", "output": "It is four. 😊"}), tokenizer)[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == "It is four. 😊<|im_end|>"
    assert "What is two and two?" in tokenizer.decode(row["input_ids"])


def test_every_turn_of_a_conversation_is_trained(tokenizer, tmp_path) -> None:
    messages = [
        {"role": "user", "content": "First question?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Second question?"},
        {"role": "assistant", "content": "Second answer."},
    ]
    row = render.render(rows(tmp_path, {"messages": messages}), tokenizer)[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == "First answer.<|im_end|>Second answer.<|im_end|>"


def test_text_is_trained_whole_and_ends(tokenizer, tmp_path) -> None:
    row = render.render(rows(tmp_path, {"text": "Once upon a time."}), tokenizer)[0]
    assert row["labels"] == row["input_ids"]
    assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_a_row_cut_before_its_answer_is_refused(tokenizer, tmp_path, settings) -> None:
    """Guards against rows that max_length silences: TRL drops them without a word."""
    data = rows(tmp_path, {"input": "Why? " * 200, "output": "Because it is so."})
    with pytest.raises(DataError, match="nothing of this row is trained") as caught:
        render.render(data, tokenizer, settings(max_length=64))
    assert caught.value.where.endswith(":1")


TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "Bye!"},
]


def trained_text(tokenizer, data, train_on: str = "all_turns") -> list[str]:
    """The trained tokens of the first row, each stretch decoded."""
    row = next(render.tokenize(data, tokenizer, train_on))
    if isinstance(row, DataError):
        raise row
    ids, labels = row.ids, row.labels
    stretches: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        if label == -100:
            stretches.append([])
        else:
            assert token == label
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


# What a careful reader marks by hand: the answer and the token that ends it.
EXPECTED = {
    "chatml": ["Hello!<|im_end|>", "Bye!<|im_end|>"],
    "llama3": ["Hello!<|eot_id|>", "Bye!<|eot_id|>"],
    "gemma": ["Hello!<end_of_turn>", "Bye!<end_of_turn>"],
    "mistral": [" Hello!{eos}", " Bye!{eos}"],
    "zephyr": ["Hello!{eos}", "Bye!{eos}"],
    "phi3": ["Hello!<|end|>", "Bye!<|end|>"],
    "qwen2_5": ["Hello!<|im_end|>", "Bye!<|im_end|>"],
    # Qwen3 renders an earlier turn without its thoughts, so TRL's marked version stands in for it.
    "qwen3": ["<think>\n\n</think>\n\nHello!<|im_end|>", "<think>\n\n</think>\n\nBye!<|im_end|>"],
}


@pytest.mark.parametrize("template", EXPECTED)
def test_masks_of_the_templates_by_hand(template, base_tokenizer, settings, tmp_path) -> None:
    """Guards every template's mask token by token: headers out, the answer and its end in, the line break out."""
    templates.prepare(base_tokenizer, settings(chat_template=template))
    messages = TURNS[1:] if template == "gemma" else TURNS  # Gemma's template refuses a system turn
    expected = [text.format(eos=base_tokenizer.eos_token) for text in EXPECTED[template]]
    data = rows(tmp_path, {"messages": messages})
    assert trained_text(base_tokenizer, data) == expected
    assert trained_text(base_tokenizer, data, "last_turn") == expected[-1:]
    row = next(render.tokenize(data, base_tokenizer, "everything"))
    ids, labels = row.ids, row.labels
    assert ids == labels


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "phi3"])
def test_turn_tokens_are_added_once_and_end_the_answer(template, base_tokenizer, settings) -> None:
    """Guards a base model that would never stop: its end token becomes the template's end of turn."""
    new = templates.prepare(base_tokenizer, settings(chat_template=template))
    assert base_tokenizer.eos_token in EXPECTED[template][0]
    assert all(base_tokenizer(token.text, add_special_tokens=False)["input_ids"] == [token.row] for token in new)
    assert templates.prepare(base_tokenizer, settings(chat_template=template)) == []


def test_prompt_template_of_the_seeds(base_tokenizer, settings, tmp_path) -> None:
    """Guards the split at the prompt's end: what is asked at inference is what was trained on."""
    templates.prepare(base_tokenizer, settings(prompt_template="### User: {input}\n### Assistant: "))
    data = rows(tmp_path, {"input": "How long does shipping take?", "output": "Three days."})
    row = next(render.tokenize(data, base_tokenizer))
    ids, labels = row.ids, row.labels
    eos = base_tokenizer.eos_token
    assert base_tokenizer.decode(ids) == f"### User: How long does shipping take?\n### Assistant: Three days.{eos}"
    assert trained_text(base_tokenizer, data) == [f" Three days.{eos}"]
    asked = base_tokenizer("### User: How long does shipping take?\n### Assistant:")["input_ids"]
    assert ids[: len(asked)] == asked and set(labels[: len(asked)]) == {-100}


@pytest.mark.parametrize("bad", ["### User:", "{input} {input}"])
def test_prompt_template_needs_one_place_for_the_input(bad, base_tokenizer, settings) -> None:
    with pytest.raises(RecipeError, match="exactly once"):
        templates.prepare(base_tokenizer, settings(prompt_template=bad))


def test_an_unknown_template_is_refused(base_tokenizer, settings) -> None:
    with pytest.raises(RecipeError, match="no chat template 'chatlm'") as caught:
        templates.prepare(base_tokenizer, settings(chat_template="chatlm"))
    assert "chatml" in caught.value.help


def test_tool_calls_are_trained_and_results_are_not(base_tokenizer, settings, tmp_path) -> None:
    """Guards conversations with tools: the call is the model's own words, what the tool returns is not."""
    templates.prepare(base_tokenizer, settings(chat_template="qwen2_5"))
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 123, "b": 456}}}
    messages = [
        {"role": "user", "content": "What is 123 * 456?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": "56088"},
        {"role": "assistant", "content": "It is 56088."},
    ]
    data = mixture.Rows("tools", [{"messages": messages}], ["tools:1"])
    first, second = trained_text(base_tokenizer, data)
    assert first.startswith("<tool_call>") and '"multiply"' in first and first.endswith("</tool_call><|im_end|>")
    assert second == "It is 56088.<|im_end|>"


def test_a_conversation_that_the_template_forbids(base_tokenizer, settings, tmp_path) -> None:
    templates.prepare(base_tokenizer, settings(chat_template="mistral"))
    data = rows(tmp_path, {"messages": [TURNS[1], TURNS[1], TURNS[2]]})
    with pytest.raises(DataError, match="must alternate") as caught:
        render.render(data, base_tokenizer)
    assert caught.value.where.endswith(":1")


def test_a_base_model_needs_a_template(base_tokenizer, tmp_path) -> None:
    with pytest.raises(ModelError, match="no chat template") as caught:
        list(render.tokenize(rows(tmp_path, {"input": "Who are you?", "output": "I do not know."}), base_tokenizer))
    assert "prompt_template" in caught.value.help


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS[1:4], "completion": TURNS[4:]},
        {"messages": [*TURNS[1:2], {**TURNS[2], "train": False}, *TURNS[3:]]},
        {"messages": [*TURNS[1:2], {**TURNS[2], "weight": 0}, *TURNS[3:]]},
    ],
    ids=["prompt-completion", "train: false", "weight: 0"],
)
def test_turns_that_the_data_leaves_out_are_not_trained(row, tokenizer, tmp_path) -> None:
    """Guards what the data itself says: an assistant's turn in a prompt, or marked so, is context only."""
    assert trained_text(tokenizer, rows(tmp_path, row)) == ["Bye!<|im_end|>"]
