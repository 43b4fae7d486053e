"""List a run's checkpoints, newest first: loss, how each was written, and why it is kept.

    bst ckpt ls runs/demo

The loss comes from an evaluation at the checkpoint's step, in nats per token. Only manifests are read; `bst ckpt
verify` reads the files too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from bst_base.sizes import readable_size
from bst_base.terminal import Sheet, print_table, say
from bst_dist.checkpoint.commands.common import add_run
from bst_dist.checkpoint.directory import DAMAGED, DELETED, PARTIAL, committed, damage, size, step_of
from bst_dist.checkpoint.retention import CheckpointEntry, leftovers, readable, reasons, superseded
from bst_dist.train.rundir import read_recipe
from bst_dist.train.schedule import constant_until

add_arguments = add_run
COLUMNS = ("step", "tokens", "loss", "size", "kind", "kept as", "dp x sp", "ZeRO")


def run(args: argparse.Namespace) -> dict[str, Any]:
    recipe = read_recipe(args.run)
    held = {one.path: one for one in readable(args.run)}
    sound = [one for one in held.values() if not damage(one.path, digests=False)]
    kept = reasons(sound, recipe.checkpoint, constant_until(recipe.schedule, recipe.train.steps))
    rows = [_row(path, held.get(path), kept) for path in committed(args.run)]
    left = [*leftovers(args.run, (PARTIAL, DELETED, DAMAGED)), *superseded(args.run)]
    _print(args.run, rows, left)
    return {"run": str(args.run), "checkpoints": rows, "leavings": [path.name for path in left]}


def _row(path: Path, one: CheckpointEntry | None, kept: dict[int, list[str]]) -> dict[str, Any]:
    row = {"step": step_of(path), "damage": damage(path, digests=False)}
    if one is None:
        return row
    manifest = one.manifest
    return row | {
        "tokens": manifest["tokens"],
        "validation_loss_nats": one.validation_loss,
        "bytes": size(manifest),
        "full": one.full,
        "pinned": one.pinned,
        "kept_as": kept.get(one.step, []),
        "layout": manifest["layout"],
        "time": manifest["time"],
    }


def _print(run_dir: Path, rows: list[dict[str, Any]], left: list[Path]) -> None:
    title = f"{run_dir}: {len(rows)} checkpoint{'s' * (len(rows) != 1)}"
    print_table(Sheet(COLUMNS, [_cells(row) for row in rows]), title)
    console = Console(highlight=False)
    for row in rows:
        for line in row["damage"]:
            console.print(Text(f"step {row['step']}: {line}", style="red"), soft_wrap=True)
    if left:
        say(f"left behind: {', '.join(path.name for path in left)} (bst ckpt gc)")


def _cells(row: dict[str, Any]) -> list[str]:
    if "tokens" not in row:
        return [str(row["step"]), *[""] * (len(COLUMNS) - 1)]
    loss, layout = row["validation_loss_nats"], row["layout"]
    return [
        str(row["step"]),
        f"{row['tokens']:,}",
        "" if loss is None else f"{loss:.4f}",
        readable_size(row["bytes"]),
        "full" if row["full"] else "weights",
        "damaged" if row["damage"] else ", ".join(row["kept_as"]) or "-",
        f"{layout['ranks'] // layout['sp']} x {layout['sp']}",
        str(layout["zero_stage"]),
    ]
