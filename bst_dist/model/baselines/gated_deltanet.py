"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, section 3): a state updated by the delta rule.

    S_t = a_t (S_{t-1} - b_t k_t (k_t' S_{t-1})) + b_t k_t v_t',   y_t = S_t' q_t

A head's state S (K x V) is a memory from keys to values. The state decays by a_t; then a token replaces the fraction
b_t of the value held for its key by its own value. q, k, v go through a short convolution and SiLU, q and k are
L2-normalised, and the output is normalised and gated. Inside a chunk of T tokens the corrections are one triangular
system (the WY form); between chunks the state passes. Time is linear in the length, and causality is exact. The
transition of a slice is a matrix, more than the scan over ranks can send, so parallel.sp must be 1.

Shapes: B rows, l tokens, H heads, T tokens of a chunk, K and V the widths of a head's keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.config import LayerConfig, within_block
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.roles import Linear
from bst_dist.model.ssm.selective import CausalConvolution, Decays, Reach
from bst_dist.parallel.sequence.past import Past


class DeltaRule(Decays):
    """The gated delta rule with H heads."""

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, past: Past, starts: Starts | None) -> Tensor:
        """Map (B, l, H, K) queries and keys of unit length, and (B, l, H, V) values, to outputs (B, l, H, V).

        `gates` (B, l, 2, H): decay and strength before their activations. `starts`: where documents begin; the state
        before them is zero.
        """
        q, k, v, gates = (one.to(self.step.dtype) for one in (q, k, v, gates))
        chunk = self.chunk if q.shape[1] % self.chunk == 0 else q.shape[1]  # a slice within a block is one chunk
        log_a = -self.log_decay.exp() * F.softplus(gates[:, :, 0] + self.step)  # (B, l, H)
        q, k, v, log_a, b = (
            one.unflatten(1, (-1, chunk)).transpose(2, 3) for one in (q, k, v, log_a, gates[:, :, 1].sigmoid())
        )  # (B, m, H, T, *)
        decays = Reach.of(log_a, starts)
        b, kept = b.unsqueeze(-1), decays.from_begin.unsqueeze(-1)
        system = torch.eye(chunk, dtype=q.dtype, device=q.device) + (b * (k @ k.mT) * decays.inside).tril(-1)
        known = torch.cat((b * v, b * k * kept), dim=-1)
        fresh, of_state = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True).split(
            (v.shape[-1], k.shape[-1]), dim=-1
        )
        into = k * decays.to_end.unsqueeze(-1)
        parts = (fresh, of_state, into, q * kept, (q @ k.mT) * decays.inside, kept[..., -1:, :])
        return self._through(parts, past, None if isinstance(starts, Borders) else starts).transpose(2, 3).flatten(1, 2)

    def _through(self, parts: tuple[Tensor, ...], past: Past, starts: Tensor | None) -> Tensor:
        """Pass the state from chunk to chunk and return the outputs, (B, m, H, T, V)."""
        state = past.serial_state("state")
        chunks = parts[0].shape[1]
        outputs = []
        # Chunks are unbound at once: indexing them one by one would make the backward pass quadratic in the chunks.
        for index, (fresh, of_state, into, query, scores, kept) in enumerate(
            zip(*(part.unbind(1) for part in parts), strict=True)
        ):
            if state is None:
                state = into.new_zeros(*into.shape[:2], into.shape[-1], fresh.shape[-1])
            if starts is not None and index % (chunks // starts.shape[1]) == 0:
                begins = starts[:, index // (chunks // starts.shape[1])]
                state = state.masked_fill(begins[:, None, None, None], 0)
            written = fresh - of_state @ state
            outputs.append(query @ state + scores @ written)
            state = kept * state + into.mT @ written
        past.leave_serial_state("state", state)
        return torch.stack(outputs, 1)


class GatedDeltaNetMixer(nn.Module):
    """Gated DeltaNet mixer: (B, l, D) -> (B, l, D); H is the model's number of heads, K = dh, V = expand K."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        settings = within_block(config.gated_deltanet, config.block)
        width = config.width
        if config.block < settings.convolution - 1:
            raise ValueError(f"gated_deltanet.convolution {settings.convolution} reaches further back than a block")
        self.heads, self.keys, values = config.heads, config.inner, settings.expand * config.inner
        parts = config.inner, config.inner, values
        self.into = Linear(width, sum(parts), parts=parts)
        self.convolution = CausalConvolution(2 * config.inner + values, settings.convolution)
        self.gates = Linear(width, 2 * config.heads, parts=(config.heads, config.heads))
        self.gate = Linear(width, values)
        self.rule = DeltaRule(config.heads, settings.chunk, settings.dt_min, settings.dt_max)
        self.norm = nn.RMSNorm(values // config.heads, eps=1e-6)
        self.out = Linear(values, width, into_stream=True)

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        mixed = F.silu(self.convolution(self.into(u), past.child("convolution"), starts))
        sizes = self.keys, self.keys, mixed.shape[-1] - 2 * self.keys
        q, k, v = (one.unflatten(-1, (self.heads, -1)) for one in mixed.to(self.rule.step.dtype).split(sizes, dim=-1))
        q, k = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)
        gates = self.gates(u).unflatten(-1, (2, self.heads))
        y = self.rule(q, k, v, gates, past.child("delta"), starts)
        y = self.norm(y.to(u.dtype)).flatten(-2) * F.silu(self.gate(u))
        return self.out(y.to(u.dtype))
