"""A model of distilgpt2's shape with random weights: it can be measured without a hub, but has learned nothing.

python docs/workshop/distilgpt2.py models/distilgpt2-shape
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

TOKENIZER = Path("models/smollm2-135m-instruct")

folder = Path(sys.argv[1])
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_head=12, n_embd=768))  # the figures of its config.json
model.generation_config.eos_token_id = model.config.eos_token_id = 2  # of the tokenizer below
model.save_pretrained(folder)
for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
    if (TOKENIZER / name).is_file():
        shutil.copy(TOKENIZER / name, folder)
print(f"{model.num_parameters():,} parameters in {folder}")
