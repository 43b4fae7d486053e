"""The index in a checkpoint manifest: which elements of which parameter are in which rank's files.

With the index a rank finds the elements it needs without reading the headers of files. In every ZeRO stage, the runs
that the ranks hold of a parameter follow each other in the order of the ranks. So for each parameter the index stores
its shape, and its cuts unless all ranks have equal parts. The size of the index grows with parameters + ranks, not with
their product.

A file has the tensors of its kind one after the other. Each tensor has the runs of all parameters in the order of the
index. So the offset of a run follows from the runs before it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bst_dist.checkpoint.shards import Piece, Stored

if TYPE_CHECKING:
    from bst_dist.parallel.ranks import Ranks


@dataclass(frozen=True)
class Division:
    """How the elements of one parameter are divided over the ranks."""

    shape: tuple[int, ...]
    ranks: int
    """Number of ranks that wrote the checkpoint."""
    first: int = 0
    """The first rank that holds elements, when the parts are not equal."""
    cuts: tuple[int, ...] = ()
    """Where the run of each rank from `first` on begins, and where the last one ends; empty: equal parts."""
    moments: int = 2
    """Number of the optimizer's tensors for this parameter: two for AdamW, one for Muon."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    def run(self, rank: int) -> tuple[int, int]:
        """Return the first element that a rank holds, and the number of its elements."""
        if not self.cuts:
            return equal_part(self.numel, rank, self.ranks)
        place = rank - self.first
        if not 0 <= place < len(self.cuts) - 1:
            return 0, 0
        return self.cuts[place], self.cuts[place + 1] - self.cuts[place]

    def holders(self, begin: int, end: int) -> range:
        """Return a range of ranks that covers the holders of elements `begin` to `end`; some in it may hold none."""
        if begin >= end:
            return range(0)
        if not self.cuts:
            size = max(1, -(-self.numel // self.ranks))
            return range(begin // size, (end - 1) // size + 1)
        return range(self.first + bisect_right(self.cuts, begin) - 1, self.first + bisect_left(self.cuts, end))


def equal_part(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return first element and count of a rank's part when ZeRO-3 cuts a parameter: equal parts, the last smaller."""
    size = -(-numel // ranks)
    begin = min(rank * size, numel)
    return begin, min(size, numel - begin)


class Index:
    """How all parameters of a checkpoint are divided over the ranks."""

    def __init__(self, ranks: int, divisions: dict[str, Division]) -> None:
        self.ranks, self.divisions = ranks, divisions
        self._place = {name: place for place, name in enumerate(divisions)}
        every = list(divisions.values())
        self._numel = np.array([one.numel for one in every], dtype=np.int64)
        self._equal = np.array([not one.cuts for one in every], dtype=bool)
        self._moments = np.array([one.moments for one in every], dtype=np.int64)
        self._cut: dict[int, list[tuple[int, int]]] = {}
        for place, one in enumerate(every):
            for rank in range(one.first, one.first + len(one.cuts) - 1):
                self._cut.setdefault(rank, []).append((place, one.run(rank)[1]))
        self._before: dict[tuple[int, int], np.ndarray] = {}

    def before(self, rank: int, name: str, number: int = 0) -> int:
        """Return the number of elements before those of `name` in tensor `number` of the rank's file.

        Earlier tensors of the file are included.
        """
        earlier = sum(self.total(rank, tensor) for tensor in range(number))
        return earlier + int(self._ends(rank, number)[self._place[name]])

    def total(self, rank: int, number: int = 0) -> int:
        """Return the number of elements that a rank holds of tensor `number`, over all parameters that have it."""
        return int(self._ends(rank, number)[-1])

    def _ends(self, rank: int, number: int) -> np.ndarray:
        if (rank, number) not in self._before:
            size = -(-self._numel // self.ranks)
            counts = np.where(self._equal, np.clip(self._numel - rank * size, 0, size), 0)
            for place, count in self._cut.get(rank, ()):
                counts[place] = count
            counts = np.where(self._moments > number, counts, 0)
            self._before[rank, number] = np.concatenate(([0], counts.cumsum()))
        return self._before[rank, number]

    def described(self) -> dict[str, Any]:
        """Return the index as it is stored in a manifest."""
        tensors = {
            name: {"shape": list(one.shape)}
            | ({"first": one.first, "cuts": list(one.cuts)} if one.cuts else {})
            | ({"moments": one.moments} if one.moments != Division.moments else {})
            for name, one in self.divisions.items()
        }
        return {"ranks": self.ranks, "tensors": tensors}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Index:
        """Create the index from its form in a manifest."""
        ranks = described["ranks"]
        return cls(
            ranks,
            {
                name: Division(
                    tuple(one["shape"]),
                    ranks,
                    one.get("first", 0),
                    tuple(one.get("cuts", ())),
                    one.get("moments", Division.moments),
                )
                for name, one in described["tensors"].items()
            },
        )


class Indexed:
    """The places of tensors (`shards.Places`) according to an index."""

    def __init__(
        self, index: Index, tensors: Mapping[str, tuple[str, int]], files: Mapping[int, tuple[Path, int]]
    ) -> None:
        """`tensors`: tensor name -> (parameter, number of the tensor among those of its kind). `files`: rank -> (path,
        byte offset of the first value)."""
        self.index, self.tensors, self.files = index, tensors, files

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.index.divisions[self.tensors[name][0]].shape if name in self.tensors else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.index.divisions[parameter].shape for name, (parameter, _) in self.tensors.items()}

    def holders(self, name: str, begin: int, end: int) -> Sequence[int]:
        if name not in self.tensors:
            return ()
        return self.index.divisions[self.tensors[name][0]].holders(begin, end)

    def stored(self, holder: int, name: str) -> Stored:
        parameter, number = self.tensors[name]
        division = self.index.divisions[parameter]
        path, start = self.files[holder]
        elements = self.index.before(holder, parameter, number)
        return Stored(Piece(name, division.shape, *division.run(holder)), path, start + 4 * elements)


def build_index(
    ranks: Ranks,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Iterable[Piece],
    moments: Mapping[str, int] | None = None,
) -> Index:
    """Return the index of the pieces that all ranks hold; every rank calls it with its own `pieces`.

    `moments`: the number of moments for parameters that do not have two. Raises RuntimeError unless the ranks together
    hold every element of `shapes` once. The ranks exchange one number per parameter, and the runs of parameters that
    are not in equal parts.
    """
    own = {piece.name: (piece.begin, piece.count) for piece in pieces}
    parts = {name: equal_part(math.prod(shape), ranks.rank, ranks.world) for name, shape in shapes.items()}
    alike = ranks.all_reduce_numbers(
        [(name not in own) if not part[1] else own.get(name) == part for name, part in parts.items()]
    )
    cut = [name for name, count in zip(shapes, alike, strict=True) if count < ranks.world]
    mine = [(place, *own[name]) for place, name in enumerate(cut) if name in own]
    everyone = ranks.all_gather_object(mine) if cut else []
    runs: dict[str, list[tuple[int, int, int]]] = {name: [] for name in cut}
    for rank, theirs in enumerate(everyone):
        for place, begin, count in theirs:
            runs[cut[place]].append((rank, begin, count))
    found = {
        name: _cut(name, shape, ranks.world, runs[name]) if name in runs else Division(tuple(shape), ranks.world)
        for name, shape in shapes.items()
    }
    fewer = {name: replace(found[name], moments=count) for name, count in (moments or {}).items()}
    return Index(ranks.world, found | fewer)


def _cut(name: str, shape: tuple[int, ...], ranks: int, runs: Sequence[tuple[int, int, int]]) -> Division:
    """Return the division of a parameter from its runs (rank, begin, count), in the order of ranks."""
    cuts = [0]
    for rank, begin, count in runs:
        cuts += [cuts[-1]] * (rank - runs[0][0] - len(cuts) + 1)  # for ranks in between that hold none
        if begin != cuts[-1]:
            raise RuntimeError(
                f"{name}: rank {rank} holds its elements from {begin} on, the ranks before it only up to {cuts[-1]}"
            )
        cuts.append(begin + count)
    if cuts[-1] != math.prod(shape):
        raise RuntimeError(f"{name}: the ranks hold {cuts[-1]} of its {math.prod(shape)} elements")
    return Division(tuple(shape), ranks, runs[0][0] if runs else 0, tuple(cuts))
