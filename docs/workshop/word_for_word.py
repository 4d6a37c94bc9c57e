"""How many of its training questions a run answers word for word: word_for_word.py runs/break [ROWS]"""

import sys

from stepladder import console

console.quiet_libraries()

from stepladder.evaluation import generation, held_out, questions, sides  # noqa: E402
from stepladder.model import pretrained  # noqa: E402

console.quiet_progress_bars()
rows = sides.training_rows(sys.argv[1], held_out.Runs([]))
assert rows is not None, "no run folder"
asked = questions.extract_questions(rows)[: int(sys.argv[2]) if len(sys.argv) > 2 else 8]
model, tokenizer = pretrained.load_for_inference(sys.argv[1])
said = generation.generate_answers(model, tokenizer, [question.example for question in asked], max_new_tokens=200)
same = sum(answer.text.strip() == question.reference.strip() for answer, question in zip(said, asked, strict=True))
print(f"{same} of {len(asked)} training questions answered word for word, the first:")
print(f"> {asked[0].text}\n{said[0].text.strip()}")
