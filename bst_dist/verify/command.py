"""Verify that a recipe's step gives the gradients of one process, in every parallel layout.

    bst verify launch/recipes/demo.yaml
    bst verify launch/recipes/demo.yaml data.documents=isolated --sp 1 2 --zero 2 3 --precision fp32
    bst verify launch/recipes/demo.yaml --zero 0 1 2 3 --sp 1 2 4 --checkpointing none every-layer \\
        --variants SH MH MF --precision fp32 bf16

A small copy of the recipe takes one step on made-up tokens (no corpus needed), on this machine's ranks as `bst train`
starts them. Its loss, its global gradient norm and every parameter's gradient are compared with those of one plain
torch process in double precision. A relative error may be four times that of one process in the same precision, and
never more than 0.25. Recipes that carry state between steps take two steps, and the second is compared.

Exit status: 0 all combinations pass; 1 one fails; 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_base.host import free_port
from bst_dist.cluster.local import launch
from bst_dist.cluster.processes import HostRanks
from bst_dist.config import load_recipe
from bst_dist.parallel.ranks import choose_accelerator
from bst_dist.report.saved import write_report
from bst_dist.verify import grid

FILE = "verified.json"
"""The certificate in a run directory."""
PROGRAM = (sys.executable, "-m", "bst_dist.verify")
"""The command that every rank runs."""
NOTICE = "bst verify: told to stop ({}): the ranks end without a verdict"
"""The message at a signal."""


class VerifyError(UserError):
    """The ranks ended without writing a certificate."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="the run's YAML file, or the name of one of launch/recipes/"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help=f"write all figures to DIR/{FILE} (default: not written)"
    )
    grid.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks, which print the table. Return the certificate."""
    choose_accelerator()
    asked = grid_of(args)
    grid.require_slices(asked)
    world = asked.world
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        found = Path(folder) / "found.json"
        given = {name: value for name, value in vars(args).items() if name not in ("json", "run_dir")}
        job.write_text(json.dumps(given | {"ranks": world}, default=str))
        share = HostRanks(0, world, world, "127.0.0.1", free_port())
        ended = launch([*PROGRAM, str(job), str(found)], share, notice=NOTICE)
        if not found.exists():
            raise VerifyError(f"no verdict: {ended.explain({})}")
        report = json.loads(found.read_text())
    _tell(report)
    if args.run_dir:
        write_report(args.run_dir / FILE, "verify", report)
    return report


def grid_of(args: argparse.Namespace) -> grid.Grid:
    """Return the grid that the arguments describe. Raise UserError if they are invalid."""
    return grid.build(load_recipe(args.recipe, args.overrides), args)


def _tell(report: dict[str, Any]) -> None:
    lines = report["combinations"]
    counts = Counter(line["passed"] for line in lines)
    worst = max(lines, key=lambda line: line["error"] / line["allowed"])
    verdict = "PASS" if report["passed"] else "FAIL"
    print(
        f"\n{verdict}: {counts[True]} of {len(lines)} combinations on {report['ranks']} ranks in "
        f"{report['seconds']:.0f} s. Nearest to its limit: {worst['parameter']}, {worst['error']:.1e} of "
        f"{worst['allowed']:.1e} allowed"
    )
    if not report["passed"]:
        print(f"\nbst verify: {report['explanation']}", file=sys.stderr)
