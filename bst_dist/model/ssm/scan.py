"""Scans of diagonal linear recurrences over chunks of a sequence.

Only the state passes from chunk to chunk, multiplied by the chunk's transition. An associative scan by doubling takes
log2(chunks) steps, each over all chunks at once. A document start multiplies the state by zero. So two chunks are
connected only when no start lies between them: when their running counts of starts are equal.

Shapes: B rows, m chunks, * any state dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bst_dist.model.ssm.pairs import Pair, pair_of
from bst_dist.parallel.sequence.past import Past


def start_incoming_states(
    ends: Pair, log_a: Pair, starts: Tensor | None, past: Past, inside: bool = False
) -> Callable[[], Pair]:
    """Start computing the state before each chunk (B, m, *), and return a function that gives it.

    Until that function is called, the state before the slice may still be on its way from another rank. Meanwhile a
    layer can compute what does not depend on it.

    Args:
        ends: (B, m, *), the state after each chunk when started from zero.
        log_a: (*) float64, log of the transition over one chunk.
        starts: (B, m) bool, whether the chunk begins a document; None: none does.
        past: gives the state before the first chunk.
        inside: documents begin anywhere in the marked chunks. The state before such a chunk is returned, but it is not
            passed on to later chunks.
    """
    m, dtype = ends.real.shape[1], ends.real.dtype
    documents = None if starts is None else starts.cumsum(1)  # (B, m): which document of the slice a chunk is in
    running = _inclusive_scan(ends, log_a, documents)
    transition = log_a.power(m, dtype)
    last = running.each(lambda x: x[:, -1])
    if documents is not None:
        transition = transition.scaled(_like(documents[:, -1] == 0, last.real))
    arrive = past.start_state("ssm", last.joined(), transition.joined())

    def finish() -> Pair:
        before = arrive()
        incoming = running.each(lambda x: torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1))
        if starts is not None and not inside:
            incoming = incoming.scaled(_like(~starts, incoming.real))
        if before is None:
            return incoming
        steps = torch.arange(m, device=last.real.device).view(m, *[1] * log_a.real.dim())
        reach = log_a.power(steps, dtype).times(pair_of(before.unsqueeze(1)))  # (B, m, *)
        if documents is not None:
            before_it = documents - starts.to(documents.dtype) if inside else documents
            reach = reach.scaled(_like(before_it == 0, reach.real))
        return incoming.plus(reach)

    return finish


def _inclusive_scan(x: Pair, log_a: Pair, documents: Tensor | None) -> Pair:
    """Return the state after each chunk, started from zero before the first: (B, m, *) -> (B, m, *)."""
    doublings = (x.real.shape[1] - 1).bit_length()
    doubling = torch.arange(doublings, device=log_a.real.device)
    exponents = (torch.ones_like(doubling) << doubling).view(doublings, *[1] * log_a.real.dim())
    for i, transition in enumerate(zip(*log_a.power(exponents, x.real.dtype).each(Tensor.unbind), strict=True)):
        step = 1 << i
        reach = Pair(*(y[:, :-step] for y in x)).times(Pair(*transition))
        if documents is not None:
            reach = reach.scaled(_like(documents[:, step:] == documents[:, :-step], reach.real))
        x = Pair(*(torch.cat((y[:, :step], y[:, step:] + z), dim=1) for y, z in zip(x, reach, strict=True)))
    return x


def _like(condition: Tensor, x: Tensor) -> Tensor:
    """Return `condition` with trailing dimensions of size one, so that it broadcasts against `x`."""
    return condition.view(*condition.shape, *[1] * (x.dim() - condition.dim()))
