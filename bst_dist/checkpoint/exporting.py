"""Exports a checkpoint's weights as one or more safetensors files, with only some tensors in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from bst_dist.checkpoint.shards import Piece, Shards, write_header, write_values
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.model.meta_device import weightless
from bst_dist.model.roles import single_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AT_A_TIME = 2.0**30
"""Maximum bytes of tensors in memory, unless a single tensor is larger. Each shard is opened once per such group."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def stored_dtypes(weights: Shards, config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of each stored tensor: `dtype`, but single precision for the SSM dynamics and for networks that
    compute a filter, which need it."""
    with weightless():
        needing = single_precision(LanguageModel(config))
    return {name: torch.float32 if name in needing else dtype for name in weights.shapes}


def write_weights(
    folder: Path,
    weights: Shards,
    dtypes: dict[str, torch.dtype],
    file_size: float,
    metadata: dict[str, str],
    prefix: str = "",
) -> list[str]:
    """Write all tensors, and for several files the index that Hugging Face's tools read; return the file names.

    Args:
        dtypes: the dtype of each stored tensor.
        file_size: maximum size of a file in bytes.
        metadata: metadata of each file, besides the format.
        prefix: put before the names of the tensors.
    """
    shapes = weights.shapes
    files = list(_files(shapes, dtypes, file_size))
    whole = dict.fromkeys(shapes, torch.float32)
    names = [_file_name(number, len(files)) for number in range(1, len(files) + 1)]
    for name, members in zip(names, files, strict=True):
        pieces = [Piece(prefix + member, shapes[member], 0, math.prod(shapes[member])) for member in members]
        with (folder / name).open("wb") as file:
            write_header(file, pieces, [dtypes[member] for member in members], {"format": "pt", **metadata})
            for together in _files({member: shapes[member] for member in members}, whole, AT_A_TIME):
                values = weights.all_of(together)
                for member in together:
                    write_values(file, values[member].to(dtypes[member]))
    if len(files) > 1:
        placed = {prefix + member: name for name, members in zip(names, files, strict=True) for member in members}
        total = sum(math.prod(shapes[name]) * dtypes[name].itemsize for name in dtypes)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return names


def _files(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], limit: float) -> Iterator[list[str]]:
    """Yield the tensor names of each file, in order; no file is larger than `limit` unless a single tensor is."""
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
    return SINGLE if files == 1 else f"model-{number:05d}-of-{files:05d}.safetensors"
