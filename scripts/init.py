"""Make a folder to work in outside the clone: a recipe, rows to replace, launch configurations, Slurm templates.

    python scripts/init.py my_project

The folder must be new or empty. Its README.md lists the commands.
"""

from stepladder import errors, flags, starter


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("folder", type=flags.path, metavar="DIR", help="the folder; created if missing")
    args = parser.parse_args()
    starter.make_starter(args.folder)
    print(f"✔ {args.folder}: recipes/mine.yaml, and rows to replace in data/. Next:")
    print(starter.next_commands(args.folder))


if __name__ == "__main__":
    errors.exit_with(main)
