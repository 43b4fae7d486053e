"""Measurements inside a model: the time scales of its SSMs, and how much its layers use their context states.

This module depends on the model only, so training can use it too (`bst_dist.report.probes`).

Shapes: B rows, l tokens, H heads, dh head width, nb blocks of n context states, W block.
"""

from __future__ import annotations

from functools import singledispatch
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from bst_dist.model.baselines.block_recurrent import BlockRecurrentMixer
from bst_dist.model.baselines.gated_deltanet import DeltaRule
from bst_dist.model.context import CrossAttention
from bst_dist.model.document_mask import Borders
from bst_dist.model.l2_norm import unit
from bst_dist.model.layers import BSTMixer, NoCrossMixer
from bst_dist.model.lm import LanguageModel
from bst_dist.model.roles import Role, roles_of
from bst_dist.model.ssm.dplr import S4DPLR
from bst_dist.model.ssm.s4d import S4D
from bst_dist.model.ssm.selective import Selective
from bst_dist.model.ssm.unstructured import LongFilter

BLOCKS_LOOKED_AT = 4
"""The entropy is measured on this many last blocks of one row, so scores are never stored for more."""


def kernel_of(mixer: nn.Module) -> nn.Module | None:
    """Return the SSM of a layer: its first module with parameters of the role DYNAMICS, or None."""
    return next((module for module in mixer.modules() if Role.DYNAMICS in roles_of(module).values()), None)


def kernels(model: LanguageModel) -> dict[int, nn.Module]:
    """Return the SSMs of a model by layer index, without layers that have none."""
    found = {index: kernel_of(layer.mixer) for index, layer in enumerate(model.layers)}
    return {index: kernel for index, kernel in found.items() if kernel is not None}


@singledispatch
def time_scales(kernel: nn.Module) -> Tensor:
    """Return the tokens after which each mode of an SSM has decayed to 1/e, flat. Raise TypeError for other modules."""
    raise TypeError(f"no time scales are known of a {type(kernel).__name__}")


@time_scales.register
def _(kernel: S4D) -> Tensor:
    """1 / (dt |Re A|)."""
    log_a, _ = kernel.log_transition()  # a pair
    return (-1 / log_a.real).detach().flatten()


@time_scales.register
def _(kernel: S4DPLR) -> Tensor:
    """From the eigenvalues of the discrete recurrence, because the low-rank part mixes the modes."""
    transition, _, _ = kernel.recurrence()
    return (-1 / torch.linalg.eigvals(transition.detach()).abs().log()).flatten()


@time_scales.register(DeltaRule)
@time_scales.register(Selective)
def _(kernel: Selective | DeltaRule) -> Tensor:
    """1 / (dt A) of each head, at the default step: that of a token whose projection adds zero to it."""
    return (1 / (nn.functional.softplus(kernel.step) * kernel.log_decay.exp())).detach()


@time_scales.register
def _(kernel: LongFilter) -> Tensor:
    """K / α, for the windows exp(-α t / K) of the channels' filters."""
    return (kernel.length / kernel.log_decay.double().exp()).detach().flatten()


class ContextProbe:
    """Context manager that measures, in the first forward pass within it, how much each layer uses its context states.

    Afterwards `sums` has (4,) float64 for each layer with context states, to be summed over ranks: the sums of squares
    of the contributions of self-attention and of cross-attention to the mixer's output, the sum of the relative
    entropies of cross-attention (0: all weight on one state; 1: uniform), and the number of these entropies.
    """

    def __init__(self, model: LanguageModel):
        kinds = BSTMixer, BlockRecurrentMixer
        self._mixers = {
            index: layer.mixer
            for index, layer in enumerate(model.layers)
            if isinstance(layer.mixer, kinds) and not isinstance(layer.mixer, NoCrossMixer)
        }
        device = model.embedding.weight.device
        self.sums = {index: torch.zeros(4, dtype=torch.float64, device=device) for index in self._mixers}
        self._looked: set[tuple[int, str]] = set()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ContextProbe:
        for index, mixer in self._mixers.items():
            self._handles.append(mixer.out.register_forward_pre_hook(self._shares(index)))
            if isinstance(mixer, BSTMixer):
                self._handles += self._watch_attention(index, mixer.cross)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, where: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _first(self, index: int, what: str) -> bool:
        """Return whether `what` is measured for the first time in this layer, and mark it as measured."""
        new = (index, what) not in self._looked
        self._looked.add((index, what))
        return new

    def _shares(self, index: int):
        @torch.no_grad()
        def look(out: nn.Linear, args: tuple) -> None:
            if self._first(index, "share"):  # under ZeRO-3 the weight has been gathered by now
                halves = zip(args[0].chunk(2, dim=-1), out.weight.chunk(2, dim=1), strict=True)
                self.sums[index][:2] = torch.stack([F.linear(x, w).double().square().sum() for x, w in halves])

        return look

    def _watch_attention(self, index: int, cross: CrossAttention) -> list[RemovableHandle]:
        queries: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            queries[:] = [output[:1].detach()]

        @torch.no_grad()
        def look(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
            if self._first(index, "entropy"):
                q = unit(queries.pop().unflatten(-1, (cross.heads, -1)), cross.scale)
                borders = args[2] if isinstance(args[2], Borders) else None
                self.sums[index][2:] = relative_entropy(q, output[0][:1].detach(), cross.block, borders)
            queries.clear()

        return [cross.query.register_forward_hook(keep), cross.context.register_forward_hook(look)]


def relative_entropy(q: Tensor, k: Tensor, block: int, borders: Borders | None = None) -> Tensor:
    """Return the sum over tokens and heads of the relative entropies of attention to context, and their number.

    A relative entropy is divided by the entropy of uniform attention. The result is (2,) float64.

    Args:
        q: (1, l, H, dh), whole blocks, or a part of one.
        k: (1, l, H, dh), one state per token, seen causally within a block; or (1, nb, n, H, dh), all seen by their
            block. With `borders`, the latter has one more entry in front, the initial states.
        borders: where documents begin, in the first row; tokens only see states of their own document.

    Tokens that see only one state have no entropy and are not counted.
    """
    causal = k.dim() == 4
    span = min(block, q.shape[1])
    q = q[0].unflatten(0, (-1, span))[-BLOCKS_LOOKED_AT:].float()  # (nb, W, H, dh)
    states = k[0].unflatten(0, (-1, span)) if causal else k[0]
    scores = torch.einsum("bthd,bnhd->bhtn", q, states[-len(q) :].float())
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    seen = (seen.tril() if causal else seen).expand(len(q), 1, -1, -1)  # (nb, 1, W, n)
    if borders is not None:
        begun = borders.count(span)[0][-len(q) :]  # (nb, W): documents begun in the block, up to the token
        if causal:
            seen = seen & (begun[:, None, :, None] == begun[:, None, None, :])
        else:
            initial = torch.einsum("bthd,nhd->bhtn", q, states[0].float())
            scores = torch.where((begun > 0)[:, None, :, None], initial, scores)
    log_p = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~seen, 0)).sum(-1).double()  # (nb, H, W)
    counts = seen.sum(-1).expand_as(entropy)
    counted = counts > 1
    relative = entropy[counted] / counts[counted].double().log()
    return torch.stack((relative.sum(), relative.new_tensor(relative.numel())))
