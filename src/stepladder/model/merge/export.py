"""A merged model elsewhere: a Modelfile for Ollama whose template is proved, and the hub."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from stepladder.console import quoted
from stepladder.data.templates.chat_template import limit_resources
from stepladder.errors import ModelError
from stepladder.model.load import SAMPLING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        raise _not_for_ollama(f"it refuses a plain conversation: {error}") from None
    for conversation in CONVERSATIONS:
        if conversation[0][0] == "system" and '"system"' not in template:
            continue  # the chat template refuses such a turn, too
        ours, theirs = _rendered(tokenizer, conversation), execute(template, _with_default(conversation, system))
        if ours != theirs:
            raise _not_for_ollama(f"it treats a turn by its place: {ours!r} would be {theirs!r}")
    for text, name in ((template, "the chat template"), (system, "its system prompt")):
        if '"""' in text:  # it ends a value of a Modelfile, and there is no escape for it
            raise _not_for_ollama(f'{name} holds """, after which a Modelfile goes on with directives')
    lines = [f"FROM {model}" if model == "." else f"FROM ./{model}", f'TEMPLATE """{template}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    ends = generation.get("eos_token_id", tokenizer.eos_token_id)
    ids = ends if isinstance(ends, list) else [ends]
    for token in dict.fromkeys(tokenizer.convert_ids_to_tokens(ids)):
        if not str(token).isprintable() or '"' in str(token):
            raise _not_for_ollama(f"the end token {token!r} cannot be quoted in a Modelfile")
        lines.append(f'PARAMETER stop "{token}"')
    for key, ollama in PARAMETERS.items():
        used = generation.get("do_sample") or key not in SAMPLING
        if used and (value := generation.get(key)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise _not_for_ollama(f"generation_config.json: {key} is no number: {value!r}")
            lines.append(f"PARAMETER {ollama} {value}")
    return "\n".join(lines) + "\n"


def _not_for_ollama(why: str) -> ModelError:
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
        earlier = _rendered(tokenizer, [*before], False)
        left, _, right = _rendered(tokenizer, [*before, turn], False)[len(earlier) :].partition(turn[1])
        return left, right

    around = {"user": added(user, user, assistant), "assistant": added(assistant, user)}
    opening, _, _ = _rendered(tokenizer, [user], False).partition(user[1])
    default = opening.removesuffix(around["user"][0])  # a system turn that the template adds by itself
    try:
        left, _, rest = _rendered(tokenizer, [system, user], False).partition(system[1])
    except jinja2.TemplateError:  # it knows no system turn
        default = ""
    else:
        around["system"] = left, rest.partition(user[1])[0].removesuffix(around["user"][0])
        default = default.removeprefix(left).removesuffix(around["system"][1])
    prompt = _rendered(tokenizer, [user])[len(_rendered(tokenizer, [user], False)) :]
    for literal in (*(part for sides in around.values() for part in sides), prompt):
        if "{{" in literal or literal.endswith("{"):  # before an action, a brace becomes a part of it
            raise _not_for_ollama(f"it writes {literal!r}, which Ollama would take for a directive of its own template")
    branches = [f'if eq .Role "{role}" }}}}{a}{{{{ .Content }}}}{b}' for role, (a, b) in around.items()]
    body = "{{ else ".join(branches)
    return f"{{{{ range .Messages }}}}{{{{ {body}{{{{ end }}}}{{{{ end }}}}{prompt}", default


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], prompt: bool = True) -> str:
    """The chat template's text, without the beginning that Ollama adds by itself."""
    messages = [{"role": role, "content": content} for role, content in turns]
    with limit_resources():
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    begins = tokenizer("", add_special_tokens=True)["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if begins and tokenizer.bos_token else text


def _with_default(turns: list[tuple[str, str]], system: str) -> list[tuple[str, str]]:
    """Ollama puts the Modelfile's SYSTEM before a conversation that has none."""
    return turns if not system or turns[0][0] == "system" else [("system", system), *turns]


def execute(template: str, turns: list[tuple[str, str]]) -> str:
    """What Go's text/template makes of the templates above: range, if eq .Role, else if, .Content, end."""
    found = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL)
    assert found
    branches = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', found[1])
    texts = dict(zip(branches[1::2], branches[2::2], strict=True))
    return "".join(texts[role].replace("{{ .Content }}", content) for role, content in turns) + found[2]


def push(folder: Path, name: str) -> str:
    """Upload the folder to the hub as a private model; returns its address.

    Raises:
        ModelError: no network, no token, or the hub refuses. The folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the hub's client raises its own, httpx's and OSErrors
        raise ModelError(
            f"{folder} is merged, and could not be pushed to {name}",
            why=str(error).strip().splitlines()[0],
            help=f"hf auth login, then: {quoted('hf', 'upload', name, folder)}",
        ) from None
    return address
