"""Read every file of a run's checkpoints and check its size and digest against the manifest.

    bst ckpt verify runs/demo
    bst ckpt verify runs/demo --step 240

Exit status: 1 when any file is damaged or missing; all of them are named. 74 when one cannot be read.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist.checkpoint.commands.common import add_run, add_step, select
from bst_dist.checkpoint.directory import committed, damage, step_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_step(parser, "all of them")


def run(args: argparse.Namespace) -> dict[str, Any]:
    paths = [path for path in committed(args.run) if args.step in (None, step_of(path))]
    if not paths:
        select(args.run, args.step)  # says that there is none
    found = {}
    for path in paths:
        found[path.name] = damage(path)
        print(f"{path.name}  {'valid' if not found[path.name] else 'DAMAGED'}", flush=True)
        for line in found[path.name]:
            print(f"    {line}")
    return {"passed": not any(found.values()), "damage": found}
