"""Write the report of a sweep: the answer, the figures and every run, as one HTML file and as Markdown.

    bst sweep report launch/sweeps/mini.yaml --out docs/study

Reads the table that `bst sweep collect` wrote; figures are PNG and PDF.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bst_base.arguments import at_least
from bst_base.outputs import write_afterwards
from bst_base.terminal import say
from bst_dist.study.report import document
from bst_dist.study.report.formatting import plain
from bst_dist.study.sweep import present
from bst_dist.study.sweep.commands.common import add_sweep, open_table
from bst_dist.study.sweep.coordinates import read_check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the sweep's directory)")
    parser.add_argument(
        "--draws",
        type=at_least(2),
        default=200,
        metavar="N",
        help="number of bootstrap resamples for the intervals (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep, rows = open_table(args)
    found = present.find(sweep, rows, args.draws, read_check(sweep.root))
    blocks, out = present.blocks(sweep, rows, found), args.out or sweep.root
    files = document.files(blocks, out)

    def write() -> None:
        document.write(blocks, out, title=f"Sweep {sweep.name}")
        for path in files[:2]:
            say(f"wrote {path}")

    write_afterwards(args, write)
    return {"files": [str(path) for path in files], **plain(found)}
