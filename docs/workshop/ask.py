"""Ask several models of one OpenAI-compatible server the same: ask.py URL "QUESTION" MODEL [MODEL …]"""

import sys

from stepladder.evaluation import endpoint

url, question, *models = sys.argv[1:]
for model in models:
    server = endpoint.Endpoint(url, model)
    (answer,) = endpoint.answers(server, [[{"role": "user", "content": question}]], max_new_tokens=60)
    print(f"> {model}\n  " + "\n  ".join(answer.text.splitlines()))
