"""A tokenizer as llama.cpp keeps it in a GGUF file: the pieces, what joins them, and where text is split before."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder.errors import ModelError

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
KEEP = {"<unk>", "<s>", "<|endoftext|>"}  # Phi-3's special tokens after which spaces stay


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


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]) -> Vocabulary:
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
        raise _refused(f"it is a {model['type']} model, and only BPE is written")
    if (count := 1 + max([*model["vocab"].values(), *added])) > rows:
        raise _refused(f"it has {count:,} tokens, and the model has embeddings of {rows:,}")
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [UNUSED] * rows
    for token, row in model["vocab"].items():
        tokens[row], kinds[row] = token, BYTE if model["byte_fallback"] and _is_byte(token) else NORMAL
    if model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = UNKNOWN
    for row, token in added.items():
        tokens[row] = token["content"]
        if kinds[row] != UNKNOWN:
            kinds[row] = CONTROL if token["special"] else USER_DEFINED
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    keys: dict[str, Any] = {"tokens": tokens, "token_type": kinds, **_special(tokenizer, ends)}
    remarks = []
    if model["byte_fallback"]:
        space, remark = _space_prefix(facts, tokenizer.chat_template is not None)
        remarks += [remark] if remark else []
        # llama.cpp joins the two neighbours whose piece has the highest score; here each join has a rank.
        ranks = {left + right: rank for rank, (left, right) in reversed([*enumerate(pairs)])}
        scores = [-float(ranks.get(token, len(pairs) + 1)) for token in tokens]
        keys |= {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": space}
    else:
        keys |= {"model": "gpt2", "pre": _split(facts), "merges": [f"{left} {right}" for left, right in pairs]}
    like_phi3, remark = _strips(list(added.values()))
    remarks += [remark] if remark else []
    if others := [end for end in ends if end not in (keys.get("eos_token_id"), keys.get("eot_token_id"))]:
        named = ", ".join(map(str, tokenizer.convert_ids_to_tokens(others)))
        remarks.append(f"an answer may go on after {named}: a file names two ends")
    return Vocabulary(keys, like_phi3, remarks)


def _strips(added: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether spaces after the added tokens are left out as in Phi-3, which llama.cpp knows; else a remark."""
    every, after = ({t["content"] for t in added if t["rstrip"] or not only} for only in (False, True))
    before = {token["content"] for token in added if token["lstrip"]}
    like_phi3 = bool(after) and every >= KEEP and after == every - KEEP
    named = sorted(before if like_phi3 else before | after)
    return like_phi3, f"spaces beside {', '.join(named[:3])} stay, which are left out here" if named else ""


def _refused(why: str) -> ModelError:
    return ModelError(
        "this tokenizer cannot be written for llama.cpp",
        why=why,
        help="without --gguf, then llama.cpp's own convert_hf_to_gguf.py on the merged folder",
    )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> dict[str, Any]:
    """The ids of the special tokens, and which of them the tokenizer adds to a text."""
    bare, full = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = bos is not None and full[:1] == [bos], eos is not None and full[-1:] == [eos]
    if full != [*[bos] * before, *bare, *[eos] * after]:
        raise _refused(f"it adds {tokenizer.convert_ids_to_tokens(full)} to 'a', and llama.cpp knows BOS and EOS only")
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


def _split(facts: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text first."""
    normalizer, first = facts["normalizer"], facts["pre_tokenizer"] or {"type": "nothing"}
    if normalizer and normalizer["type"] != "NFC":  # which changes what nobody types
        raise _refused(f"it normalizes text by {normalizer['type']}")
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
        raise _refused(f"it splits text by none of the ways of {', '.join(SPLITS.values())}: {json.dumps(first)[:300]}")
    return name


def _space_prefix(facts: dict[str, Any], chats: bool) -> tuple[bool, str]:
    """Whether llama.cpp should put a space before a text, and before each after a special token; and a remark."""
    steps = [facts[key] for key in ("normalizer", "pre_tokenizer") if facts[key]]
    steps = [step for outer in steps for step in outer.get("normalizers", outer.get("pretokenizers", [outer]))]
    known = {"Prepend", "Replace", "Metaspace"}
    if other := [step["type"] for step in steps if step["type"] not in known]:
        raise _refused(f"it treats text by {other[0]} before it splits it")
    schemes = [step.get("prepend_scheme", "always") for step in steps if step["type"] == "Metaspace"]
    if schemes == ["first"] and chats:  # a special token comes first, and no text after one gets a space
        return False, "a prompt without the chat template begins without the space that it gets here"
    if schemes in (["first"], ["always"]):
        return True, "a text that begins with a space begins with two"
    return any(step["type"] == "Prepend" for step in steps), ""
