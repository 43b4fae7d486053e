"""A layer under sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509), for comparison.

Each rank computes attention for its share of the heads over all tokens, and the SSM for its share of the channels over
all tokens. The rest of the layer again works on the rank's own tokens. The weights are shared with the original layer,
so both forms must give the same numbers.
"""

from __future__ import annotations

from copy import copy

from torch import Tensor, nn
from torch.func import functional_call

from bst_dist.model.attention.documents import documents_of
from bst_dist.model.attention.rotary import angles, rotate
from bst_dist.model.attention.self_attention import SlidingAttention
from bst_dist.model.attention.sliding import sliding_attention
from bst_dist.model.l2_norm import unit
from bst_dist.model.layers import Layer
from bst_dist.model.ssm.s4d import S4D
from bst_dist.parallel.sequence.group import SequenceGroup
from bst_dist.parallel.sequence.past import Past
from bst_dist.parallel.sequence.transpose import to_channels, to_tokens


def all_to_all_form(layer: Layer, group: SequenceGroup) -> Layer:
    """Return `layer` with self-attention and SSM computed on whole sequences.

    sp must divide the number of heads and of channels.
    """
    form = _shallow(layer)
    form.mixer = _shallow(layer.mixer)
    form.mixer.attention = WholeSequenceAttention(layer.mixer.attention, group)
    if hasattr(form.mixer, "cross"):
        form.mixer.cross = _shallow(form.mixer.cross)
        form.mixer.cross.context = _shallow(form.mixer.cross.context)
        form.mixer.cross.context.ssm = WholeSequenceSSM(layer.mixer.cross.context.ssm, group)
    return form


class WholeSequenceAttention(nn.Module):
    """Sliding attention over the whole sequence, for this rank's share of the heads: (B, l, D) -> (B, l, D)."""

    def __init__(self, inner: SlidingAttention, group: SequenceGroup):
        super().__init__()
        self.inner, self.group = inner, group

    def forward(self, u: Tensor, past: Past, starts: Tensor | None = None) -> Tensor:
        inner, group = self.inner, self.group
        qkv = inner.qkv(u).unflatten(-1, (3, inner.heads, -1))  # (B, l, 3, H, dh)
        q, k, v = to_channels(qkv, 3, group, "qkv").unbind(2)  # (B, L, H / sp, dh) each
        share = slice(group.rank * q.shape[2], (group.rank + 1) * q.shape[2])
        q, k = unit(q, inner.scale[share]), unit(k)
        if inner.config.position == "rope":
            by = angles(inner.config.rope_base, inner.half, 0, q.shape[1], q)
            q, k = rotate(q, by), rotate(k, by)
        documents = None if starts is None else documents_of(starts, q.shape[1], k.shape[1], inner.window.size)
        bias = None if inner.bias is None else inner.by_distance(inner.distances, past)[share]
        out = sliding_attention(q, k, v, inner.window._replace(varying=None), bias, documents)
        return to_tokens(out, 2, group, "attention").flatten(-2)


class WholeSequenceSSM(nn.Module):
    """S4D over the whole sequence, for this rank's share of the channels."""

    def __init__(self, inner: S4D, group: SequenceGroup):
        super().__init__()
        self.inner, self.group = inner, group

    def forward(self, z: Tensor, past: Past, starts: Tensor | None = None) -> Tensor:
        y = self._on_share("forward", z, Past(), starts)  # (B, L, C, Ds / sp)
        return to_tokens(y, 3, self.group, "ssm output")

    def block_ends(self, z: Tensor, block: int, past: Past, starts: Tensor | None = None) -> Tensor:
        y = self._on_share("block_ends", z, block, Past(), starts)  # (B, L / W, S, Ds / sp)
        return to_tokens(y, 3, self.group, "ssm output")

    def _on_share(self, method: str, z: Tensor, *args: object) -> Tensor:
        group = self.group
        z = to_channels(z, 2, group, "ssm input")
        share = {name: p.chunk(group.size, dim=1)[group.rank] for name, p in self.inner.named_parameters()}
        called = _Method(self.inner, method)
        return functional_call(called, {f"inner.{name}": p for name, p in share.items()}, (z, *args))


class _Method(nn.Module):
    """A module whose forward is the given method of `inner`; `functional_call` needs a module."""

    def __init__(self, inner: nn.Module, method: str):
        super().__init__()
        self.inner, self.method = inner, method

    def forward(self, *args: object) -> Tensor:
        return getattr(self.inner, self.method)(*args)


def _shallow(module: nn.Module) -> nn.Module:
    """Return a copy whose submodules can be replaced without changing the original; parameters are shared."""
    twin = copy(module)
    twin._modules = dict(module._modules)
    return twin
