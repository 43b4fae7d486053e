"""Every setting of a recipe: its name, type, default and meaning; or those of one section.

    bst recipe
    bst recipe schedule
    bst recipe --markdown > docs/recipes.md

Every setting can be changed on the command line of `bst train` as section.field=value.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from bst_base.errors import UserError
from bst_base.settings import Config, fields
from bst_dist.config import Recipe

Row = tuple[str, str, Any, str]  # dotted name, type, default, meaning

INTRODUCTION = """# Recipes

One YAML file describes one run completely. Change a setting on the command line by its dotted name; for an unknown
name, the error names the nearest one:

    bst train launch/recipes/demo.yaml train.steps=200 model.context.variant=MF

`bst train demo` does the same: the program comes with the recipes of `launch/recipes/` and finds them by name from any
directory. A relative path in a recipe starts from the recipe's folder, wherever you run the command (for a recipe in
`launch/`: from the folder that holds `launch/`). On the command line, and in a recipe that comes with an installed bst,
it starts from the working directory. `~` at the beginning of a path is the home directory.

Values mean what they look like, in recipes, corpora, sweeps and overrides: `1e-3`, `1e3`, `1_000` are numbers, `true`
and `false` are the only booleans, dates are text. Ambiguous values are an error that names the line: `yes`, `no`, `on`,
`off` and numbers with a leading zero, unless quoted, and a key that is given twice in one section.

A setting of the type `section | None` is off until its own settings, listed after it, are given: `branch.run=../trunk
branch.step=400`. There, `required` means: if the section is given. `[]` in a name stands for every entry of a list. The
list is written as a whole: `train.length_changes=[{step: 2000, sequence_length: 4096}]`.

The run directory keeps the recipe as `recipe.yaml`, with every default filled in. `bst recipe SECTION` prints a part of
this page, and `bst recipe --markdown` prints all of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments shared by the commands that describe the settings of a file."""
    parser.add_argument(
        "section", nargs="?", default="", metavar="SECTION", help="show only settings whose names begin with this"
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of a table")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the settings of a recipe, and return them as a report."""
    return describe(Recipe, INTRODUCTION, args)


def describe(settings: type[Config], introduction: str, args: argparse.Namespace, top: str = "run") -> dict[str, Any]:
    """Print the settings of a file of type `settings`, and return them as a report.

    `introduction` and `top`: as in `markdown`. Raises UserError for an unknown section.
    """
    every: list[Row] = list(fields(settings))
    found = [row for row in every if f"{row[0]}.".startswith(f"{args.section}." if args.section else "")]
    if not found:
        known = ", ".join(dict.fromkeys(name.partition(".")[0] for name, *_ in every))
        raise UserError(f"no setting begins with {args.section!r}; there are: {known}")
    if args.markdown:
        print(markdown(found, introduction, top))
    else:
        _print(found)
    return {
        "settings": [dict(zip(("name", "type", "default", "meaning"), map(str, row), strict=True)) for row in found]
    }


def markdown(rows: list[Row], introduction: str = INTRODUCTION, top: str = "run") -> str:
    """Return the settings as a Markdown document, one table per section.

    `top`: heading of the settings that belong to no section.
    """
    parts, section = [introduction], None
    for name, kind, default, meaning in sorted(rows, key=lambda row: "." in row[0]):
        own = name.partition(".")[0] if "." in name else top
        if own != section:
            parts.append(f"\n## {own}\n\n| setting | type | default | meaning |\n| --- | --- | --- | --- |")
            section = own
        cells = (f"`{name}`", _type(kind), f"`{default}`", meaning)
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts)


def _type(kind: str) -> str:
    """Return a readable form of a type: Literal['wsd', 'cosine'] becomes wsd | cosine."""
    said = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), kind)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", said)


def _print(rows: list[Row]) -> None:
    console = Console(highlight=False)
    for name, kind, default, meaning in rows:
        console.print(f"[bold]{escape(name)}[/]  {escape(_type(kind))}, {escape(_default(default))}")
        console.print(Padding(escape(meaning), (0, 0, 0, 4)))


def _default(default: Any) -> str:
    return "required" if default == "required" else f"default {default}"
