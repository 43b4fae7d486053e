"""S4D: a diagonal state space model computed in chunks (Gu et al. 2022, arXiv 2206.11893).

Per channel, with n = N/2 complex modes, step dt and A = -exp(a) + i w (zero-order hold; B = 1, since a trainable B
would only rescale C): ``x_t = Ā x_{t-1} + B̄ z_t``, ``y_t = 2 Re(C x_t) + d z_t``, ``Ā = exp(dt A)``,
``B̄ = (Ā - 1)/A``.

Inside a chunk of T tokens the map is a causal T x T matrix, between chunks the state. Both are matmuls, so time and
memory are linear in the length, no kernel longer than T exists, and causality is exact rather than up to the rounding
of an FFT. Everything here is single precision whatever the autocast, with small tables of powers in double.

Shapes: B rows, L tokens, m = L/T chunks, Ds channels, n modes, C output maps, F sets of dynamics (1 or C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bst_dist.model.config import SSMConfig
from bst_dist.model.ssm.scan import power, start_incoming_states
from bst_dist.parallel.past import Past


def initial_frequencies(init: str, modes: int) -> Tensor:
    """Im A of the n = N/2 modes, (n,) float64 (arXiv 2206.11893, equations 8 and 9; LegS by eigenvalues)."""
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

    With `own_dynamics` each output map is an SSM of its own (F = C); otherwise the maps are C read-outs of one state.
    """

    def __init__(self, width: int, maps: int, config: SSMConfig, own_dynamics: bool = False):
        super().__init__()
        modes = config.state // 2
        sets = maps if own_dynamics else 1
        log_range = math.log(config.dt_min), math.log(config.dt_max)
        self.chunk = config.chunk
        self.log_dt = nn.Parameter(torch.empty(sets, width).uniform_(*log_range))
        self.log_decay = nn.Parameter(torch.full((sets, width, modes), math.log(0.5)))
        frequencies = initial_frequencies(config.init, modes).float()
        self.frequency = nn.Parameter(frequencies.expand(sets, width, modes).clone())
        # Real pairs, because ZeRO drops the imaginary part of a complex parameter with no more than a warning.
        self.read_out = nn.Parameter(torch.randn(maps, width, modes, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(maps, width))

    def dynamics(self) -> list[nn.Parameter]:
        """The parameters that train at a rate of their own and without decay."""
        return [self.log_dt, self.log_decay, self.frequency]

    def log_transition(self) -> tuple[Tensor, Tensor]:
        """``log Ā`` (F, Ds, n) complex128, and B̄ (F, Ds, n) complex128."""
        a = torch.complex(-torch.exp(self.log_decay.double()), self.frequency.double())
        log_a = torch.exp(self.log_dt.double()).unsqueeze(-1) * a
        return log_a, torch.expm1(log_a) / a

    def kernel(self, length: int) -> Tensor:
        """The convolution kernel K without the skip term, (C, Ds, length): the reference the tests compare with."""
        log_a, b = self.log_transition()
        powers = torch.exp(log_a.unsqueeze(-1) * torch.arange(length, device=log_a.device))  # (F, Ds, n, length)
        weights = as_complex(self.read_out.double()) * b
        return 2 * torch.einsum("cdn,cdnl->cdl", weights, powers.expand(len(self.read_out), -1, -1, -1)).real

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, z: Tensor, past: Past, starts: Tensor | None = None) -> Tensor:
        """Outputs of every token, (B, L, Ds) -> (B, L, C, Ds); for maps that share their dynamics.

        `starts` (B, L / block) marks blocks that begin a document: the state before them is zero.
        """
        batch, length, width = z.shape
        u, chunk, m = self._chunks(z)
        log_a, b = self.log_transition()
        powers = _powers(log_a, chunk, u.dtype)  # (1, Ds, n, T + 1)
        ends = _to_states(_into_state(powers, b) @ u, batch, m, len(log_a))  # (B, m, 1, Ds, n)
        begins = None if starts is None else _chunk_starts(starts, m)
        incoming = start_incoming_states(ends, log_a * chunk, begins, past)
        y = self._within_chunk(powers, b) @ u  # (Ds, C T, B m): while the past is under way
        y = torch.baddbmm(y, self._out_of_state(powers), _from_states(incoming()))
        return y.view(width, -1, chunk, batch, m).permute(3, 4, 2, 1, 0).reshape(batch, length, -1, width)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def block_ends(self, z: Tensor, block: int, past: Past, starts: Tensor | None = None) -> Tensor:
        """Outputs of each block's last token only, (B, L, Ds) -> (B, nb, C, Ds), nb blocks ending in this slice.

        Outputs of other tokens are never computed: the tokens go into the state, and the state is read at the ends.
        A slice is whole blocks, or lies within one block (then nb is 1 if it ends the block, else 0).
        """
        batch, length, _ = z.shape
        u, chunk, m = self._chunks(z)
        span = min(block, length)
        log_a, b = self.log_transition()
        ends = _to_states(_into_state(_powers(log_a, chunk, u.dtype), b) @ u, batch, m, len(log_a))  # (B, m, F, Ds, n)
        ends = _join_chunks(ends, log_a * chunk, span // chunk)  # (B, nb, F, Ds, n)
        after = ends + power(log_a, span, ends.dtype) * start_incoming_states(ends, log_a * span, starts, past)()
        if (past.position + length) % block:
            return z.new_empty(batch, 0, *self.skip.shape, dtype=u.dtype)
        y = 2 * (as_complex(self.read_out) * after).real.sum(-1)  # (B, nb, C, Ds)
        return y + self.skip * z[:, span - 1 :: span].to(u.dtype).unsqueeze(2)

    def _chunks(self, z: Tensor) -> tuple[Tensor, int, int]:
        """(B, L, Ds) -> (Ds, T, B m), with T and m; the channels become the batch of a matmul over tokens."""
        batch, length, width = z.shape
        chunk = min(self.chunk, length)
        if length % chunk:
            raise ValueError(f"S4D: {length} tokens are neither a multiple of the chunk ({chunk}) nor shorter than it")
        m = length // chunk
        u = z.to(self.skip.dtype).view(batch, m, chunk, width).permute(3, 2, 0, 1)
        return u.reshape(width, chunk, batch * m), chunk, m

    def _within_chunk(self, powers: Tensor, b: Tensor) -> Tensor:
        """Tokens to outputs inside a chunk, the causal matrices of K and the skip: (Ds, C T, T)."""
        weights = as_complex(self.read_out) * b.to(powers.dtype)  # (C, Ds, n)
        kernel = 2 * (weights.unsqueeze(-2) @ powers[..., :-1]).real.squeeze(-2)  # (C, Ds, T)
        kernel = torch.cat((kernel[..., :1] + self.skip.unsqueeze(-1), kernel[..., 1:]), dim=-1)
        chunk = kernel.shape[-1]
        t = torch.arange(chunk, device=kernel.device)
        lag = chunk + t.unsqueeze(1) - t.unsqueeze(0)  # into the kernel with T zeros before it
        matrix = nn.functional.pad(kernel, (chunk, 0))[..., lag]  # (C, Ds, T, T)
        return matrix.transpose(0, 1).reshape(kernel.shape[1], -1, chunk)

    def _out_of_state(self, powers: Tensor) -> Tensor:
        """State before a chunk to its outputs, 2 Re(C Ā^(t+1) x): (Ds, C T, 2n) on real pairs."""
        out = 2 * as_complex(self.read_out).unsqueeze(-1) * powers[..., 1:]  # (C, Ds, n, T)
        out = torch.stack((out.real, -out.imag), dim=-1)  # (C, Ds, n, T, 2)
        maps, width, modes, chunk, _ = out.shape
        return out.permute(1, 0, 3, 2, 4).reshape(width, maps * chunk, 2 * modes)


def as_complex(pairs: Tensor) -> Tensor:
    """(..., 2) real -> (...) complex, by copy: ZeRO's flat buffers put parameters at odd offsets, where no view can."""
    return torch.complex(pairs[..., 0], pairs[..., 1])


def _into_state(powers: Tensor, b: Tensor) -> Tensor:
    """Tokens to the state at the chunk's end, B̄ Ā^(T-1-j): (Ds, 2 F n, T) on real pairs."""
    into = b.to(powers.dtype).unsqueeze(-1) * powers[..., :-1].flip(-1)  # (F, Ds, n, T)
    into = torch.view_as_real(into)
    sets, width, modes, chunk, _ = into.shape
    return into.permute(1, 0, 2, 4, 3).reshape(width, sets * modes * 2, chunk)


def _join_chunks(ends: Tensor, log_a: Tensor, count: int) -> Tensor:
    """End states of runs of `count` chunks from those of single ones: (B, m, *) -> (B, m / count, *)."""
    if count == 1:
        return ends
    remaining = torch.arange(count - 1, -1, -1, device=ends.device).view(count, *[1] * log_a.dim())
    return (ends.unflatten(1, (-1, count)) * power(log_a, remaining, ends.dtype)).sum(2)


def _powers(log_a: Tensor, chunk: int, real: torch.dtype) -> Tensor:
    """Ā^l for l = 0 ... T, (*, T + 1), by two short tables: l = 16 q + r. Exponentials would dominate the layer."""
    dtype = torch.complex64 if real == torch.float32 else torch.complex128
    log_a = log_a.unsqueeze(-1)
    low = power(log_a, torch.arange(16, device=log_a.device), dtype)
    high = power(log_a, torch.arange(0, chunk + 1, 16, device=log_a.device), dtype)
    return (high.unsqueeze(-1) * low.unsqueeze(-2)).flatten(-2)[..., : chunk + 1]


def _to_states(x: Tensor, batch: int, m: int, sets: int) -> Tensor:
    """(Ds, 2 F n, B m) real -> (B, m, F, Ds, n) complex."""
    return torch.view_as_complex(x.view(len(x), sets, -1, 2, batch, m).permute(4, 5, 1, 0, 2, 3).contiguous())


def _from_states(x: Tensor) -> Tensor:
    """(B, m, F, Ds, n) complex -> (Ds, 2 F n, B m) real."""
    batch, m, _, width, _ = x.shape
    return torch.view_as_real(x).permute(3, 2, 4, 5, 0, 1).reshape(width, -1, batch * m)


def _chunk_starts(starts: Tensor, chunks: int) -> Tensor:
    """Block starts (B, nb) as chunk starts (B, m): a block's first chunk begins the document."""
    batch, blocks = starts.shape
    spread = starts.new_zeros(batch, blocks, chunks // blocks)
    spread[:, :, 0] = starts
    return spread.view(batch, chunks)
