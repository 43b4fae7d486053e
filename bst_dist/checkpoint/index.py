"""Which elements of which parameter are in which rank's files, as a checkpoint's manifest says it.

With it a rank finds what it needs without opening a file for its header. Whatever the ZeRO stage, the runs that the
ranks hold of a parameter follow one another by rank. So a parameter is described by where it is cut, or, when all ranks
have equal parts of it, by nothing but its shape: the description grows with parameters + ranks, not with their product.

A file has the tensors of its kind one after the other, of each tensor the runs of all parameters in the order of the
index; so where a run lies follows from the runs before it.
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
    """Of the whole checkpoint."""
    first: int = 0
    """The first rank that holds any, where they are not equal parts."""
    cuts: tuple[int, ...] = ()
    """Where the run of each rank from `first` on begins, and where the last ends; empty: equal parts of all ranks."""
    moments: int = 2
    """How many of the optimizer's tensors there are of it: AdamW's two, or Muon's first alone."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    def run(self, rank: int) -> tuple[int, int]:
        """First element that a rank holds, and how many."""
        if not self.cuts:
            return equal_part(self.numel, rank, self.ranks)
        place = rank - self.first
        if not 0 <= place < len(self.cuts) - 1:
            return 0, 0
        return self.cuts[place], self.cuts[place + 1] - self.cuts[place]

    def holders(self, begin: int, end: int) -> range:
        """The ranks that hold elements `begin` to `end`; some of them may hold none at all."""
        if begin >= end:
            return range(0)
        if not self.cuts:
            size = max(1, -(-self.numel // self.ranks))
            return range(begin // size, (end - 1) // size + 1)
        return range(self.first + bisect_right(self.cuts, begin) - 1, self.first + bisect_left(self.cuts, end))


def equal_part(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """First element and count of a rank's part when all parts but the last are equal, as ZeRO-3 cuts a parameter."""
    size = -(-numel // ranks)
    begin = min(rank * size, numel)
    return begin, min(size, numel - begin)


class Index:
    """How all parameters of a checkpoint are divided."""

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
        """Elements that lie before those of `name` in tensor `number` of the rank's file, earlier tensors included."""
        earlier = sum(self.total(rank, tensor) for tensor in range(number))
        return earlier + int(self._ends(rank, number)[self._place[name]])

    def total(self, rank: int, number: int = 0) -> int:
        """Elements that a rank holds of tensor `number`, of all parameters that have it."""
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
        """For a manifest."""
        tensors = {
            name: {"shape": list(one.shape)}
            | ({"first": one.first, "cuts": list(one.cuts)} if one.cuts else {})
            | ({"moments": one.moments} if one.moments != Division.moments else {})
            for name, one in self.divisions.items()
        }
        return {"ranks": self.ranks, "tensors": tensors}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Index:
        """From a manifest."""
        ranks = described["ranks"]
        return cls(ranks, {
            name: Division(tuple(one["shape"]), ranks, one.get("first", 0), tuple(one.get("cuts", ())),
                           one.get("moments", Division.moments))
            for name, one in described["tensors"].items()
        })  # fmt: skip


class Indexed:
    """The places of some tensors of every parameter (`shards.Places`), as an index tells them."""

    def __init__(self, index: Index, tensors: Mapping[str, tuple[str, int]],
                 files: Mapping[int, tuple[Path, int]]) -> None:  # fmt: skip
        """`tensors`: by name, the parameter and how many tensors of it a file has before this one; `files`: by rank,
        the file and the byte at which its first value lies."""
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


def agreed(ranks: Ranks, shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[Piece],
           moments: Mapping[str, int] | None = None) -> Index:  # fmt: skip
    """The index of what all ranks hold; every rank calls it, with the `pieces` that it holds.

    `moments`: of the parameters that have not two. Raises RuntimeError unless the ranks together hold every element of
    `shapes` once. What is exchanged is a number a parameter, and the runs of those that are not in equal parts.
    """
    own = {piece.name: (piece.begin, piece.count) for piece in pieces}
    parts = {name: equal_part(math.prod(shape), ranks.rank, ranks.world) for name, shape in shapes.items()}
    alike = ranks.sum([(name not in own) if not part[1] else own.get(name) == part for name, part in parts.items()])
    cut = [name for name, count in zip(shapes, alike, strict=True) if count < ranks.world]
    everyone = ranks.gather([(place, *own[name]) for place, name in enumerate(cut) if name in own]) if cut else []
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
    """The division of a parameter, from (rank, begin, count) of each run, by rank."""
    cuts = [0]
    for rank, begin, count in runs:
        cuts += [cuts[-1]] * (rank - runs[0][0] - len(cuts) + 1)  # ranks between that hold none of it
        if begin != cuts[-1]:
            raise RuntimeError(
                f"{name}: rank {rank} holds its elements from {begin} on, the ranks before it only up to {cuts[-1]}"
            )
        cuts.append(begin + count)
    if cuts[-1] != math.prod(shape):
        raise RuntimeError(f"{name}: the ranks hold {cuts[-1]} of its {math.prod(shape)} elements")
    return Division(tuple(shape), ranks, runs[0][0] if runs else 0, tuple(cuts))
