"""Keep a checkpoint for good, whatever the run's settings say; or undo that.

    bst ckpt pin runs/demo --step 240
    bst ckpt pin runs/demo --step 240 --remove

`bst ckpt ls` shows which are pinned.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist.checkpoint.commands.common import add_run, add_step, select
from bst_dist.checkpoint.directory import PINNED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_step(parser, "the newest")
    parser.add_argument("--remove", action="store_true", help="remove the pin")


def run(args: argparse.Namespace) -> dict[str, Any]:
    one = select(args.run, args.step)
    if args.remove:
        (one.path / PINNED).unlink(missing_ok=True)
    else:
        (one.path / PINNED).touch()
    print(f"{one.path} {'is pinned: it stays' if one.pinned else 'is not pinned'}")
    return {"checkpoint": str(one.path), "pinned": one.pinned}
