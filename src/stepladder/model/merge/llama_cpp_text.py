"""A tokenizer as llama.cpp keeps it in a GGUF file, and a chat template as Ollama has it in a Modelfile."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from stepladder.data.templates.chat_template import limit_resources
from stepladder.errors import ModelError
from stepladder.model.pretrained import SAMPLING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of tokens
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How byte-level tokenizers split text before they join bytes, and llama.cpp's names of it.
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (WORDS + r"\p{N}{1,3}" + REST, "ByteLevel"): "llama-bpe",
    (WORDS + r"\p{N}" + REST, "ByteLevel"): "qwen2",
}
BYTE_TOKEN = re.compile("<0x.{2}>")
KEEP = {"<unk>", "<s>", "<|endoftext|>"}  # Phi-3's special tokens after which spaces stay

PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
# What `ollama create` converts from safetensors, of language models (ollama/ollama, convert/convert.go).
OLLAMA = {
    *("LlamaForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    *("Phi3ForCausalLM", "Qwen2ForCausalLM", "Olmo3ForCausalLM", "CohereForCausalLM", "GptOssForCausalLM"),
    *("DeepseekV3ForCausalLM", "Lfm2ForCausalLM"),
}
# Conversations that the two templates must render alike.
CONVERSATIONS = [
    [("user", "Where is my order?")],
    [("user", "Where?"), ("assistant", "On its way.\n\n1. See Orders.\n2. Wait."), ("user", "Thanks! 🎉 {'a': 1}")],
    [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."), ("user", "Oh.\nAnd now?")],
]


# ---- the tokenizer in a GGUF file ----


class Vocabulary(NamedTuple):
    """The tokenizer's part of the file.

    Args:
        keys: llama.cpp's, without their prefix `tokenizer.ggml.`.
        like_phi3: the spaces after special tokens are left out as in Phi-3.
        remarks: what differs in llama.cpp, one sentence each.
    """

    keys: dict[str, Any]
    like_phi3: bool
    remarks: list[str]


def build_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]) -> Vocabulary:
    """The tokenizer for llama.cpp.

    Args:
        rows: of the model's embeddings; those that have no token are filled up.
        ends: the tokens that end an answer.

    Raises:
        ModelError: llama.cpp does not know such a tokenizer, or would split text otherwise.
    """
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = facts["model"], {token["id"]: token for token in facts["added_tokens"]}
    if model["type"] != "BPE":
        raise _no_gguf(f"it is a {model['type']} model, and only BPE is written")
    if (count := 1 + max([*model["vocab"].values(), *added])) > rows:
        raise _no_gguf(f"it has {count:,} tokens, and the model has embeddings of {rows:,}")
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [UNUSED] * rows
    for token, row in model["vocab"].items():
        tokens[row], kinds[row] = token, BYTE if model["byte_fallback"] and BYTE_TOKEN.fullmatch(token) else NORMAL
    if model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = UNKNOWN
    for row, token in added.items():
        tokens[row] = token["content"]
        if kinds[row] != UNKNOWN:
            kinds[row] = CONTROL if token["special"] else USER_DEFINED
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    keys: dict[str, Any] = {"tokens": tokens, "token_type": kinds, **_special_tokens(tokenizer, ends)}
    remarks = []
    if model["byte_fallback"]:
        space, remark = _space_prefix(facts, tokenizer.chat_template is not None)
        remarks += [remark] if remark else []
        # llama.cpp joins the two neighbours whose piece has the highest score; here each join has a rank.
        ranks = {left + right: rank for rank, (left, right) in reversed([*enumerate(pairs)])}
        scores = [-float(ranks.get(token, len(pairs) + 1)) for token in tokens]
        keys |= {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": space}
    else:
        keys |= {"model": "gpt2", "pre": _split_name(facts), "merges": [f"{left} {right}" for left, right in pairs]}
    like_phi3, remark = _strip_rule(list(added.values()))
    remarks += [remark] if remark else []
    if others := [end for end in ends if end not in (keys.get("eos_token_id"), keys.get("eot_token_id"))]:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(others)))
        remarks.append(f"an answer may go on after {names}: a file names two ends")
    return Vocabulary(keys, like_phi3, remarks)


def _strip_rule(added: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether spaces after the added tokens are left out as in Phi-3, which llama.cpp knows; else a remark."""
    every, after = ({t["content"] for t in added if t["rstrip"] or not only} for only in (False, True))
    before = {token["content"] for token in added if token["lstrip"]}
    like_phi3 = bool(after) and every >= KEEP and after == every - KEEP
    tokens = sorted(before if like_phi3 else before | after)
    return like_phi3, f"spaces beside {', '.join(tokens[:3])} stay, which are left out here" if tokens else ""


def _no_gguf(why: str) -> ModelError:
    return ModelError(
        "this tokenizer cannot be written for llama.cpp",
        why=why,
        help="without --gguf, then llama.cpp's own convert_hf_to_gguf.py on the merged folder",
    )


def _special_tokens(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> dict[str, Any]:
    """The ids of the special tokens, and which of them the tokenizer adds to a text."""
    bare, full = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = bos is not None and full[:1] == [bos], eos is not None and full[-1:] == [eos]
    if full != [*[bos] * before, *bare, *[eos] * after]:
        raise _no_gguf(f"it adds {tokenizer.convert_ids_to_tokens(full)} to 'a', and llama.cpp knows BOS and EOS only")
    eos = eos if eos is not None else next(iter(ends), None)
    turn = next((end for end in ends if end != eos), None)
    ids = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "eot_token_id": turn,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    found: dict[str, Any] = {name: value for name, value in ids.items() if value is not None}
    return {**found, "add_bos_token": before, "add_eos_token": after}


def _split_name(facts: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text first."""
    normalizer, first = facts["normalizer"], facts["pre_tokenizer"] or {"type": "nothing"}
    if normalizer and normalizer["type"] != "NFC":  # which changes what nobody types
        raise _no_gguf(f"it normalizes text by {normalizer['type']}")
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    shape = tuple(str(step["pattern"].get("Regex") if step["type"] == "Split" else step["type"]) for step in steps)
    name = SPLITS.get(shape)
    # Where nothing else has split it, ByteLevel does; one digit at a time; Llama 3 takes whole words as they are.
    usual = [
        steps[-1].get("use_regex") == (name in ("gpt-2", "smollm")) and not steps[-1].get("add_prefix_space"),
        all(step["individual_digits"] for step in steps if step["type"] == "Digits"),
        bool(facts["model"].get("ignore_merges")) == (name == "llama-bpe"),
    ]
    if not name or not all(usual):
        raise _no_gguf(f"it splits text by none of the ways of {', '.join(SPLITS.values())}: {json.dumps(first)[:300]}")
    return name


def _space_prefix(facts: dict[str, Any], chats: bool) -> tuple[bool, str]:
    """Whether llama.cpp should put a space before a text, and before each after a special token; and a remark."""
    steps = [facts[key] for key in ("normalizer", "pre_tokenizer") if facts[key]]
    steps = [step for outer in steps for step in outer.get("normalizers", outer.get("pretokenizers", [outer]))]
    known = {"Prepend", "Replace", "Metaspace"}
    if other := [step["type"] for step in steps if step["type"] not in known]:
        raise _no_gguf(f"it treats text by {other[0]} before it splits it")
    schemes = [step.get("prepend_scheme", "always") for step in steps if step["type"] == "Metaspace"]
    if schemes == ["first"] and chats:  # a special token comes first, and no text after one gets a space
        return False, "a prompt without the chat template begins without the space that it gets here"
    if schemes in (["first"], ["always"]):
        return True, "a text that begins with a space begins with two"
    return any(step["type"] == "Prepend" for step in steps), ""


# ---- the chat template in a Modelfile ----


def check_ollama(architecture: str) -> None:
    """Raise ModelError where Ollama cannot convert a model's safetensors."""
    if architecture not in OLLAMA:
        raise ModelError(
            f"Ollama does not convert {architecture}",
            why=f"it converts {', '.join(sorted(OLLAMA))}",
            help="--ollama --gguf q8_0, which it runs as it is, where llama.cpp knows the architecture",
        )


def modelfile(tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any], model: str = ".") -> str:
    """Ollama's Modelfile for the folder that it lies in.

    Args:
        generation: the merged model's generation_config.json.
        model: what it is made from: this folder's safetensors, or a GGUF file in it.

    Raises:
        ModelError: Ollama's template would not render what the chat template renders.
    """
    try:
        template, system = go_template(tokenizer)
    except jinja2.TemplateError as error:
        raise _no_modelfile(f"it refuses a plain conversation: {error}") from None
    for conversation in CONVERSATIONS:
        if conversation[0][0] == "system" and '"system"' not in template:
            continue  # the chat template refuses such a turn, too
        # Ollama puts the Modelfile's SYSTEM before a conversation that has none.
        turns = [("system", system)] if system and conversation[0][0] != "system" else []
        ours, theirs = _render(tokenizer, conversation), execute(template, [*turns, *conversation])
        if ours != theirs:
            raise _no_modelfile(f"it treats a turn by its place: {ours!r} would be {theirs!r}")
    for text, name in ((template, "the chat template"), (system, "its system prompt")):
        if '"""' in text:  # it ends a value of a Modelfile, and there is no escape for it
            raise _no_modelfile(f'{name} holds """, after which a Modelfile continues with directives')
    lines = [f"FROM {model}" if model == "." else f"FROM ./{model}", f'TEMPLATE """{template}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    ends = generation.get("eos_token_id", tokenizer.eos_token_id)
    ids = ends if isinstance(ends, list) else [ends]
    for token in dict.fromkeys(tokenizer.convert_ids_to_tokens(ids)):
        if not str(token).isprintable() or '"' in str(token):
            raise _no_modelfile(f"the end token {token!r} cannot be quoted in a Modelfile")
        lines.append(f'PARAMETER stop "{token}"')
    for key, ollama in PARAMETERS.items():
        used = generation.get("do_sample") or key not in SAMPLING
        if used and (value := generation.get(key)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise _no_modelfile(f"generation_config.json: {key} is not a number: {value!r}")
            lines.append(f"PARAMETER {ollama} {value}")
    return "\n".join(lines) + "\n"


def _no_modelfile(why: str) -> ModelError:
    return ModelError(
        "this chat template cannot be written for Ollama",
        why=why,
        help="without --ollama; vLLM and transformers serve use the chat template itself",
    )


def go_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A Go template that renders each turn as the chat template does, and the system prompt that it adds by itself.

    What stands around a turn's text is read off from conversations with and without that turn.
    """
    if tokenizer.chat_template is None:
        raise ModelError("the tokenizer has no chat template", help="train with chat_template or prompt_template")
    user, assistant, system = ("user", "\x01u\x02"), ("assistant", "\x01a\x02"), ("system", "\x01s\x02")

    def added(turn: tuple[str, str], *before: tuple[str, str]) -> tuple[str, str]:
        """What stands before and after the text of a turn that follows others."""
        earlier = _render(tokenizer, [*before], False)
        left, _, right = _render(tokenizer, [*before, turn], False)[len(earlier) :].partition(turn[1])
        return left, right

    around = {"user": added(user, user, assistant), "assistant": added(assistant, user)}
    opening, _, _ = _render(tokenizer, [user], False).partition(user[1])
    default = opening.removesuffix(around["user"][0])  # a system turn that the template adds by itself
    try:
        left, _, rest = _render(tokenizer, [system, user], False).partition(system[1])
    except jinja2.TemplateError:  # it knows no system turn
        default = ""
    else:
        around["system"] = left, rest.partition(user[1])[0].removesuffix(around["user"][0])
        default = default.removeprefix(left).removesuffix(around["system"][1])
    prompt = _render(tokenizer, [user])[len(_render(tokenizer, [user], False)) :]
    for literal in (*(part for sides in around.values() for part in sides), prompt):
        if "{{" in literal or literal.endswith("{"):  # before an action, a brace becomes a part of it
            raise _no_modelfile(f"it writes {literal!r}, which Ollama would take for a directive of its own template")
    branches = [f'if eq .Role "{role}" }}}}{a}{{{{ .Content }}}}{b}' for role, (a, b) in around.items()]
    body = "{{ else ".join(branches)
    return f"{{{{ range .Messages }}}}{{{{ {body}{{{{ end }}}}{{{{ end }}}}{prompt}", default


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], prompt: bool = True) -> str:
    """The chat template's text, without the beginning that Ollama adds by itself."""
    messages = [{"role": role, "content": content} for role, content in turns]
    with limit_resources():
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    begins = tokenizer("", add_special_tokens=True)["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if begins and tokenizer.bos_token else text


def execute(template: str, turns: list[tuple[str, str]]) -> str:
    """What Go's text/template makes of the templates above: range, if eq .Role, else if, .Content, end."""
    parts = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL)
    assert parts
    branches = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', parts[1])
    texts = dict(zip(branches[1::2], branches[2::2], strict=True))
    return "".join(texts[role].replace("{{ .Content }}", content) for role, content in turns) + parts[2]
