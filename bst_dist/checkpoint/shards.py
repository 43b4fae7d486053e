"""Tensors spread over ranks, one safetensors file a rank, read back in any other division.

What one rank holds of a tensor is a run of its flattened elements. When that is all of them the file keeps the tensor's
shape, so that what one rank alone has written is an ordinary safetensors file. Any other run is stored flat, and the
file's metadata says where it belongs. Files are written front to back, and read by seeking to the elements asked for:
no more than what is asked for is ever in memory. Where elements lie the files' headers say (`Headers`), or without
opening any of them the manifest of the checkpoint (`index`).

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from bst_base.errors import StorageError, UserError

if TYPE_CHECKING:  # else imported where values are touched: who reads headers and manifests alone does not wait for it
    import torch
    from torch import Tensor

DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
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


def write_header(file: Any, pieces: Sequence[Piece], dtypes: Sequence[torch.dtype], metadata: dict[str, str]) -> int:
    """Begin a shard; the pieces' values follow by `write_values`, in the same order, from the returned byte on."""
    places = {p.name: {"shape": p.shape, "begin": p.begin} for p in pieces if not p.whole}
    header: dict[str, Any] = {"__metadata__": {**metadata, PIECES: json.dumps(places)} if places else metadata}
    position = 0
    for piece, dtype in zip(pieces, dtypes, strict=True):
        end = position + piece.count * dtype.itemsize
        shape = list(piece.shape) if piece.whole else [piece.count]
        header[piece.name] = {"dtype": DTYPES[str(dtype)], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def write_values(file: Any, values: Tensor) -> None:
    """Write the next piece's values, by way of the host's memory where they lie on an accelerator."""
    import torch

    file.write(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def write(file: Any, pieces: Sequence[Piece], values: Sequence[Sequence[Tensor]]) -> int:
    """Write a whole shard: of each piece its values, single precision, in one run or several.

    Returns the byte at which the first value lies.
    """
    import torch

    start = write_header(file, pieces, [torch.float32] * len(pieces), {"format": "pt"})
    for run in chain.from_iterable(values):
        write_values(file, run)
    return start


@dataclass(frozen=True)
class Stored:
    """Where a piece lies on the disk."""

    piece: Piece
    path: Path
    offset: int
    """Of its first element, in bytes."""


class Places(Protocol):
    """Where the tensors of a set of shards lie."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the whole tensor `name`; None when there is none."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors there are."""

    def holders(self, name: str, begin: int, end: int) -> Sequence[Any]:
        """Which shards have some of the elements from `begin` to `end` of the flattened tensor `name`."""

    def stored(self, holder: Any, name: str) -> Stored:
        """Where such a shard has its piece."""


class Headers:
    """The places that the files' own headers tell."""

    def __init__(self, paths: Iterable[Path], likely: Path | None = None) -> None:
        """`likely`: the one of `paths` that has all that will be asked for, as when every rank reads its own: the
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
        """How many of the elements each file has whose header was read."""
        return {path: _overlap(stored.piece, begin, end) for path, stored in self._stored.get(name, {}).items()}

    def stored(self, holder: Path, name: str) -> Stored:
        return self._stored[name][holder]


class Shards:
    """The single-precision tensors in a set of shards, as if all were in one file.

    Methods raise ShardError for a file that is no shard, and StorageError for one that cannot be read.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._file: tuple[Path, IO[bytes]] | None = None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the whole tensor `name`; None when there is none."""
        return self._places.shape(name)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors there are."""
        return self._places.shapes

    def read(self, name: str, begin: int, into: Tensor) -> None:
        """Fill `into` (n,) with the elements of the flattened tensor `name` from `begin` on.

        Raises ShardError when they are not all there.
        """
        self.fill([(name, begin, into)])

    def fill(self, wanted: Sequence[tuple[str, int, Tensor]]) -> None:
        """Fill the last of each (name, begin, into) as `read` does, opening each file once."""
        by_holder: dict[Any, list[int]] = {}
        for number, (name, begin, into) in enumerate(wanted):
            for holder in self._places.holders(name, begin, begin + into.numel()):
                by_holder.setdefault(holder, []).append(number)
        found = [0] * len(wanted)
        for holder in sorted(by_holder):
            for number in by_holder[holder]:
                found[number] += self._read_part(self._places.stored(holder, wanted[number][0]), *wanted[number][1:])
        for count, (name, begin, into) in zip(found, wanted, strict=True):
            if count != into.numel():
                end = begin + into.numel()
                raise ShardError(f"{name}: {count} of its elements {begin} to {end} are in the shards")

    def _read_part(self, stored: Stored, begin: int, into: Tensor) -> int:
        """Read what a shard has of the elements from `begin` on; returns how many."""
        piece = stored.piece
        first, last = max(begin, piece.begin), min(begin + into.numel(), piece.begin + piece.count)
        if first >= last:
            return 0
        part = into[first - begin : last - begin]
        values = part if part.device.type == "cpu" else part.new_empty(part.shape, device="cpu")
        self._read_values(stored, first - piece.begin, values)
        if values is not part:
            part.copy_(values)
        return last - first

    def _read_values(self, stored: Stored, skip: int, into: Tensor) -> None:
        view = memoryview(into.numpy()).cast("B")
        try:
            file = self._opened(stored.path)
            file.seek(stored.offset + skip * into.element_size())
            while view:
                if not (count := file.readinto(view)):
                    raise ShardError(f"{stored.path}: ends in the middle of {stored.piece.name}")
                view = view[count:]
        except OSError as error:
            raise StorageError.of(error, stored.path) from None

    def _opened(self, path: Path) -> IO[bytes]:
        """The last file that was read from stays open: a parameter after the other comes from the same one."""
        if self._file is None or self._file[0] != path:
            self.close()
            self._file = path, path.open("rb", buffering=0)
        return self._file[1]

    def close(self) -> None:
        """Let go of the file that is open; reading opens one again."""
        if self._file is not None:
            self._file[1].close()
            self._file = None

    def whole(self, name: str) -> Tensor:
        """The tensor `name`, in the host's memory."""
        return self.all_of([name])[name]

    def all_of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, in the host's memory; each file is opened once for all of them."""
        import torch

        shapes = self.shapes
        flat = {name: torch.empty(math.prod(shapes[name])) for name in names}
        self.fill([(name, 0, values) for name, values in flat.items()])
        return {name: values.view(shapes[name]) for name, values in flat.items()}


def _overlap(piece: Piece, begin: int, end: int) -> int:
    """How many of the elements from `begin` to `end` are in a piece."""
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
        raise ShardError(f"{path}: not a shard of a checkpoint: {error}") from None


def _stored(path: Path, start: int, name: str, entry: dict[str, Any], place: dict[str, Any] | None) -> Stored:
    if entry["dtype"] != DTYPES["torch.float32"]:
        raise ValueError(f"{name} is {entry['dtype']}, not single precision")
    count = math.prod(entry["shape"])
    piece = Piece(name, tuple(place["shape"]), place["begin"], count) if place else Piece(
        name, tuple(entry["shape"]), 0, count)  # fmt: skip
    return Stored(piece, path, start + entry["data_offsets"][0])
