"""Write a checkpoint's weights as safetensors, in one file or several, for other programs.

    bst ckpt convert runs/demo exported
    bst ckpt convert runs/demo exported --dtype bf16 --file-size 5e9

Tensors keep the model's names, and the recipe is written beside them. About 1 GiB is in memory at a time, so a small
machine can convert a large model. In bf16 or fp16 the SSM dynamics and the networks of Hyena filters stay in fp32,
which they need.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_base.files import atomic_directory
from bst_base.sizes import readable_size
from bst_dist.checkpoint.commands.common import add_run, add_step, select
from bst_dist.checkpoint.directory import WEIGHTS, open_shards, require_intact
from bst_dist.checkpoint.exporting import DTYPES, stored_dtypes, write_weights
from bst_dist.train.rundir import RECIPE, read_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_export(parser)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the output directory, the step, the precision and the file size."""
    parser.add_argument("output", type=Path, metavar="DIR", help="where to write; must not exist")
    add_step(parser, "the newest")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the weights (default: fp32)")
    parser.add_argument(
        "--file-size",
        type=float,
        default=math.inf,
        metavar="BYTES",
        help="maximum size of a file in bytes (default: one file for everything)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.output.exists():
        raise UserError(f"{args.output}: already exists; choose another directory")
    one, recipe = select(args.run, args.step), read_recipe(args.run)
    require_intact(one.path, WEIGHTS)
    weights = open_shards(one.path, WEIGHTS)
    dtypes = stored_dtypes(weights, recipe.model, DTYPES[args.dtype])
    with atomic_directory(args.output) as folder:
        names = write_weights(folder, weights, dtypes, args.file_size, {"step": str(one.step)})
        shutil.copy(args.run / RECIPE, folder / RECIPE)
    written = sum(path.stat().st_size for path in args.output.iterdir())
    print(
        f"{args.output}: {len(dtypes)} tensors of step {one.step}, {readable_size(written)} in {len(names)} "
        f"file{'s' * (len(names) > 1)}, {args.dtype}"
    )
    return {"output": str(args.output), "step": one.step, "bytes": written, "files": names, "dtype": args.dtype}
