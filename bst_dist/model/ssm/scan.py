"""Scans of diagonal linear recurrences over chunks of a sequence.

Between two chunks only the state crosses, multiplied by the chunk's transition; an associative scan by doubling takes
log2(chunks) steps, each over all chunks at once. A document start multiplies the state by zero: two chunks are
connected only when no start lies between them, which is an equality of running counts of starts.

Shapes: B rows, m chunks, * any state dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bst_dist.model.ssm.pairs import Pair, pair_of
from bst_dist.parallel.sequence.past import Past


def start_incoming_states(
    ends: Pair, log_a: Pair, starts: Tensor | None, past: Past, name: str = "ssm", inside: bool = False
) -> Callable[[], Pair]:
    """Ask for the state before each chunk (B, m, *), from what each chunk alone leaves behind.

    What is returned gives it. The state before the slice may be under way between ranks until then: a layer computes
    what does not wait for it in between.

    Args:
        ends: (B, m, *), the state each chunk leaves, started from zero.
        log_a: (*) float64, log of the transition over one chunk.
        starts: (B, m) bool, chunk begins a document; None when no chunk does.
        past: asked for the state before the first chunk.
        inside: documents begin anywhere in those chunks: the state before such a chunk is given, and goes no further.
    """
    m, dtype = ends.real.shape[1], ends.real.dtype
    documents = None if starts is None else starts.cumsum(1)  # (B, m): which document of the slice a chunk is in
    running = _inclusive_scan(ends, log_a, documents)
    transition, last = log_a.power(m, dtype), running.each(lambda x: x[:, -1])
    if documents is not None:
        transition = transition.scaled(_like(documents[:, -1] == 0, last.real))
    arrive = past.start_state(name, last.joined(), transition.joined())

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
    """State after each chunk, started from zero before the first: (B, m, *) -> (B, m, *)."""
    step, m = 1, x.real.shape[1]
    while step < m:
        reach = x.each(lambda y: y[:, :-step]).times(log_a.power(step, x.real.dtype))  # noqa: B023
        if documents is not None:
            reach = reach.scaled(_like(documents[:, step:] == documents[:, :-step], reach.real))
        x = Pair(*(torch.cat((y[:, :step], y[:, step:] + z), dim=1) for y, z in zip(x, reach, strict=True)))
        step *= 2
    return x


def _like(condition: Tensor, x: Tensor) -> Tensor:
    """`condition` with trailing dimensions of size one, so that it broadcasts against `x`."""
    return condition.view(*condition.shape, *[1] * (x.dim() - condition.dim()))
