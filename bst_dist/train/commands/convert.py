"""Write a checkpoint's weights as safetensors, in one file or several, for any program that reads them.

    bst ckpt convert runs/demo exported
    bst ckpt convert runs/demo exported --dtype bf16 --file-size 5e9

The names are the model's own; the recipe goes with them. A tensor at a time is in memory, so a small machine can
convert a large model. In bf16 or fp16 the dynamics of the SSMs stay in single precision, as they must.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bst_dist.model.lm import LanguageModel
from bst_dist.train.checkpoint import WEIGHTS, CheckpointError, damage, open_shards
from bst_dist.train.commands.common import add_run, add_step, read_recipe, readable_size, select
from bst_dist.train.rundir import RECIPE
from bst_dist.train.shards import Piece, Shards, write_header, write_values
from data_pipeline.atomic import atomic_directory
from data_pipeline.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INDEX = "model.safetensors.index.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bst ckpt convert`."""
    add_run(parser)
    parser.add_argument("output", type=Path, metavar="DIR", help="where to write; must not exist")
    add_step(parser, "the newest")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--file-size", type=float, default=math.inf, metavar="BYTES",
                        help="begin another file when one would get larger (default: one file)")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.output.exists():
        raise UserError(f"{args.output}: is there already: choose another directory")
    one, recipe = select(args.run, args.step), read_recipe(args.run)
    if found := damage(one.path):
        raise CheckpointError(f"{one.path}: {found[0]}")
    weights = open_shards(one.path, WEIGHTS)
    with torch.device("meta"):
        dynamics = _dynamics(LanguageModel(recipe.model))
    dtypes = {name: torch.float32 if name in dynamics else DTYPES[args.dtype] for name in weights.shapes}
    files = list(_files(weights.shapes, dtypes, args.file_size))
    with atomic_directory(args.output) as folder:
        names = [_file_name(number, len(files)) for number in range(1, len(files) + 1)]
        for name, members in zip(names, files, strict=True):
            _write(folder / name, weights, {member: dtypes[member] for member in members}, one.step)
        if len(files) > 1:
            placed = {member: name for name, members in zip(names, files, strict=True) for member in members}
            total = sum(math.prod(weights.shapes[name]) * dtypes[name].itemsize for name in dtypes)
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        shutil.copy(args.run / RECIPE, folder / RECIPE)
    written = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{args.output}: {len(dtypes)} tensors of step {one.step}, {readable_size(written)} in {len(files)} "
          f"file{'s' * (len(files) > 1)}, {args.dtype}")  # fmt: skip
    return {"output": str(args.output), "step": one.step, "bytes": written, "files": names, "dtype": args.dtype}


def _dynamics(model: LanguageModel) -> set[str]:
    """Names of the parameters that stay in single precision."""
    own = {id(parameter) for parameter in model.parameter_groups()["ssm"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _files(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], limit: float) -> Iterator[list[str]]:
    """The tensors of each file, in their order, no file larger than `limit` unless one tensor is."""
    members: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtypes[name].itemsize
        if members and held + size > limit:
            yield members
            members, held = [], 0
        members.append(name)
        held += size
    yield members


def _file_name(number: int, files: int) -> str:
    return "model.safetensors" if files == 1 else f"model-{number:05d}-of-{files:05d}.safetensors"


def _write(path: Path, weights: Shards, dtypes: dict[str, torch.dtype], step: int) -> None:
    shapes = weights.shapes
    pieces = [Piece(name, shapes[name], 0, math.prod(shapes[name])) for name in dtypes]
    with path.open("wb") as file:
        write_header(file, pieces, list(dtypes.values()), {"format": "pt", "step": str(step)})
        for name, dtype in dtypes.items():
            write_values(file, weights.whole(name).to(dtype))
