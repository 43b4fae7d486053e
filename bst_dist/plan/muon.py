"""What Muon asks of the rank that has most to do: its share, what it orthogonalises, what it sends.

Which rank owns a matrix is decided by the training's own rule (`parallel.matrices`), on the layouts that ZeRO
makes: one flat tensor in equal parts in stages 1 and 2, equal parts of every matrix in stage 3. Without ZeRO every rank
orthogonalises all of them. Exchanged are numbers in bf16, as on every accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bst_dist.parallel.matrices.owners import Matrix, owners

EXCHANGED = 2
"""Bytes of a number that is exchanged, or orthogonalised."""


@dataclass(frozen=True)
class Share:
    """Of several ranks each number is that of the rank where it is largest."""

    updated: int
    """Elements of matrices that a rank updates."""
    flops: float
    """To orthogonalise the matrices that it owns."""
    sent: int
    """Bytes that it sends: runs to their owners, and to others their runs of what it owns."""
    buffers: int
    """Bytes beside momentum and gradients while it works."""


@lru_cache(maxsize=256)
def busiest(elements: tuple[int, ...], work: tuple[float, ...], stage: int, world: int, alignment: int = 1) -> Share:
    """Of matrices with so many elements each, and FLOPs to orthogonalise them; `alignment`: elements that a rank's part
    of the flat tensor is a multiple of (stages 1 and 2)."""
    largest = 4 * EXCHANGED * max(elements)  # a matrix in bf16, what becomes of it, and its products
    if stage == 0 or world == 1:
        return Share(sum(elements), sum(work), 0, largest)
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
    # Sent and received one way, whole matrices and what becomes of them, sent and received the other way.
    held = max(2 * (a + b) + 2 * whole for a, b, whole in zip(out, back, owned, strict=True))
    sent = max(a + b for a, b in zip(out, back, strict=True))
    return Share(updated, max(flops), EXCHANGED * sent, EXCHANGED * held + largest)


def _in_equal_parts(elements: tuple[int, ...], work: tuple[float, ...], world: int) -> list[Matrix]:
    found = []
    for size, cost in zip(elements, work, strict=True):
        part = -(-size // world)
        ranks = range(-(-size // part))
        found.append(Matrix({rank: (rank * part, min(part, size - rank * part)) for rank in ranks}, cost))
    return found


def _flat(elements: tuple[int, ...], work: tuple[float, ...], share: int) -> list[Matrix]:
    """One matrix after the other; `share`: elements of a rank."""
    begin, found = 0, []
    for size, cost in zip(elements, work, strict=True):
        runs = {}
        for rank in range(begin // share, (begin + size - 1) // share + 1):
            first, last = max(begin, rank * share), min(begin + size, (rank + 1) * share)
            runs[rank] = first - begin, last - first
        found.append(Matrix(runs, cost))
        begin += size
    return found
