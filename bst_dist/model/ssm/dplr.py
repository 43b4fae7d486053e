"""S4: a state space model with a diagonal-plus-low-rank matrix (Gu, Goel, Ré 2022, arXiv 2111.00396).

Per channel, with n = N/2 complex modes that stand for themselves and their conjugates, A = diag(λ) - p p* and the
bilinear discretisation (equation 3): ``x_t = Ā x_{t-1} + B̄ z_t``, ``y_t = 2 Re(c x_t) + d z_t``. It starts as
HiPPO-LegS. λ has a negative real part and p p* is subtracted with one vector on both sides, so A stays stable.

The kernel of a chunk of T tokens comes from its generating function at the roots of unity, by a Cauchy matrix and
Woodbury's identity (section 3.2, appendix C). Between chunks the state passes, multiplied by a dense real N x N matrix:
HiPPO-LegS is too far from normal to be diagonalised safely. So the transition of a slice is not elementwise, and the
state passes from slice to slice as a serial state. This kernel is mainly a reference for the diagonal one and a
baseline. All small tensors are in double precision.

Shapes: B rows, L tokens, m = L/T chunks, Ds channels, C output maps, F sets of dynamics (1 or C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bst_dist.model.config import DPLRConfig
from bst_dist.model.document_mask import Borders, Starts, columns
from bst_dist.model.roles import Role
from bst_dist.model.ssm.convolution import causal_matrix
from bst_dist.parallel.sequence.past import Past


def hippo_legs(state: int) -> tuple[Tensor, Tensor]:
    """Return HiPPO-LegS, A (N, N) and B (N,) float64 (arXiv 2111.00396, equation 2)."""
    root = torch.sqrt(2 * torch.arange(state, dtype=torch.float64) + 1)
    a = -torch.tril(torch.outer(root, root), -1) - torch.diag(torch.arange(1.0, state + 1, dtype=torch.float64))
    return a, root


def hippo_modes(state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return HiPPO-LegS as λ, p, b in its normal part's basis, (n,) complex128, without conjugates (appendix C.1)."""
    a, b = hippo_legs(state)
    p = torch.sqrt(torch.arange(state, dtype=torch.float64) + 0.5)
    skew = a + torch.outer(p, p) + 0.5 * torch.eye(state, dtype=torch.float64)
    frequency, basis = torch.linalg.eigh(-1j * skew)  # ascending, in pairs ±ω
    frequency, basis = frequency[state // 2 :], basis[:, state // 2 :]
    return torch.complex(torch.full_like(frequency, -0.5), frequency), basis.mH @ (p + 0j), basis.mH @ (b + 0j)


class S4DPLR(nn.Module):
    """DPLR SSM from Ds channels to C output maps each: (B, L, Ds) -> (B, L, C, Ds).

    With `own_dynamics` each output map has its own SSM (F = C); otherwise the maps are C read-outs of one state.
    """

    def __init__(self, width: int, maps: int, config: DPLRConfig, own_dynamics: bool = False):
        super().__init__()
        sets, modes = maps if own_dynamics else 1, config.state // 2
        diagonal, low_rank, into = (x.to(torch.complex64).expand(sets, width, modes) for x in hippo_modes(config.state))
        self.chunk, self.own_dynamics = config.chunk, own_dynamics
        self.log_dt = nn.Parameter(torch.empty(sets, width).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        self.log_decay = nn.Parameter(torch.log(-diagonal.real))
        self.frequency = nn.Parameter(diagonal.imag.clone())
        # Complex parameters are pairs of real numbers, because ZeRO drops the imaginary part with only a warning.
        self.low_rank = nn.Parameter(torch.view_as_real(low_rank).clone())
        self.into = nn.Parameter(torch.view_as_real(into).clone())
        self.read_out = nn.Parameter(torch.randn(maps, width, modes, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(maps, width))
        self.roles = dict.fromkeys(("log_dt", "log_decay", "frequency", "low_rank", "into"), Role.DYNAMICS)

    def recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ā (F, Ds, N, N), B̄ (F, Ds, N) and the read-out (C, Ds, N) on real and imaginary parts, float64."""
        real, imag = (torch.diag_embed(x) for x in (-torch.exp(self.log_decay.double()), self.frequency.double()))
        diagonal = torch.cat((torch.cat((real, -imag), -1), torch.cat((imag, real), -1)), -2)
        low_rank, into, read_out = (_parts(x) for x in (self.low_rank, self.into, self.read_out))
        a = diagonal - 2 * low_rank.unsqueeze(-1) * low_rank.unsqueeze(-2)  # p* x + its conjugate: 2 Re(p* x)
        sign = torch.ones_like(read_out[0, 0])
        sign[len(sign) // 2 :] = -1
        dt = torch.exp(self.log_dt.double())[..., None, None]
        one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        right = torch.cat((one + dt / 2 * a, dt * into.unsqueeze(-1)), -1)
        both = torch.linalg.solve_ex(one - dt / 2 * a, right).result  # A is stable, so it is never singular: no check
        return both[..., :-1], both[..., -1], 2 * sign * read_out

    def kernel(self, length: int) -> Tensor:
        """Return the convolution kernel K without the skip term, (C, Ds, length) float64."""
        a, _, read_out = self.recurrence()
        return self._cauchy_kernel(torch.linalg.matrix_power(a, length), read_out, length)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, z: Tensor, past: Past, starts: Starts | None = None) -> Tensor:
        """Return the outputs of every token, (B, L, Ds) -> (B, L, C, Ds); only for maps that share their dynamics.

        `starts`: where documents begin; the state before them is zero.
        """
        u = self._chunks(z)
        chunk = u.shape[2]
        a, b, read_out = self.recurrence()
        over_chunk = torch.linalg.matrix_power(a, chunk)
        kernel = self._cauchy_kernel(over_chunk, read_out, chunk).to(u.dtype)
        kernel = torch.cat((kernel[..., :1] + self.skip.unsqueeze(-1), kernel[..., 1:]), dim=-1)
        out_of_state = _krylov(a.mT, (read_out.unsqueeze(-2) @ a).squeeze(-2), chunk)  # read_out Ā^(t+1): (C, Ds, N, T)
        begins, last = _of_chunks(starts, u)
        incoming, _ = self._states(last, a, b, over_chunk, begins, past, inside=isinstance(starts, Borders))
        of_state = torch.einsum("bmdn,cdnt->bmtcd", incoming.squeeze(2), out_of_state.to(u.dtype))
        if not isinstance(starts, Borders):
            return (torch.einsum("bmjd,cdtj->bmtcd", u, causal_matrix(kernel)) + of_state).flatten(1, 2)
        by_document = columns(starts, chunk, past)
        own = torch.einsum("njd,cdtj->ntcd", by_document.spread(u.flatten(0, 1)), causal_matrix(kernel))
        own = by_document.collected(own).view_as(of_state)
        seen = ~starts.cut_off(chunk).view(*u.shape[:3], 1, 1)  # tokens before their chunk's first border
        return (own + of_state * seen).flatten(1, 2)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def block_ends(self, z: Tensor, block: int, past: Past, starts: Starts | None = None) -> Tensor:
        """Return the outputs of each block's last token, (B, L, Ds) -> (B, nb, C, Ds), for nb blocks that end here."""
        u = self._chunks(z)
        a, b, read_out = self.recurrence()
        over_chunk = torch.linalg.matrix_power(a, u.shape[2])
        begins, last_document = _of_chunks(starts, u)
        incoming, ends = self._states(last_document, a, b, over_chunk, begins, past)
        if not past.blocks_ended(block, z.shape[1]):
            return z.new_empty(len(z), 0, *self.skip.shape, dtype=u.dtype)
        span = min(block, z.shape[1])
        last = slice(span // u.shape[2] - 1, None, span // u.shape[2])
        after = ends[:, last] + torch.einsum("fdij,bmfdj->bmfdi", over_chunk.to(u.dtype), incoming[:, last])
        return (after * read_out.to(u.dtype)).sum(-1) + self.skip * z[:, span - 1 :: span].to(u.dtype).unsqueeze(2)

    def _chunks(self, z: Tensor) -> Tensor:
        """(B, L, Ds) -> (B, m, T, Ds)."""
        return z.to(self.skip.dtype).unflatten(1, (-1, math.gcd(self.chunk, z.shape[1])))

    def prepare(self, like: Tensor, past: Past, starts: Starts | None) -> None:
        """See `Prepares.prepare`."""
        if not self.own_dynamics and isinstance(starts, Borders):
            columns(starts, math.gcd(self.chunk, like.shape[1]), past)

    def _states(
        self,
        u: Tensor,
        a: Tensor,
        b: Tensor,
        over_chunk: Tensor,
        starts: Tensor | None,
        past: Past,
        inside: bool = False,
    ) -> tuple:
        """Return the state before each chunk, and the state that each chunk alone leaves: (B, m, F, Ds, N) each.

        `starts` (B, m or fewer): which runs of chunks begin a document. `inside`: see `scan.start_incoming_states`.
        """
        into_state = _krylov(a, b, u.shape[2]).flip(-1)  # Ā^(T-1-j) B̄: (F, Ds, N, T)
        ends = torch.einsum("bmjd,fdnj->bmfdn", u, into_state.to(u.dtype))
        before = past.serial_state("ssm")
        first = torch.zeros_like(ends[:, 0]) if before is None else before.to(ends.dtype)
        documents = None
        if starts is not None:
            documents = starts.cumsum(1).repeat_interleave(u.shape[1] // starts.shape[1], dim=1)  # (B, m)
            documents = nn.functional.pad(documents, (1, 0))  # the state before the slice is document 0's
        after = _dense_scan(torch.cat((first.unsqueeze(1), ends), dim=1), over_chunk, documents)
        past.leave_serial_state("ssm", after[:, -1])
        return after[:, :-1] if inside else _where_connected(after[:, :-1], documents, 1), ends

    def _cauchy_kernel(self, over_length: Tensor, read_out: Tensor, length: int) -> Tensor:
        """Return K[0 ... length), (C, Ds, length), from its generating function, truncated by C (1 - Ā^length).

        At a root of unity z, C (1 - Ā z)^-1 B̄ = 2 [k_cb - k_cp (1+z) / (1 + (1+z) k_pp) k_pb], where k_xy is the sum
        over modes of x y / ((1-z) 2/Δ - (1+z) λ): S4's formula with 1 + z multiplied through, finite at z = -1.
        """
        truncated = read_out - (read_out.unsqueeze(-2) @ over_length).squeeze(-2)
        real, imag = truncated.chunk(2, dim=-1)
        c = _with_conjugates(torch.complex(real, -imag) / 2)  # (C, Ds, N)
        p, b = (_with_conjugates(torch.view_as_complex(x.double())) for x in (self.low_rank, self.into))  # (F, Ds, N)
        diagonal = torch.complex(-torch.exp(self.log_decay.double()), self.frequency.double())
        turn = -2 * math.pi / length * torch.arange(length // 2 + 1, device=c.device, dtype=torch.float64)
        z = torch.polar(torch.ones_like(turn), turn)
        step = 2 / torch.exp(self.log_dt.double())[..., None, None]
        cauchy = 1 / (step * (1 - z) - (1 + z) * _with_conjugates(diagonal).unsqueeze(-1))  # (F, Ds, N, T/2 + 1)

        def k(x: Tensor, y: Tensor) -> Tensor:
            return ((x * y).unsqueeze(-2) @ cauchy).squeeze(-2)

        woodbury = (1 + z) / (1 + (1 + z) * k(p.conj(), p))
        return torch.fft.irfft(2 * (k(c, b) - k(c, p) * woodbury * k(p.conj(), b)), n=length)


def _of_chunks(starts: Starts | None, u: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return which chunks (B, m) or blocks begin a document, and the tokens (B, m, T, Ds), with zeros for all but each
    chunk's last document."""
    if not isinstance(starts, Borders):
        return starts, u
    last = starts.last(u.shape[2]).view(*u.shape[:3], 1)
    return starts.within(u.shape[2]), u.masked_fill(~last, 0)


def _parts(pair: Tensor) -> Tensor:
    """Return the real parts, then the imaginary parts: (*, n, 2) -> (*, 2n) float64."""
    return pair.double().mT.flatten(-2)


def _with_conjugates(x: Tensor) -> Tensor:
    """Append the conjugates: (*, n) -> (*, 2n)."""
    return torch.cat((x, x.conj()), dim=-1)


def _krylov(a: Tensor, v: Tensor, count: int) -> Tensor:
    """Return v, a v, ..., a^(count-1) v, computed by doubling: (*, N, N), (*, N) -> (*, N, count)."""
    columns = v.unsqueeze(-1)
    step = a
    while columns.shape[-1] < count:
        columns = torch.cat((columns, step @ columns), dim=-1)
        step = step @ step
    return columns[..., :count]


def _dense_scan(x: Tensor, a: Tensor, documents: Tensor | None) -> Tensor:
    """Compute s_i = a s_{i-1} + x_i by doubling, connected only within a document: (B, m, F, Ds, N) -> the same."""
    step, count = 1, x.shape[1]
    while step < count:
        reach = torch.einsum("fdij,bmfdj->bmfdi", a.to(x.dtype), x[:, :-step])
        x = torch.cat((x[:, :step], x[:, step:] + _where_connected(reach, documents, step)), dim=1)
        step, a = 2 * step, a @ a
    return x


def _where_connected(x: Tensor, documents: Tensor | None, step: int) -> Tensor:
    """Return `x` (B, m - step, ...), zero where a document begins between an entry and the one `step` after it."""
    if documents is None:
        return x
    same = documents[:, step:] == documents[:, :-step]
    return x * same.view(*same.shape, *[1] * (x.dim() - 2))
