"""Translate an Axolotl configuration into a recipe, and account for every key in it.

    python scripts/import_axolotl.py config.yml -o recipe.yaml

The table shows the outcome for each key: translated, dropped (it has no effect here, or asks for
a default), or not supported, with the reason. A key that is not supported and would
change the training (marked ✘) stops the import with exit code 2; --force leaves it out, and the
recipe's first lines say so. An existing recipe is kept unless --overwrite is given.
"""

import json

from stepladder import errors, flags
from stepladder.recipe import axolotl_config, axolotl_import


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("config", type=flags.path, help="an Axolotl configuration")
    parser.add_argument("-o", "--output", type=flags.path, required=True, help="the recipe to write")
    parser.add_argument("--force", action="store_true", help="leave out unsupported keys that change the training")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing recipe")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args()

    axolotl_import.check_output(args.config, args.output, args.overwrite)
    translation = axolotl_import.translate(axolotl_config.read_config(args.config))
    stops = [row for row in translation.rows if row.stops]
    written = args.force or not stops
    if written:
        axolotl_import.write_recipe(translation, args.output)
    if args.json:
        print(json.dumps(axolotl_import.as_json(translation, args.output if written else None), indent=2, default=str))
    else:
        axolotl_import.print_table(translation)
        if written:
            counts = [
                f"{sum(r.outcome.kind == kind for r in translation.rows)} {kind}" for kind in axolotl_import.STYLES
            ]
            print(f"\n✔ wrote {args.output}: {'; '.join(counts)}\n  {translation.command(str(args.output))}")
    if not written:
        raise errors.RecipeErrors([_error(row) for row in stops] + [FORCE])


FORCE = errors.RecipeError(
    "nothing was written", why="these keys would change the training", help="mend them, or leave them out by --force"
)


def _error(row: axolotl_import.Row) -> errors.RecipeError:
    what = f"{row.key}: {axolotl_import.shorten(row.value)} is not supported"
    return errors.RecipeError(what, where=row.where, why=row.outcome.reason)


if __name__ == "__main__":
    errors.exit_with(main)
