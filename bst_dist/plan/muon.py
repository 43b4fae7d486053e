"""Muon's cost on the busiest rank: elements updated, FLOPs to orthogonalise, bytes sent, buffers.

The owner of each matrix is chosen by the same rule as in training (`parallel.matrices`), on ZeRO's layouts: one flat
tensor in equal parts in stages 1 and 2, equal parts of every matrix in stage 3. Without ZeRO every rank orthogonalises
all matrices. Exchanged numbers are in bf16, as on every accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bst_dist.parallel.matrices.owners import Matrix, owners

EXCHANGED = 2
"""Bytes per number exchanged or orthogonalised."""


@dataclass(frozen=True)
class MuonLoad:
    """Muon's cost on one rank. With several ranks, each field is the largest over the ranks."""

    updated: int
    """Elements of matrices that a rank updates."""
    flops: float
    """FLOPs to orthogonalise the matrices that the rank owns."""
    sent: int
    """Bytes that the rank sends: its runs of other ranks' matrices to their owners, and, of its own matrices, the
    orthogonalised runs back to the other ranks."""
    buffers: int
    """Bytes of buffers during the update, besides momentum and gradients."""


@lru_cache(maxsize=256)
def busiest(elements: tuple[int, ...], work: tuple[float, ...], stage: int, world: int, alignment: int = 1) -> MuonLoad:
    """Return the largest costs over the ranks.

    Args:
        elements: of each matrix.
        work: FLOPs to orthogonalise each matrix.
        alignment: in stages 1 and 2, a rank's part of the flat tensor is a multiple of this many elements.
    """
    largest = 4 * EXCHANGED * max(elements)  # a bf16 matrix, its result, two products
    if stage == 0 or world == 1:
        return MuonLoad(sum(elements), sum(work), 0, largest)
    flat = -(-sum(elements) // (alignment * world)) * alignment
    matrices = _in_equal_parts(elements, work, world) if stage == 3 else _flat(elements, work, flat)
    flops, out, back, owned = ([0.0] * world, [0] * world, [0] * world, [0] * world)
    for matrix, size, owner in zip(matrices, elements, owners(matrices), strict=True):
        flops[owner] += matrix.work
        if len(matrix.runs) == 1:
            continue
        owned[owner] += size
        back[owner] += size - matrix.runs[owner][1]
        for rank, (_, count) in matrix.runs.items():
            out[rank] += count if rank != owner else 0
    updated = sum(-(-size // world) for size in elements) if stage == 3 else flat
    # Buffers: runs sent and received before, whole matrices and their results, runs sent and received after.
    held = max(2 * (a + b) + 2 * whole for a, b, whole in zip(out, back, owned, strict=True))
    sent = max(a + b for a, b in zip(out, back, strict=True))
    return MuonLoad(updated, max(flops), EXCHANGED * sent, EXCHANGED * held + largest)


def _in_equal_parts(elements: tuple[int, ...], work: tuple[float, ...], world: int) -> list[Matrix]:
    found = []
    for size, cost in zip(elements, work, strict=True):
        part = -(-size // world)
        ranks = range(-(-size // part))
        found.append(Matrix({rank: (rank * part, min(part, size - rank * part)) for rank in ranks}, cost))
    return found


def _flat(elements: tuple[int, ...], work: tuple[float, ...], share: int) -> list[Matrix]:
    """Return the matrices laid end to end in one flat tensor; `share`: elements per rank."""
    begin, found = 0, []
    for size, cost in zip(elements, work, strict=True):
        runs = {}
        for rank in range(begin // share, (begin + size - 1) // share + 1):
            first = max(begin, rank * share)
            last = min(begin + size, (rank + 1) * share)
            runs[rank] = first - begin, last - first
        found.append(Matrix(runs, cost))
        begin += size
    return found
