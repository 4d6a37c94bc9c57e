"""Describe a model: name, base, task, data, method, size, template, and an example prompt.

    python scripts/inspect_model.py runs/lora
    python scripts/inspect_model.py HuggingFaceTB/SmolLM2-360M-Instruct

Reads the card and the configuration of a run folder, an adapter, a merged model or any other, on disk or
on the hub. Loads no weights.
"""

import json

from stepladder import console, errors, flags
from stepladder.model import card


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    console.quiet_libraries()
    facts = card.describe(args.model)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for name, value in facts.items():
        print(f"{name:15} {value!r}" if name == "example prompt" else f"{name:15} {value}")


if __name__ == "__main__":
    errors.exit_with(main)
