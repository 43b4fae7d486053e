"""S4D: a diagonal state space model computed in chunks (Gu et al. 2022, arXiv 2206.11893).

Per channel, with n = N/2 complex modes, step dt and A = -exp(a) + i w (zero-order hold; B = 1, since a trainable B
would only rescale C): ``x_t = Ā x_{t-1} + B̄ z_t``, ``y_t = 2 Re(C x_t) + d z_t``, ``Ā = exp(dt A)``,
``B̄ = (Ā - 1)/A``.

Inside a chunk of T tokens the map is a causal T x T matrix; between chunks the state passes. Both are matmuls. So time
and memory are linear in the length, no kernel is longer than T, and causality is exact, not only up to the rounding of
an FFT. All computations are in single precision, also under autocast; small tables of powers are in double.

Shapes: B rows, L tokens, m = L/T chunks, Ds channels, n modes, C output maps, F sets of dynamics (1 or C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bst_dist.model.config import SSMConfig
from bst_dist.model.document_mask import Borders, Starts, columns
from bst_dist.model.matmul import contiguous_gradient, contiguous_operand
from bst_dist.model.roles import Role
from bst_dist.model.ssm.convolution import causal_matrix
from bst_dist.model.ssm.pairs import Pair
from bst_dist.model.ssm.scan import start_incoming_states
from bst_dist.parallel.sequence.past import Past

WIDER = 4
"""Factor by which chunks are longer in `block_ends`. It needs states only at the ends of blocks, and longer chunks have
fewer states in between."""


def initial_frequencies(init: str, modes: int) -> Tensor:
    """Return Im A of the n = N/2 modes, (n,) float64 (arXiv 2206.11893, equations 8 and 9; LegS by eigenvalues)."""
    k = torch.arange(modes, dtype=torch.float64)
    if init == "lin":
        return math.pi * k
    full = 2 * modes
    if init == "inv":
        return full / math.pi * (full / (2 * k + 1) - 1)
    root = torch.sqrt(2 * torch.arange(full, dtype=torch.float64) + 1)
    skew = 0.5 * (torch.triu(torch.outer(root, root), 1) - torch.tril(torch.outer(root, root), -1))
    return torch.linalg.eigvals(skew).imag.sort(descending=True).values[:modes].flip(0)


class S4D(nn.Module):
    """Diagonal SSM from Ds channels to C output maps each: (B, L, Ds) -> (B, L, C, Ds).

    With `own_dynamics` each output map has its own SSM (F = C); otherwise the maps are C read-outs of one state.
    With `shared_modes` all channels share one set of modes; each has its own step and read-out (as in DSS).
    """

    def __init__(
        self, width: int, maps: int, config: SSMConfig, own_dynamics: bool = False, shared_modes: bool = False
    ) -> None:
        super().__init__()
        modes, channels = config.state // 2, 1 if shared_modes else width
        sets = maps if own_dynamics else 1
        log_range = math.log(config.dt_min), math.log(config.dt_max)
        self.chunk, self.own_dynamics = config.chunk, own_dynamics
        self.log_dt = nn.Parameter(torch.empty(sets, width).uniform_(*log_range))
        self.log_decay = nn.Parameter(torch.full((sets, channels, modes), math.log(0.5)))
        frequencies = initial_frequencies(config.init, modes).float()
        self.frequency = nn.Parameter(frequencies.expand(sets, channels, modes).clone())
        # Pairs of real numbers, because ZeRO drops the imaginary part of a complex parameter with only a warning.
        self.read_out = nn.Parameter(torch.randn(maps, width, modes, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(maps, width))
        self.roles = dict.fromkeys(("log_dt", "log_decay", "frequency"), Role.DYNAMICS)

    def log_transition(self) -> tuple[Pair, Pair]:
        """Return ``log Ā`` and B̄, (F, Ds, n) float64 pairs."""
        step = torch.exp(self.log_dt.double()).unsqueeze(-1)
        a = Pair(-torch.exp(self.log_decay.double()), self.frequency.double())
        log_a = a.scaled(step)
        # exp(log Ā) - 1 without cancellation: e^x cos y - 1 = (e^x - 1) cos y - 2 sin²(y/2)
        half = torch.sin(log_a.imag / 2)
        turn = torch.cos(log_a.imag)
        grown = Pair(torch.expm1(log_a.real) * turn - 2 * half * half, torch.exp(log_a.real) * torch.sin(log_a.imag))
        inverse = Pair(a.real, -a.imag).scaled(1 / (a.real * a.real + a.imag * a.imag))
        return log_a, grown.times(inverse)

    def kernel(self, length: int) -> Tensor:
        """Return the convolution kernel K without the skip term, (C, Ds, length), a reference for the tests."""
        log_a, b = (x.joined() for x in self.log_transition())
        powers = torch.exp(log_a.unsqueeze(-1) * torch.arange(length, device=log_a.device))  # (F, Ds, n, length)
        weights = torch.complex(*self.read_out.double().unbind(-1)) * b
        return 2 * torch.einsum("cdn,cdnl->cdl", weights, powers.expand(len(self.read_out), -1, -1, -1)).real

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, z: Tensor, past: Past, starts: Starts | None = None) -> Tensor:
        """Return the outputs of every token, (B, L, Ds) -> (B, L, C, Ds); only for maps that share their dynamics.

        `starts`: where documents begin; the state before them is zero.
        """
        if isinstance(starts, Borders):
            return self._with_borders(z, past, starts)
        batch, length, width = z.shape
        u, chunk, m = self._chunks(z)
        log_a, b = self.log_transition()
        powers = _powers(log_a, chunk, u.dtype)  # (1, Ds, n, T + 1)
        ends = _to_states(u @ _into_state(powers, b).mT, batch, m, len(log_a.real))  # (B, m, 1, Ds, n)
        begins = None if starts is None else _chunk_starts(starts, m)
        incoming = start_incoming_states(ends, log_a.scaled(chunk), begins, past)
        y = u @ self._within_chunk(powers, b).mT  # (Ds, B m, C T), while the past arrives
        y = contiguous_gradient(y + _from_states(incoming()) @ self._out_of_state(powers).mT)
        return y.view(width, batch, m, -1, chunk).permute(1, 2, 4, 3, 0).reshape(batch, length, -1, width)

    def _with_borders(self, z: Tensor, past: Past, starts: Borders) -> Tensor:
        """Return what `forward` returns when documents begin at any token (`document_mask`)."""
        batch, length, width = z.shape
        z = z.to(self.skip.dtype)
        u, chunk, m = self._chunks(z.masked_fill(~starts.last(_chunk(length, self.chunk)).unsqueeze(-1), 0))
        log_a, b = self.log_transition()
        powers = _powers(log_a, chunk, u.dtype)
        ends = _to_states(u @ _into_state(powers, b).mT, batch, m, len(log_a.real))
        incoming = start_incoming_states(ends, log_a.scaled(chunk), starts.within(chunk), past, inside=True)
        by_document = columns(starts, chunk, past)
        u = by_document.spread(z.reshape(-1, chunk, width)).permute(2, 0, 1).contiguous()  # (Ds, B m + E, T)
        y = u @ self._within_chunk(powers, b).mT
        entering = nn.functional.pad(_from_states(incoming()), (0, 0, 0, u.shape[1] - batch * m))
        y = contiguous_gradient(y + entering @ self._out_of_state(powers).mT).view(*u.shape[:2], -1, chunk)
        return by_document.collected(y.permute(1, 3, 2, 0)).view(batch, length, -1, width)

    def prepare(self, like: Tensor, past: Past, starts: Starts | None) -> None:
        """See `Prepares.prepare`."""
        if not self.own_dynamics and isinstance(starts, Borders):
            columns(starts, _chunk(like.shape[1], self.chunk), past)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def block_ends(self, z: Tensor, block: int, past: Past, starts: Starts | None = None) -> Tensor:
        """Return the outputs of each block's last token, (B, L, Ds) -> (B, nb, C, Ds), for the nb blocks ending here.

        Outputs of other tokens are not computed: all tokens update the state, and only the state at block ends is read.
        A slice is whole blocks, or lies within one block. Then nb is 1 if it ends the block, else 0.
        """
        if isinstance(starts, Borders):  # only a block's last document reaches its end
            z = z.masked_fill(~starts.last(block).unsqueeze(-1), 0)
            starts = starts.within(block)
        batch, length, _ = z.shape
        span = min(block, length)
        u, chunk, m = self._chunks(z, WIDER * self.chunk if span % (WIDER * self.chunk) == 0 else self.chunk)
        log_a, b = self.log_transition()
        into_state = _into_state(_powers(log_a, chunk, u.dtype), b)
        ends = _to_states(u @ into_state.mT, batch, m, len(log_a.real))  # (B, m, F, Ds, n)
        ends = _join_chunks(ends, log_a.scaled(chunk), span // chunk)  # (B, nb, F, Ds, n)
        incoming = start_incoming_states(ends, log_a.scaled(span), starts, past)()
        after = ends.plus(log_a.power(span, u.dtype).times(incoming))
        if not past.blocks_ended(block, length):
            return z.new_empty(batch, 0, *self.skip.shape, dtype=u.dtype)
        real, imag = self.read_out.unbind(-1)
        y = 2 * (real * after.real - imag * after.imag).sum(-1)  # (B, nb, C, Ds)
        return y + self.skip * z[:, span - 1 :: span].to(u.dtype).unsqueeze(2)

    def _chunks(self, z: Tensor, chunk: int | None = None) -> tuple[Tensor, int, int]:
        """Return chunks and their sizes: (B, L, Ds) -> (Ds, B m, T), T, m.

        Channels are the batch of a matmul over tokens. Nothing is copied if each channel's tokens are contiguous.
        """
        batch, length, width = z.shape
        chunk = _chunk(length, chunk or self.chunk)
        m = length // chunk
        u = z.view(batch, m, chunk, width).permute(3, 0, 1, 2).reshape(width, batch * m, chunk)
        return contiguous_operand(u.to(self.skip.dtype)), chunk, m

    def _within_chunk(self, powers: Pair, b: Pair) -> Tensor:
        """Return the map from tokens to outputs in a chunk, the causal matrices of K with the skip: (Ds, C T, T)."""
        weights = Pair(*self.read_out.unbind(-1)).times(_narrow(b, powers))  # (C, Ds, n)
        terms = powers.each(lambda x: x[..., :-1])
        kernel = weights.real.unsqueeze(-2) @ terms.real - weights.imag.unsqueeze(-2) @ terms.imag
        kernel = 2 * kernel.squeeze(-2)  # (C, Ds, T)
        kernel = torch.cat((kernel[..., :1] + self.skip.unsqueeze(-1), kernel[..., 1:]), dim=-1)
        return causal_matrix(kernel).transpose(0, 1).reshape(kernel.shape[1], -1, kernel.shape[-1])

    def _out_of_state(self, powers: Pair) -> Tensor:
        """Return the map from the state before a chunk to its outputs, 2 Re(C Ā^(t+1) x): (Ds, C T, 2n).

        It acts on the real, then the imaginary parts of the state.
        """
        later = powers.each(lambda x: x[..., 1:])
        out = Pair(*(2 * self.read_out).unbind(-1)).each(lambda x: x.unsqueeze(-1)).times(later)  # (C, Ds, n, T)
        both = torch.cat((out.real, -out.imag), dim=2)  # (C, Ds, 2n, T)
        return both.permute(1, 0, 3, 2).reshape(both.shape[1], -1, both.shape[2])


def _chunk(length: int, chunk: int) -> int:
    """Return the chunk of a slice: `chunk`, or the whole slice if it is a part of a block that is not whole chunks."""
    return length if length % chunk else chunk


def _narrow(x: Pair, like: Pair) -> Pair:
    return x.each(lambda part: part.to(like.real.dtype))


def _into_state(powers: Pair, b: Pair) -> Tensor:
    """Return the map from tokens to the state at the chunk's end, B̄ Ā^(T-1-j): (Ds, 2 F n, T).

    All real parts come before the imaginary parts.
    """
    backwards = powers.each(lambda x: x[..., :-1].flip(-1))
    into = _narrow(b, powers).each(lambda x: x.unsqueeze(-1)).times(backwards)  # (F, Ds, n, T)
    both = torch.stack(into)  # (2, F, Ds, n, T)
    return both.permute(2, 0, 1, 3, 4).reshape(both.shape[2], -1, both.shape[-1])


def _join_chunks(ends: Pair, log_a: Pair, count: int) -> Pair:
    """Return the end states of runs of `count` chunks, from those of single chunks: (B, m, *) -> (B, m / count, *)."""
    if count == 1:
        return ends
    remaining = torch.arange(count - 1, -1, -1, device=ends.real.device).view(count, *[1] * log_a.real.dim())
    reach = ends.each(lambda x: x.unflatten(1, (-1, count))).times(log_a.power(remaining, ends.real.dtype))
    return reach.each(lambda x: x.sum(2))


def _powers(log_a: Pair, chunk: int, dtype: torch.dtype) -> Pair:
    """Return Ā^l for l = 0 ... T, (*, T + 1), from two short tables: l = 16 q + r.

    One exponential for each l would dominate the time of the layer.
    """
    log_a = log_a.each(lambda x: x.unsqueeze(-1))
    low = log_a.power(torch.arange(16, device=log_a.real.device), dtype)
    high = log_a.power(torch.arange(0, chunk + 1, 16, device=log_a.real.device), dtype)
    table = high.each(lambda x: x.unsqueeze(-1)).times(low.each(lambda x: x.unsqueeze(-2)))
    return table.each(lambda x: x.flatten(-2)[..., : chunk + 1])


def _to_states(x: Tensor, batch: int, m: int, sets: int) -> Pair:
    """(Ds, B m, 2 F n) -> (B, m, F, Ds, n)."""
    return Pair(*x.view(len(x), batch, m, 2, sets, -1).permute(3, 1, 2, 4, 0, 5).contiguous())


def _from_states(x: Pair) -> Tensor:
    """(B, m, F, Ds, n) -> (Ds, B m, 2 F n)."""
    both = torch.stack(x)  # (2, B, m, F, Ds, n)
    return both.permute(4, 1, 2, 0, 3, 5).reshape(both.shape[4], both.shape[1] * both.shape[2], -1)


def _chunk_starts(starts: Tensor, chunks: int) -> Tensor:
    """Return block starts (B, nb) as chunk starts (B, m): a block's first chunk begins the document."""
    batch, blocks = starts.shape
    spread = starts.new_zeros(batch, blocks, chunks // blocks)
    spread[:, :, 0] = starts
    return spread.view(batch, chunks)
