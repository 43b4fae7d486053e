"""Tensors sharded over ranks, one safetensors file per rank, that can be read back in any other division.

A rank holds a run of the flattened elements of a tensor. If that is the whole tensor, the file keeps its shape, so a
file written by a single rank is an ordinary safetensors file. Any other run is stored flat, and the file's metadata
says where it belongs. Files are written sequentially. They are read by seeking to the requested elements, and no other
elements are loaded. The positions of elements come from the files' headers (`Headers`), or from the index in the
checkpoint's manifest (`index`) without opening any file.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from bst_base.errors import StorageError, UserError

if TYPE_CHECKING:  # at run time imported where values are used: reading headers and manifests does not need torch
    import torch
    from torch import Tensor

DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
PART = 1 << 26
"""Maximum bytes of one read."""
PIECES = "pieces"
"""Key in a file's metadata: shape and first element of each run that is not a whole tensor."""


class CheckpointShardError(UserError):
    """A file that is not a shard, or shards that lack requested elements."""


@dataclass(frozen=True)
class Piece:
    """A run of the elements of one tensor."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    begin: int
    """First element of the run in the flattened tensor."""
    count: int

    @property
    def whole(self) -> bool:
        """Whether the run is the whole tensor."""
        return self.count == math.prod(self.shape)


def write_header(file: Any, pieces: Sequence[Piece], dtypes: Sequence[torch.dtype], metadata: dict[str, str]) -> int:
    """Write the header of a shard; return the byte offset of the first value.

    Write the values of the pieces with `write_values` next, in the same order.
    """
    places = {p.name: {"shape": p.shape, "begin": p.begin} for p in pieces if not p.whole}
    header: dict[str, Any] = {"__metadata__": {**metadata, PIECES: json.dumps(places)} if places else metadata}
    position = 0
    for piece, dtype in zip(pieces, dtypes, strict=True):
        end = position + piece.count * dtype.itemsize
        shape = list(piece.shape) if piece.whole else [piece.count]
        header[piece.name] = {"dtype": DTYPES[str(dtype)], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values begin at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def write_values(file: Any, values: Tensor) -> None:
    """Write the values of the next piece; values on an accelerator are copied to host memory first."""
    import torch

    file.write(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def write(file: Any, pieces: Sequence[Piece], values: Sequence[Sequence[Tensor]]) -> int:
    """Write a whole shard and return the byte offset of the first value.

    `values`: for each piece its single-precision values, as one or more tensors.
    """
    import torch

    start = write_header(file, pieces, [torch.float32] * len(pieces), {"format": "pt"})
    for run in chain.from_iterable(values):
        write_values(file, run)
    return start


@dataclass(frozen=True)
class Stored:
    """A piece and its place on disk."""

    piece: Piece
    path: Path
    offset: int
    """Byte offset of its first element in the file."""


class Places(Protocol):
    """The places of the tensors in a set of shards."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of the whole tensor `name`; None when there is no such tensor."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The names and shapes of all tensors."""

    def holders(self, name: str, begin: int, end: int) -> Sequence[Any]:
        """Return the shards that may have elements `begin` to `end` of the flattened tensor `name`."""

    def stored(self, holder: Any, name: str) -> Stored:
        """Return the place of the tensor's piece in the shard `holder`."""


class Headers:
    """The places of tensors according to the headers of the files."""

    def __init__(self, paths: Iterable[Path], likely: Path | None = None) -> None:
        """`likely`: the file in `paths` that should have all requested elements, because it is the rank's own; the
        others are opened only when it has not."""
        self._stored: dict[str, dict[Path, Stored]] = {}
        self._unread = sorted(paths, key=lambda path: path != likely)
        while self._unread and self._unread[0] == likely:
            self._read_next()
        if likely is None:
            self._read_rest()

    def _read_next(self) -> None:
        path = self._unread.pop(0)
        for stored in _read_header(path):
            self._stored.setdefault(stored.piece.name, {})[path] = stored

    def _read_rest(self) -> None:
        while self._unread:
            self._read_next()

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._stored:
            self._read_rest()
        return next(iter(self._stored[name].values())).piece.shape if name in self._stored else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        self._read_rest()
        return {name: next(iter(stored.values())).piece.shape for name, stored in self._stored.items()}

    def holders(self, name: str, begin: int, end: int) -> list[Path]:
        found = self._overlaps(name, begin, end)
        if sum(found.values()) < end - begin and self._unread:
            self._read_rest()
            found = self._overlaps(name, begin, end)
        return [path for path, count in found.items() if count]

    def _overlaps(self, name: str, begin: int, end: int) -> dict[Path, int]:
        """Return how many of the elements each file has, for the files whose header was read."""
        return {path: _overlap(stored.piece, begin, end) for path, stored in self._stored.get(name, {}).items()}

    def stored(self, holder: Path, name: str) -> Stored:
        return self._stored[name][holder]


class Shards:
    """Reads the single-precision tensors of a set of shards as if they were in one file.

    Methods raise CheckpointShardError for a file that is not a shard, and StorageError for one that cannot be read.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._file: tuple[Path, IO[bytes]] | None = None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of the whole tensor `name`; None when there is no such tensor."""
        return self._places.shape(name)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The names and shapes of all tensors."""
        return self._places.shapes

    def fill(self, wanted: Sequence[tuple[str, int, Tensor]], arrived: Callable[[], None] = lambda: None) -> None:
        """For each (name, begin, into) fill `into` (n,) with the elements of the flattened tensor from `begin` on.

        Each file is opened once. `arrived`: called after each part. Raises CheckpointShardError when the shards do not
        have all of the elements.
        """
        by_holder: dict[Any, list[int]] = {}
        for number, (name, begin, into) in enumerate(wanted):
            for holder in self._places.holders(name, begin, begin + into.numel()):
                by_holder.setdefault(holder, []).append(number)
        found = [0] * len(wanted)
        for holder in sorted(by_holder):
            for number in by_holder[holder]:
                stored = self._places.stored(holder, wanted[number][0])
                found[number] += self._read_part(stored, *wanted[number][1:], arrived)
        for count, (name, begin, into) in zip(found, wanted, strict=True):
            if count != into.numel():
                end = begin + into.numel()
                raise CheckpointShardError(f"{name}: {count} of its elements {begin} to {end} are in the shards")

    def _read_part(self, stored: Stored, begin: int, into: Tensor, arrived: Callable[[], None]) -> int:
        """Read the elements of `into` that one shard has; return how many there are."""
        piece = stored.piece
        first, last = max(begin, piece.begin), min(begin + into.numel(), piece.begin + piece.count)
        if first >= last:
            return 0
        part = into[first - begin : last - begin]
        values = part if part.device.type == "cpu" else part.new_empty(part.shape, device="cpu")
        self._read_values(stored, first - piece.begin, values, arrived)
        if values is not part:
            part.copy_(values)
        return last - first

    def _read_values(self, stored: Stored, skip: int, into: Tensor, arrived: Callable[[], None]) -> None:
        view = memoryview(into.numpy()).cast("B")
        try:
            file = self._opened(stored.path)
            file.seek(stored.offset + skip * into.element_size())
            while view:
                if not (count := file.readinto(view[:PART])):
                    raise CheckpointShardError(f"{stored.path}: ends in the middle of {stored.piece.name}")
                view = view[count:]
                arrived()
        except OSError as error:
            raise StorageError.of(error, stored.path) from None

    def _opened(self, path: Path) -> IO[bytes]:
        """Return the opened file. It stays open until another file is read, as most reads are from the same one."""
        if self._file is None or self._file[0] != path:
            self.close()
            self._file = path, path.open("rb", buffering=0)
        return self._file[1]

    def close(self) -> None:
        """Close the open file; a later read opens it again."""
        if self._file is not None:
            self._file[1].close()
            self._file = None

    def all_of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors in host memory; each file is opened once."""
        import torch

        shapes = self.shapes
        flat = {name: torch.empty(math.prod(shapes[name])) for name in names}
        self.fill([(name, 0, values) for name, values in flat.items()])
        return {name: values.view(shapes[name]) for name, values in flat.items()}


def _overlap(piece: Piece, begin: int, end: int) -> int:
    """Return how many of the elements from `begin` to `end` are in a piece."""
    return max(0, min(end, piece.begin + piece.count) - max(begin, piece.begin))


def _read_header(path: Path) -> list[Stored]:
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
        raise CheckpointShardError(f"{path}: not a shard of a checkpoint: {error}") from None


def _stored(path: Path, start: int, name: str, entry: dict[str, Any], place: dict[str, Any] | None) -> Stored:
    if entry["dtype"] != DTYPES["torch.float32"]:
        raise ValueError(f"{name} is {entry['dtype']}, not single precision")
    count = math.prod(entry["shape"])
    piece = (
        Piece(name, tuple(place["shape"]), place["begin"], count)
        if place
        else Piece(name, tuple(entry["shape"]), 0, count)
    )
    return Stored(piece, path, start + entry["data_offsets"][0])
