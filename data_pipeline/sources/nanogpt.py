"""Flat files of token ids with an end id between documents, as written by nanoGPT, llm.c, modded-nanogpt and NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from bst_base.errors import UserError
from data_pipeline.sources.base import Document, Part, Skipped
from data_pipeline.sources.tokens import RANGE, TokenSource, read_tokens

_LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic number: (version, id type), for GPT-2 and Llama 3
_HEADER = 256  # 32-bit numbers in the header of llm.c: magic, version, number of ids, and zeros
_AT_ONCE = 1 << 22  # ids read at a time


class _Ids(NamedTuple):
    """The ids of a file."""

    path: Path
    dtype: np.dtype
    begin: int  # byte offset of the first id
    count: int

    def read(self, place: int, count: int) -> np.ndarray:
        """Return (count,) ids from number `place` on; fewer at the end."""
        count = min(count, self.count - place)
        return read_tokens(self.path, self.dtype, self.begin + place * self.dtype.itemsize, count)


class NanoGpt(TokenSource):
    """Every `.bin` and `.npy` under a directory (or one such file), sorted by path.

    Files of llm.c, modded-nanogpt and NumPy are recognised by their headers. Any other file is read as bare ids of
    `dtype`, as nanoGPT and OLMo write them. `eos_id` stands between documents, before or after each. A document that
    continues in the next file becomes two.
    """

    kind: Literal["nanogpt"] = "nanogpt"
    """Flat token ids: nanoGPT, llm.c, modded-nanogpt, OLMo."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the ids in files without a header, little-endian."""

    def wanted(self, name: str) -> bool:
        return name.endswith((".bin", ".npy"))

    def expected(self) -> str:
        return "a file of token ids, or a directory of them: .bin, .npy"

    def parts_of(self, name: str, path: Path) -> list[Part]:
        try:
            ids = self._open(path)
        except (OSError, UserError):  # reported when the part is read, by the policy for bad records
            return super().parts_of(name, path)
        size, step = ids.dtype.itemsize, RANGE // ids.dtype.itemsize
        bounds = [*range(0, ids.count, step), ids.count]
        return [Part(name, (stop - start) * size, start, stop) for start, stop in pairwise(bounds)]

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        split, ids = self.split_of(part), self._open(self.root / part.name)
        for place, tokens in _between(ids, self.eos_id, max(part.start, 0), ids.count if part.stop < 0 else part.stop):
            yield self.document_of(tokens, f"{part.name}:{place}", split)

    def _open(self, path: Path) -> _Ids:
        """Return where the ids of a file lie; raises UserError for a file that does not match its header."""
        size = path.stat().st_size
        if np.fromfile(path, "u1", 6).tobytes() == b"\x93NUMPY":
            return _numpy_ids(path)
        words = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
        version, dtype = _LLM_C.get(words[0], (None, self.dtype))
        found = np.dtype(dtype).newbyteorder("<")
        if version is None:
            if size % found.itemsize:
                raise UserError(f"{path}: {size:,} bytes are not a whole number of {dtype} ids; set source.dtype")
            return _Ids(path, found, 0, size // found.itemsize)
        count = (size - 4 * _HEADER) // found.itemsize
        if words[1:] != [version, count]:
            raise UserError(
                f"{path}: version {words[1]} with {words[2]:,} ids in its header, {count:,} in the file (version "
                f"{version}): cut short or damaged; get it again"
            )
        return _Ids(path, found, 4 * _HEADER, count)


def _numpy_ids(path: Path) -> _Ids:
    """Return the ids of an array that NumPy has saved."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # reads only the header
    except ValueError as error:
        raise UserError(f"{path}: not readable: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{path}: {array.ndim} dimensions of {array.dtype}, not a vector of ids")
    return _Ids(path, array.dtype, array.offset, len(array))


def _between(ids: _Ids, end: int, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the first id, ids) for the documents that begin in ``start..stop``.

    Documents end at an `end` id.
    """
    place = max(start - 1, 0)  # the id before `start` shows whether a document begins at `start`
    begin = None if start else 0  # None: inside a document that began before `start`
    pieces: list[np.ndarray] = []
    while len(part := ids.read(place, _AT_ONCE)):
        low = 0
        for high in np.flatnonzero(part == end).tolist():
            if begin is not None and (len(pieces) or high > low):
                yield begin, np.concatenate([*pieces, part[low:high]])
            pieces, low, begin = [], high + 1, place + high + 1
            if begin >= stop:
                return
        if begin is not None and low < len(part):
            pieces.append(part[low:])
        place += len(part)
        if begin is None and place >= stop:
            return
    if pieces:
        yield begin, np.concatenate(pieces)
