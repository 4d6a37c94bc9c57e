"""What each chat template that TRL ships does with each kind of conversation: right, warned of, or refused.

    python tests/chat_templates.py                    # prints the table
    python tests/chat_templates.py --page docs/templates.md

A cell is judged by the texts of the conversation, not by the code that finds them: the assistant's words stand in the
trained stretches and nobody else's do, a stretch begins where the prompt ends, and it ends with a special token.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from stepladder.data import mixture, render, templates
from stepladder.data.row_renderer import Remarks
from stepladder.data.templates import chat_template
from stepladder.errors import DataError
from tiny import SMOLLM2

PAGE = Path("docs/templates.md")
OWN = "the model's own"
FAMILIES = {  # of recipes/models/: the template that their models carry
    "SmolLM2": OWN,
    "Llama 3.1": "llama3_1",
    "Phi-3 mini": "phi3",
    "Qwen3": "qwen3",
    "GPT-2, DistilGPT-2, OPT": "prompt_template",
}
USERS = ("Where do herons sleep?", "And where do otters?")
ANSWERS = ("Herons sleep in tall reeds.", "Otters sleep on the water.")
THOUGHTS = ("Herons like shallow lakes.", "Otters hold each other.")
INLINE = tuple(zip(THOUGHTS, ANSWERS, strict=True))
SYSTEM = "Speak of animals only."
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "find_nest", "arguments": {"bird": "grey heron"}}}
RESULT = "Nest found in an alder."
TOOL = {
    "type": "function",
    "function": {
        "name": "find_nest",
        "description": "Finds a nest.",
        "parameters": {"type": "object", "properties": {"bird": {"type": "string", "description": "Its name."}}},
    },
}


def turns(*contents: str, **beside: tuple[str, ...]) -> list[dict[str, Any]]:
    """User and assistant by turns; `beside` holds further texts of the assistant's turns."""
    messages: list[dict[str, Any]] = []
    for number, (user, answer) in enumerate(zip(USERS, contents, strict=False)):
        extra = {key: texts[number] for key, texts in beside.items()}
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer, **extra}]
    return messages


def with_tool(**beside: str) -> dict[str, Any]:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL], **beside}
    result = {"role": "tool", "name": "find_nest", "tool_call_id": "abcdefghi", "content": RESULT}
    last = {"role": "assistant", "content": ANSWERS[0]}
    return {"messages": [{"role": "user", "content": USERS[0]}, call, result, last], "tools": [TOOL]}


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": turns(*ANSWERS[:1])},
    "two turns": {"messages": turns(*ANSWERS)},
    "system": {"messages": [{"role": "system", "content": SYSTEM}, *turns(*ANSWERS)]},
    "inline thoughts": {"messages": turns(*(f"<think>\n{t}\n</think>\n\n{a}" for t, a in INLINE))},
    "reasoning": {"messages": turns(*ANSWERS, reasoning_content=THOUGHTS)},
    "tool call": with_tool(),
    "reasoning, tool": with_tool(reasoning_content=THOUGHTS[0]),
}
ASSISTANT = (*ANSWERS, *THOUGHTS, "grey heron")
OTHERS = (*USERS, SYSTEM, RESULT, "Finds a nest.", "Its name.")
REASONS = {  # what a cell says, by what the message of a refusal says
    "render the reasoning": "reasoning",
    "render the tool call": "calls",
    "render the argument": "calls",
    "render the tool list": "tools",
    "render the text of a message": "a turn",
    "refuses this conversation": "turns",
}
WARNINGS = {"unopened": "thought", "dropped_thoughts": "dropped"}


def names() -> list[str]:
    """The templates: the model's own, ours, TRL's, and a `prompt_template`."""
    shipped = {name for name in templates.load_named_templates() if not name.endswith("_training")}
    return [OWN, "prompt_template", *sorted(shipped)]


def tokenizer_with(name: str, settings: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    if name == "prompt_template":
        templates.prepare(tokenizer, settings(prompt_template="### User: {input}\n### Assistant: "))
    elif name != OWN:
        # As the tokenizers of the models that carry it: all of its tokens are known, those of tools too.
        tokens = dict.fromkeys(templates.TURN_TOKEN.findall(templates.load_template(name)))
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        templates.prepare(tokenizer, settings(chat_template=name))
    return tokenizer


def cell(tokenizer: Any, example: dict[str, Any]) -> str:
    """`right`, `warned: …`, `refused: …`, or `WRONG: …`."""
    remarks = Remarks()
    (row,) = render.tokenize(mixture.Rows("rows", [example], ["rows:1"]), tokenizer, "all_turns", remarks)
    if isinstance(row, DataError):
        return "refused: " + next(short for text, short in REASONS.items() if text in row.what)
    kinds = {kind for kind, _ in remarks.rows}
    before, stretches, ends = "", [], []
    groups = itertools.groupby(zip(row.ids, row.labels, strict=True), key=lambda pair: pair[1] != render.IGNORED)
    for trained, group in groups:
        ids = [token for token, _ in group]
        text = tokenizer.decode(ids)
        if trained:
            stretches.append((before, text))
            ends.append(ids[-1])
        before += text
    if fault := _fault(tokenizer, example, before, stretches, ends, kinds):
        return f"WRONG: {fault}"
    short = [WARNINGS[kind] for kind in WARNINGS if kind in kinds]
    return f"warned: {', '.join(short)}" if short else "right"


def _fault(tokenizer: Any, example: dict, whole: str, stretches: list, ends: list[int], kinds: set[str]) -> str:
    trained = "\n".join(text for _, text in stretches)
    said = str(example)
    for text in OTHERS:
        if text in said and (text not in whole or text in trained):
            return f"{text!r} is lost or trained"
    for text in ASSISTANT:
        dropped = text in THOUGHTS and text != THOUGHTS[-1] and "dropped_thoughts" in kinds
        if text in said and trained.count(text) != 1 and not dropped:
            return f"{text!r} is not trained once"
    if "find_nest" in said and "find_nest" not in trained:
        return "the call is not trained"
    answers = sum(message["role"] == "assistant" for message in example["messages"])
    if len(stretches) != answers or any(end not in tokenizer.all_special_ids for end in ends):
        return f"{len(stretches)} stretches, {answers} turns, ended by {tokenizer.convert_ids_to_tokens(ends)}"
    prompt = render.prompt_text({"messages": [{"role": "user", "content": USERS[0]}]}, tokenizer)
    pieces = [prompt[max(0, n - 8) : n] for n in range(len(prompt), len(prompt) - 40, -1)]
    if not any(stretches[0][0].endswith(piece) for piece in pieces):
        return f"the first answer follows {stretches[0][0][-20:]!r}, the prompt ends in {prompt[-20:]!r}"
    return ""


def table(settings: Any) -> dict[str, dict[str, str]]:
    """The cells of each template."""
    return {
        name: {kind: cell(tokenizer, example) for kind, example in CONVERSATIONS.items()}
        for name in names()
        for tokenizer in [tokenizer_with(name, settings)]
    }


def page(cells: dict[str, dict[str, str]]) -> str:
    counts = Counter(cell.split(":")[0] for row in cells.values() for cell in row.values())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "trl"))
    families: dict[str, str] = {template: family for family, template in FAMILIES.items()}
    lines = [
        "# Chat templates",
        "",
        "```bash",
        "python scripts/check.py --recipe lora --chat_template chatml --show 1   # prints a rendered row",
        "```",
        "",
        "A chat template is a Jinja program that turns a conversation into the text that a model reads. It marks who "
        "says what, and where a turn ends.",
        "",
        "- An instruction-tuned model has its own template: set nothing.",
        "- A base model needs one: `chat_template: chatml`, `qwen3` for rows with thoughts, `qwen2_5` for tool calls, "
        'or `prompt_template: "### User: {input}\\n### Assistant: "` for single questions.',
        "- `chat_template` takes a name from the table or a template, `chat_template_path` a Jinja file or "
        "another model.",
        "",
        "Workshop page [6.1](workshop/6.1-chat-templates.md) shows three of them.",
        "",
        "## What each template renders",
        "",
        "`make templates` renders each kind of row by each template, and writes this page:",
        "",
        "- ✔ right: the assistant's text, calls and thoughts and the end of each of its turns have a loss, and nothing "
        "else has.",
        "- ⚠ right, with a warning. *thought*: the generation prompt opens a thought that the answer does not have. "
        "*dropped*: the template drops the reasoning of earlier turns.",
        "- ✘ refused: the template would lose a part of the row. Training stops there, or skips and lists the row "
        "(`on_bad_row: skip`). *reasoning*, *calls*, *tools*, *a turn*: what it does not render. *turns*: the "
        "template itself raises an error, for a system turn or for unknown roles.",
        "",
        "| column | row |",
        "| --- | --- |",
        "| one turn, two turns | one or two questions with answers |",
        "| system | two turns after a system turn |",
        "| inline thoughts | answers that begin with `<think>…</think>` |",
        "| reasoning | the same thoughts under `reasoning_content` |",
        "| tool call | a question, a call, the tool's result, the answer; and the list of `tools` |",
        "| reasoning, tool | the same with a thought before the call |",
        "",
        f"{len(cells)} templates, {sum(counts.values())} cells: {', '.join(f'{n} {k}' for k, n in counts.items())}. "
        f"{datetime.date.today()}, {versions}; the tokenizer is SmolLM2's with each template's tokens added.",
        "",
        "| template | " + " | ".join(CONVERSATIONS) + " |",
        "| --- |" + " --- |" * len(CONVERSATIONS),
    ]
    for name, row in cells.items():
        title = f"`{name}`" if name != OWN else OWN
        title += f" ({families[name]})" if name in families else ""
        lines.append(f"| {title} | " + " | ".join(_short(row[kind]) for kind in CONVERSATIONS) + " |")
    lines += [
        "",
        "The template of Mistral 7B v0.3 differs from `mistral`: it writes the system prompt into the last user turn.",
        "",
        "## How rows are checked",
        "",
        "A conversation is rendered once with markers in place of its texts. The markers in the output, their order "
        "and the text between them are the layout of all conversations of that form. A row must render to this layout, "
        "filled with its texts. An answer begins where the generation prompt ends. It ends with the last special token "
        "that closes the turn wherever it occurs. If a template renders an earlier turn differently when more turns "
        "follow, TRL's version of the template for training is used.",
        "",
        "## Limits for templates",
        "",
        "The template of a downloaded model is code from a third party. Jinja's sandbox denies it access to files and "
        "Python; Stepladder adds limits:",
        "",
        f"- at most {chat_template.MAX_SOURCE:,} characters per template",
        f"- for each rendering of a conversation, {chat_template.MAX_SECONDS:g} s of processor time and, on Linux, "
        f"{chat_template.MAX_MEMORY >> 20} MiB of memory",
        f"- for its output, {chat_template.MAX_CHARACTERS:,} characters, or {chat_template.MAX_GROWTH} times those of "
        "the row if that is more",
        "",
        "The first rendering that exceeds a limit ends the command with one message and exit code 2. `on_bad_row: "
        "skip` does not skip it, since the next row would take as much.",
        "",
    ]
    return "\n".join(lines)


def _short(cell: str) -> str:
    kind, _, why = cell.partition(": ")
    return f"{ {'right': '✔', 'warned': '⚠', 'refused': '✘'}.get(kind, kind) } {why}".strip()


def main() -> None:
    from stepladder.recipe.recipe import Recipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table as a page")
    args = parser.parse_args()
    cells = table(lambda **keys: Recipe(name="test", path=Path("test.yaml"), values=keys, origins={}))
    text = page(cells)
    if args.page:
        args.page.write_text(text, encoding="utf-8")
    else:
        print(text)
    faults = [f"{name}, {kind}: {c}" for name, row in cells.items() for kind, c in row.items() if "WRONG" in c]
    print("\n".join(faults) or "no cell is wrong")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
