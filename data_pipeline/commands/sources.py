"""List the sources of text that `bst data prepare` reads, and their settings.

    bst data sources            # all of them
    bst data sources arxiv      # one, with its settings explained

Settings go into the `source:` section of a corpus's YAML file; launch/data/ has one for each kind of source.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from bst_base.documented import documentation
from bst_base.errors import UserError
from bst_base.settings import fields
from bst_base.terminal import Sheet, print_table
from data_pipeline.sources import SOURCES, Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", metavar="KIND", help="explain this one (default: list all)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print and report every source, or one."""
    if args.kind and args.kind not in SOURCES:
        raise UserError(f"no source {args.kind!r}; there are {', '.join(SOURCES)}")
    chosen = [args.kind] if args.kind else list(SOURCES)
    report = {kind: _describe(SOURCES[kind]) for kind in chosen}
    if args.kind:
        Console().print(" ".join((SOURCES[args.kind].__doc__ or "").split()), markup=False, highlight=False)
        rows = [(name, setting["default"], setting["help"]) for name, setting in report[args.kind]["settings"].items()]
        print_table(Sheet(("setting", "default", "what it is"), rows))
    else:
        rows = [(kind, found["summary"], ", ".join(found["settings"])) for kind, found in report.items()]
        print_table(Sheet(("source", "what it is", "settings"), rows))
    return {"sources": report}


def _describe(source: type[Source]) -> dict[str, Any]:
    """Return the summary of a source and its settings."""
    settings: dict[str, dict[str, str]] = {}
    for name, _, default, text in fields(source):
        if name in settings:  # the section has several kinds with this field
            settings[name]["help"] += f" {text}"
        elif name != "kind":
            settings[name] = {"default": _shown(default), "help": text}
    return {"summary": documentation(source)["kind"], "settings": settings}


def _shown(default: Any) -> str:
    return ", ".join(default) if isinstance(default, tuple) else str(default)
