"""The floor that train.py is held against: the shortest loop that trains the same rows, written for speed.

    python benchmarks/bare_loop.py lora ROWS.jsonl 18 5e-4

bf16 weights and arithmetic where nothing is trained, rows of alike length together, logits of the trained
tokens only.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def main() -> None:
    method, path, steps, rate = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    folder = Path(__file__).parent.parent / "models/smollm2-135m-instruct"
    torch.manual_seed(42)
    torch.set_num_threads(torch.get_num_threads())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = torch.bfloat16 if method == "lora" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    base = model.get_base_model() if method == "lora" else model
    rows = [row_of(json.loads(line), tokenizer) for line in Path(path).read_text().splitlines()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    batches: list[list[tuple[list[int], int]]] = []
    for step in range(1, steps + 1):
        if not batches:
            random.Random(step).shuffle(rows)
            ordered = sorted(rows, key=lambda row: len(row[0]))
            batches = [ordered[at : at + BATCH] for at in range(0, len(rows), BATCH)]
            random.Random(step).shuffle(batches)
        batch = batches.pop()
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(BATCH, longest, dtype=torch.long)
        mask = torch.zeros(BATCH, longest, dtype=torch.long)
        chosen = torch.zeros(BATCH, longest, dtype=torch.bool)
        for index, (row, prompt) in enumerate(batch):
            ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
            chosen[index, prompt - 1 : len(row) - 1] = True
        with torch.autocast("cpu", torch.bfloat16):
            hidden = base.model(input_ids=ids, attention_mask=mask).last_hidden_state
            logits = base.lm_head(hidden[chosen])
            loss = torch.nn.functional.cross_entropy(logits.float(), ids.roll(-1, 1)[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step} loss {loss.item():.4f}", flush=True)


def row_of(row: dict, tokenizer: object) -> tuple[list[int], int]:
    """Tokens of a conversation, and how many of them are the prompt's."""
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)  # type: ignore[attr-defined]
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)  # type: ignore[attr-defined]
    return whole, len(prompt)


if __name__ == "__main__":
    main()
