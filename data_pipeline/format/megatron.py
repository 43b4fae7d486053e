"""Megatron-LM's indexed data sets: `<name>.bin` with the tokens of all sequences, `<name>.idx` with their places.

The index is little-endian (Megatron-LM, megatron/core/datasets/indexed_dataset.py): nine bytes of magic, a u64 version,
a u8 code for the type of the tokens, then as u64 the number S of sequences and the number D of document bounds. It goes
on with S lengths in tokens as i32, S byte offsets in the `.bin` as i64, and D bounds as i64. The first bound is 0; each
other bound is the number of sequences up to the end of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bst_base.errors import UserError
from bst_base.files import atomic_file

_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
_HEADER = np.dtype([("magic", "V9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("bounds", "<u8")])
_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # code of each integer type


class MegatronIndex(NamedTuple):
    """The places of the documents in a `.bin`."""

    dtype: np.dtype
    """The type of the tokens."""
    offsets: np.ndarray
    """(documents,) int64: the byte offset where each document begins."""
    lengths: np.ndarray
    """(documents,) int64: the tokens of each document."""


def read_index(path: Path) -> MegatronIndex:
    """Read the index of the `.bin` next to it; raises UserError when it is damaged or does not fit the `.bin`.

    The sequences must lie one after the other without gaps, as Megatron writes them.
    """
    data = path.read_bytes()
    if len(data) < _HEADER.itemsize or not data.startswith(_MAGIC):
        raise UserError(f"{path}: not an index of Megatron's (its first bytes are not {_MAGIC[:7].decode()})")
    header = np.frombuffer(data, _HEADER, count=1)[0]
    if header["version"] != _VERSION or int(header["code"]) not in _CODES:
        raise UserError(f"{path}: version {header['version']}, type {header['code']}: not the token ids of version 1")
    sequences, bounds = int(header["sequences"]), int(header["bounds"])
    if len(data) < (end := _HEADER.itemsize + 12 * sequences + 8 * bounds):
        raise UserError(f"{path}: {len(data):,} bytes, expected {end:,}: cut short; copy it again")
    dtype = np.dtype(_CODES[int(header["code"])])
    place = _HEADER.itemsize
    lengths = np.frombuffer(data, "<i4", sequences, place).astype(np.int64)
    begins = np.frombuffer(data, "<i8", sequences, place + 4 * sequences)
    ends = np.frombuffer(data, "<i8", bounds, place + 12 * sequences)
    if not bounds or ends[0] != 0 or ends[-1] != sequences or (np.diff(ends) < 0).any() or (lengths < 0).any():
        raise UserError(f"{path}: its documents are not made of its sequences: damaged; make it again")
    if (begins != np.cumsum(lengths * dtype.itemsize) - lengths * dtype.itemsize).any():
        raise UserError(f"{path}: its sequences do not lie one after the other; write the data set again with Megatron")
    tokens = np.append(0, np.cumsum(lengths))[ends]  # number of tokens before each bound
    size = path.with_suffix(".bin").stat().st_size
    if size != tokens[-1] * dtype.itemsize:
        raise UserError(
            f"{path.with_suffix('.bin')}: {size:,} bytes, its index says {tokens[-1] * dtype.itemsize:,}: cut short or "
            "of another data set; copy it again"
        )
    return MegatronIndex(dtype, tokens[:-1] * dtype.itemsize, np.diff(tokens))


def write_index(path: Path, lengths: Sequence[int], dtype: np.dtype) -> None:
    """Write the index of a `.bin` that holds documents of these lengths in `dtype`, one sequence per document."""
    header = np.zeros((), _HEADER)
    header["magic"], header["version"] = np.void(_MAGIC), _VERSION
    header["code"] = next(code for code, name in _CODES.items() if np.dtype(name) == dtype)
    header["sequences"], header["bounds"] = len(lengths), len(lengths) + 1
    sizes = np.array(lengths, np.int64)
    with atomic_file(path) as file:
        file.write(header.tobytes())
        file.write(sizes.astype("<i4").tobytes())
        file.write(((np.cumsum(sizes) - sizes) * dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
