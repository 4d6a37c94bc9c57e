"""A conversation as text and as token ids, without and with the marks that ask for an answer.

python docs/workshop/token_ids.py models/smollm2-135m-instruct
"""

import sys

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, how are you?"}]
for asks in (False, True):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    print(f"add_generation_prompt={asks}: {len(ids)} tokens\n{ids}\n{tokenizer.decode(ids)}")
