"""Tensors spread over ranks, one safetensors file a rank, read back in any other division.

What one rank holds of a tensor is a run of its flattened elements. When that is all of them the file keeps the tensor's
shape, so that what one rank alone has written is an ordinary safetensors file. Any other run is stored flat, and the
file's metadata says where it belongs. Files are written front to back, and read by seeking to the elements asked for:
no more than what is asked for is ever in memory.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bst_base.errors import StorageError, UserError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PIECES = "pieces"
"""Key, in a file's metadata, of the shapes and places of the runs that are not whole tensors."""


class ShardError(UserError):
    """A shard that cannot be read, or shards that do not hold what was asked of them."""


@dataclass(frozen=True)
class Piece:
    """A run of the elements of one tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    begin: int
    """First element of the run in the flattened tensor."""
    count: int

    @property
    def whole(self) -> bool:
        """Whether the run is all of the tensor."""
        return self.count == math.prod(self.shape)


def write_header(file: Any, pieces: Sequence[Piece], dtypes: Sequence[torch.dtype], metadata: dict[str, str]) -> None:
    """Begin a shard; the pieces' values follow by `write_values`, in the same order."""
    places = {p.name: {"shape": p.shape, "begin": p.begin} for p in pieces if not p.whole}
    header: dict[str, Any] = {"__metadata__": {**metadata, PIECES: json.dumps(places)} if places else metadata}
    position = 0
    for piece, dtype in zip(pieces, dtypes, strict=True):
        end = position + piece.count * dtype.itemsize
        shape = list(piece.shape) if piece.whole else [piece.count]
        header[piece.name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)


def write_values(file: Any, values: Tensor) -> None:
    """Write the next piece's values, which lie in the host's memory."""
    file.write(values.detach().contiguous().view(-1).view(torch.uint8).numpy())


def write(file: Any, pieces: Sequence[Piece], values: Sequence[Sequence[Tensor]]) -> None:
    """Write a whole shard: of each piece its values, single precision, in one run or several."""
    write_header(file, pieces, [torch.float32] * len(pieces), {"format": "pt"})
    for run in chain.from_iterable(values):
        write_values(file, run)


@dataclass(frozen=True)
class _Stored:
    """Where a piece lies on the disk."""

    piece: Piece
    path: Path
    offset: int
    """Of its first element, in bytes."""


class Shards:
    """The single-precision tensors in a set of shards, as if all were in one file."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers of `paths`; raises ShardError for a file that is no shard, StorageError where none can be
        read."""
        self._stored: dict[str, list[_Stored]] = {}
        for path in paths:
            for stored in _read_header(path):
                self._stored.setdefault(stored.piece.name, []).append(stored)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors there are."""
        return {name: stored[0].piece.shape for name, stored in self._stored.items()}

    def read(self, name: str, begin: int, into: Tensor) -> None:
        """Fill `into` (n,) with the elements of the flattened tensor `name` from `begin` on.

        Raises ShardError when they are not all there.
        """
        found, end = 0, begin + into.numel()
        values = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        for stored in self._stored.get(name, ()):
            piece = stored.piece
            first, last = max(begin, piece.begin), min(end, piece.begin + piece.count)
            if first < last:
                found += last - first
                _read_values(stored, first - piece.begin, values[first - begin : last - begin])
        if found != into.numel():
            raise ShardError(f"{name}: {found} of its elements {begin} to {end} are in the shards")
        if values is not into:
            into.copy_(values)

    def whole(self, name: str) -> Tensor:
        """The tensor `name`, in the host's memory."""
        shape = self.shapes[name]
        values = torch.empty(math.prod(shape))
        self.read(name, 0, values)
        return values.view(shape)


def _read_header(path: Path) -> list[_Stored]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("no header")
            header = json.loads(file.read(length))
        places = json.loads(header.pop("__metadata__", {}).get(PIECES, "{}"))
        return [_stored(path, 8 + length, name, entry, places.get(name)) for name, entry in header.items()]
    except OSError as error:
        raise StorageError.of(error, path) from None
    except (ValueError, KeyError, struct.error) as error:
        raise ShardError(f"{path}: not a shard of a checkpoint: {error}") from None


def _stored(path: Path, start: int, name: str, entry: dict[str, Any], place: dict[str, Any] | None) -> _Stored:
    if entry["dtype"] != DTYPES[torch.float32]:
        raise ValueError(f"{name} is {entry['dtype']}, not single precision")
    count = math.prod(entry["shape"])
    piece = Piece(name, tuple(place["shape"]), place["begin"], count) if place else Piece(
        name, tuple(entry["shape"]), 0, count)  # fmt: skip
    return _Stored(piece, path, start + entry["data_offsets"][0])


def _read_values(stored: _Stored, skip: int, into: Tensor) -> None:
    view = memoryview(into.numpy()).cast("B")
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset + skip * into.element_size())
            while view:
                if not (count := file.readinto(view)):
                    raise ShardError(f"{stored.path}: ends in the middle of {stored.piece.name}")
                view = view[count:]
    except OSError as error:
        raise StorageError.of(error, stored.path) from None
