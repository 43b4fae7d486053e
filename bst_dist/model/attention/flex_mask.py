"""The band of keys that each query sees, as FlexAttention's mask, and the tiles that FlexAttention visits for it.

Shapes: B rows, l queries, p positions before them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bst_dist.model.attention.window import Window

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

TILE = 128
"""Queries per tile, and keys per tile: FlexAttention's default."""


@dataclass(frozen=True)
class Band:
    """The keys that each query sees: the last ones up to its own position."""

    length: int
    """Number of queries l."""
    keys: int
    """Number of keys, p + l. The last l are at the queries' own positions."""
    window: Window

    @property
    def before(self) -> int:
        """Positions before the first query, p."""
        return self.keys - self.length

    @property
    def nearest(self) -> int:
        """The smallest distance seen."""
        return 0 if self.window.include_self else 1

    def mask(self, begin: Tensor | None = None, before: Tensor | int | None = None) -> Mask:
        """Return FlexAttention's mask function, which must be a plain function. `before` replaces this band's."""
        before, nearest, window = self.before if before is None else before, self.nearest, self.window.size

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = query + before - key
            return (distance >= nearest) & (distance < window + nearest)

        def seen_in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return seen(b, h, query, key) & (key >= begin[b, query])

        return seen if begin is None else seen_in_document


def block_mask(
    band: Band, begin: Tensor | None, tiles: tuple[Tensor, ...], before: Tensor | int | None = None
) -> BlockMask:
    """Return band and documents as FlexAttention's mask, with the tiles to visit; `before`: see `Band.mask`."""
    return BlockMask((band.length, band.keys), *tiles, BLOCK_SIZE=(TILE, TILE), mask_mod=band.mask(begin, before))


def visited_tiles(band: Band, device: torch.device | str, begin: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the tiles that FlexAttention visits, by arithmetic: in each row of tiles they are one contiguous run.

    torch's `create_block_mask` would first make the whole (l, p + l) mask, 16 GB for a slice of 128k tokens. Its
    constructors sort, which is not a fused kernel.

    Args:
        begin: (B, l) int32, never decreasing along a row: the first key each query may see.
    """
    by_query = _in_runs(*_keys_of_query_tiles(band, device, begin), -(-band.keys // TILE))
    by_key = _in_runs(*_queries_of_key_tiles(band, device, begin), -(-band.length // TILE))
    return *by_query, *by_key


def _keys_of_query_tiles(band: Band, device: torch.device | str, begin: Tensor | None) -> tuple[Tensor, ...]:
    """Return a run of key tiles per query tile, (1 or B, tiles) each: first and last visited, first and last whole."""
    window = band.window.size
    row = torch.arange(-(-band.length // TILE), device=device, dtype=torch.int32)
    first = row * TILE + band.before
    last = (first + TILE - 1).clamp(max=band.keys - 1)
    low = (first - window - band.nearest + 1).clamp(min=0).unsqueeze(0)
    high = (last - window - band.nearest + 1).clamp(min=0).unsqueeze(0)  # the first key that the last query sees
    if begin is not None:
        low = torch.maximum(low, begin.index_select(1, row * TILE))
        high = torch.maximum(high, begin.index_select(1, last - band.before))
    visited = _down(low), _down((last - band.nearest).unsqueeze(0))
    whole = _up(high), _down((first - band.nearest + 1).unsqueeze(0)) - 1
    return *visited, whole[0], torch.where((row + 1) * TILE <= band.length, whole[1], -1)


def _queries_of_key_tiles(band: Band, device: torch.device | str, begin: Tensor | None) -> tuple[Tensor, ...]:
    """Return a run of query tiles per key tile, in the same form. The backward pass uses it."""
    window = band.window.size
    column = torch.arange(-(-band.keys // TILE), device=device, dtype=torch.int32)
    first = column * TILE
    last = (first + TILE - 1).clamp(max=band.keys - 1)
    end = (last + window + band.nearest - 1 - band.before).clamp(max=band.length - 1).unsqueeze(0)
    inner = (first + window + band.nearest - 1 - band.before).unsqueeze(0)  # last to see the first key
    if begin is not None:  # queries whose document begins at a key or before it
        # Not `last`, because Inductor (torch 2.11) fails on its clamp here. Beyond the last key the result is the same.
        keys = torch.stack((first + TILE - 1, first)).expand(len(begin), -1, -1)  # (B, 2, tiles)
        ends = torch.searchsorted(begin.contiguous(), keys.flatten(1).contiguous(), right=True, out_int32=True) - 1
        end = torch.minimum(end, ends[:, : len(column)])
        inner = torch.minimum(inner, ends[:, len(column) :])
    visited = _down((first + band.nearest - band.before).clamp(min=0).unsqueeze(0)), _down(end)
    whole = _up((last + band.nearest - band.before).clamp(min=0).unsqueeze(0)), _down(inner + 1) - 1
    complete = torch.minimum(whole[1], torch.full_like(whole[1], band.length // TILE - 1))
    return *visited, whole[0], torch.where(last - first == TILE - 1, complete, -1)


def _down(position: Tensor) -> Tensor:
    """Divide by TILE, rounding down; by a shift, because Inductor (torch 2.13) fails on quotients of such ranges."""
    return position >> (TILE.bit_length() - 1)


def _up(position: Tensor) -> Tensor:
    return _down(position + TILE - 1)


def _in_runs(first: Tensor, last: Tensor, whole_first: Tensor, whole_last: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Return runs in FlexAttention's form: how many tiles need the mask and which, how many are whole and which.

    The whole tiles are a run in the middle of the visited run; (1 or B, rows) each -> (B, 1, rows[, columns]).
    """
    visited = (last - first + 1).clamp(min=0)
    whole = torch.minimum((whole_last - whole_first + 1).clamp(min=0), visited)
    left = torch.where(whole > 0, whole_first - first, visited).unsqueeze(-1)  # tiles before the whole ones
    place = torch.arange(columns, device=first.device, dtype=torch.int32)
    partly = first.unsqueeze(-1) + place + torch.where(place < left, 0, whole.unsqueeze(-1))
    wholly = whole_first.unsqueeze(-1) + place
    counts = (visited - whole, partly), (whole, wholly)
    return tuple(
        x.expand(len(visited), *x.shape[1:]).to(torch.int32).unsqueeze(1).contiguous()
        for number, tiles in counts
        for x in (number, tiles.clamp(0, columns - 1))
    )
