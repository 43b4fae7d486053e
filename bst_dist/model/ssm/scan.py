"""Scans of diagonal linear recurrences over chunks of a sequence.

Between two chunks only the state crosses, multiplied by the chunk's transition; an associative scan by doubling takes
log2(chunks) steps, each over all chunks at once. A document start multiplies the state by zero: two chunks are
connected only when no start lies between them, which is an equality of running counts of starts.

Shapes: B rows, m chunks, * any state dimensions (complex).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bst_dist.parallel.past import Past


def power(log_a: Tensor, exponent: int | Tensor, dtype: torch.dtype) -> Tensor:
    """``a ** exponent`` from ``log a`` in double precision, cast to `dtype`.

    The phase reaches 1e5 radians over long sequences, where single precision has lost it.
    """
    return torch.exp(log_a * exponent).to(dtype)


def start_incoming_states(
    ends: Tensor, log_a: Tensor, starts: Tensor | None, past: Past, name: str = "ssm"
) -> Callable[[], Tensor]:
    """Ask for the state before each chunk (B, m, *), from what each chunk alone leaves behind.

    What is returned gives it. The state before the slice may be under way between ranks until then: a layer computes
    what does not wait for it in between.

    Args:
        ends: (B, m, *) complex, the state each chunk leaves, started from zero.
        log_a: (*) complex128, log of the transition over one chunk.
        starts: (B, m) bool, chunk begins a document; None when no chunk does.
        past: asked for the state before the first chunk.
    """
    m = ends.shape[1]
    documents = None if starts is None else starts.cumsum(1)  # (B, m): which document of the slice a chunk is in
    running = _inclusive_scan(ends, log_a, documents)
    transition = power(log_a, m, ends.dtype)
    if documents is not None:
        transition = transition * _like(documents[:, -1] == 0, running[:, -1])
    arrive = past.start_state(name, running[:, -1], transition)

    def finish() -> Tensor:
        before = arrive()
        incoming = torch.cat((torch.zeros_like(ends[:, :1]), running[:, :-1]), dim=1)
        if starts is not None:
            incoming = incoming * _like(~starts, incoming)
        if before is None:
            return incoming
        steps = torch.arange(m, device=ends.device).view(m, *[1] * log_a.dim())
        reach = power(log_a, steps, ends.dtype) * before.unsqueeze(1)  # (B, m, *)
        if documents is not None:
            reach = reach * _like(documents == 0, reach)
        return incoming + reach

    return finish


def _inclusive_scan(x: Tensor, log_a: Tensor, documents: Tensor | None) -> Tensor:
    """State after each chunk, started from zero before the first: (B, m, *) -> (B, m, *)."""
    step, m = 1, x.shape[1]
    while step < m:
        reach = x[:, :-step] * power(log_a, step, x.dtype)
        if documents is not None:
            reach = reach * _like(documents[:, step:] == documents[:, :-step], reach)
        x = torch.cat((x[:, :step], x[:, step:] + reach), dim=1)
        step *= 2
    return x


def _like(condition: Tensor, x: Tensor) -> Tensor:
    """`condition` with trailing dimensions of size one, so that it broadcasts against `x`."""
    return condition.view(*condition.shape, *[1] * (x.dim() - condition.dim()))
