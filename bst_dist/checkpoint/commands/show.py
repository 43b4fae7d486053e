"""Print what a checkpoint's manifest says.

    bst ckpt show runs/demo
    bst ckpt show runs/demo --step 240

Step, tokens, losses, how many ranks wrote it under which ZeRO stage, and every file with its size and digest.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_base.sizes import readable_size
from bst_base.terminal import Sheet, print_table, say
from bst_dist.checkpoint.commands.common import add_run, add_step, select
from bst_dist.checkpoint.directory import size
from bst_dist.checkpoint.layout import Layout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_step(parser, "the newest")


def run(args: argparse.Namespace) -> dict[str, Any]:
    one = select(args.run, args.step)
    manifest, loss = one.manifest, one.validation_loss
    lines = {
        "checkpoint": one.path,
        "written": manifest["time"],
        "kind": "full: a run can resume from it" if one.full else "weights only: to evaluate and export",
        "pinned": "yes" if one.pinned else "no",
        "step": f"{manifest['step']:,}, {manifest['tokens']:,} tokens",
        "optimizer": f"{manifest['updates']:,} updates",
        "validation": "not evaluated at this step" if loss is None else f"{loss:.4f} nats per token",
        "written by": Layout(**manifest["layout"]),
        "data": ", ".join(
            f"{key} {value}" for key, value in manifest["data"].items() if key not in ("corpus", "weights")
        ),
        "skipped": f"{manifest['skipped']} steps' worth of data",
        "recipe": manifest["recipe"],
        "versions": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "size": f"{readable_size(size(manifest))} in {len(manifest['files'])} files",
    }
    for name, value in lines.items():
        say(f"{name:<12} {value}")
    _print_groups(manifest["groups"])
    files = [
        [name, str(record["rank"]), readable_size(record["bytes"]), record["sha256"][:16]]
        for name, record in manifest["files"].items()
    ]
    print_table(Sheet(("file", "rank", "size", "sha256"), files))
    return {"checkpoint": str(one.path), "pinned": one.pinned, "manifest": manifest}


def _print_groups(groups: dict[str, dict[str, Any]]) -> None:
    keys = list(dict.fromkeys(key for group in groups.values() for key in group))
    rows = [[name, *(str(group.get(key, "")) for key in keys)] for name, group in groups.items()]
    print_table(Sheet(("group", *keys), rows))
