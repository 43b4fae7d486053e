"""Unstructured long convolutions: a filter of a fixed trained length, as free values or as the output of a network.

The filter is h[t] = values[t] · window[t], with a window exp(-α t/K) per channel; `explicit` has the K values as
parameters, `hyena` computes them by a small network with sines over an embedding of the position (Hyena, arXiv
2302.10866, section 3.3). It has no recurrent state. The consequences:

- It is a finite impulse response of K taps, the trained length: a token sees the last K inputs, including its own, and
  nothing before them. A stream is continued exactly by keeping K - 1 inputs.
- A document boundary cannot be made by multiplying a state by zero: isolated and masked documents are refused.
- When the slices on ranks are shorter than the filter, a slice needs more than its left neighbour has. All-to-alls then
  give each rank all tokens of some channels (`Past.within_reach`).

Shapes: B rows, l tokens, Ds channels, C output maps (each with a filter of its own), K taps, W block, nb blocks.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from bst_base.errors import UserError
from bst_dist.model.config import ExplicitConfig, FilterConfig, HyenaConfig
from bst_dist.model.roles import Linear, Role
from bst_dist.model.ssm.convolution import causal_convolution
from bst_dist.parallel.sequence.past import Past


class DocumentResetError(UserError):
    """Documents are isolated or masked, but the filter has no state to reset."""


class LongFilter(nn.Module):
    """Causal FIR filters, C for each of Ds channels: (B, l, Ds) -> (B, l, C, Ds). Subclasses give their `values`.

    `own_dynamics` has no effect: each map has its own filter, and all maps share the windows.
    """

    def __init__(self, width: int, maps: int, config: FilterConfig, own_dynamics: bool = False):
        super().__init__()
        self.length = config.length
        slow, fast = (math.log(100) / fraction for fraction in (config.slow_decay, config.fast_decay))
        self.log_decay = nn.Parameter(torch.linspace(slow, fast, width).log())
        self.skip = nn.Parameter(torch.randn(maps, width))
        self.roles = {"log_decay": Role.DYNAMICS}

    def values(self, taps: int, channels: slice) -> Tensor:
        """Return the first `taps` values of some channels' filters, without the window, (C, channels, taps).

        They have unit variance at initialisation.
        """
        raise NotImplementedError

    def kernel(self, length: int, channels: slice = slice(None)) -> Tensor:
        """Return the filters without the skip term, (C, channels, length); zero from the trained length on."""
        taps = min(length, self.length)
        window = _unit_window(self.log_decay[channels], self.length, taps)
        return nn.functional.pad(self.values(taps, channels) * window, (0, length - taps))

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, z: Tensor, past: Past, starts: Tensor | None = None) -> Tensor:
        """Return the outputs of every token, (B, l, Ds) -> (B, l, C, Ds). Raise DocumentResetError on `starts`."""
        _refuse(starts)
        here = past.within_reach("inputs", z, self.length - 1)
        u = here.past.extend("inputs", here.x, before=self.length - 1).to(self.skip.dtype)  # (B, p + l, Ds)
        taps = self.kernel(min(self.length, u.shape[1]), here.channels)
        y = here.back(causal_convolution(u, taps, outputs=here.x.shape[1]))
        return y + self.skip * z.to(u.dtype).unsqueeze(2)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def block_ends(self, z: Tensor, block: int, past: Past, starts: Tensor | None = None) -> Tensor:
        """Return the outputs of each block's last token, (B, l, Ds) -> (B, nb, C, Ds), for the nb blocks ending here.

        The output at a block's end is a sum over whole blocks of inputs. So it is one matmul for each block of lag and
        no convolution: y_i = sum_q Z_{i-q} H_q, with H_q the taps q W ... (q+1) W - 1 in the order of the inputs.
        Raise DocumentResetError if `starts` is given.
        """
        _refuse(starts)
        here = past.within_reach("inputs", z, self.length - 1)
        u = here.past.extend("inputs", here.x, before=self.length - 1).to(self.skip.dtype)  # (B, p + l, Ds)
        if not past.blocks_ended(block, z.shape[1]):
            return z.new_empty(len(z), 0, *self.skip.shape, dtype=u.dtype)
        wanted = -(-here.x.shape[1] // block)
        inputs = _into_blocks(u, block)  # (Ds, blocks, B, W)
        lags = min(-(-self.length // block), inputs.shape[1])
        taps = _into_lags(self.kernel(lags * block, here.channels), block)  # (lags, Ds, W, C)
        first = inputs.shape[1] - wanted
        y = 0
        for lag, weights in enumerate(taps.unbind(0)):
            seen = inputs[:, max(0, first - lag) : inputs.shape[1] - lag]  # (Ds, blocks, B, W)
            part = (seen.flatten(1, 2) @ weights).unflatten(1, seen.shape[1:3])  # (Ds, blocks, B, C)
            y = y + nn.functional.pad(part, (0, 0, 0, 0, wanted - seen.shape[1], 0))
        ends = z[:, min(block, z.shape[1]) - 1 :: block]  # (B, nb, Ds)
        return here.back(y.permute(2, 1, 3, 0)) + self.skip * ends.to(u.dtype).unsqueeze(2)


class ExplicitFilter(LongFilter):
    """A filter whose values are free parameters: C Ds K of them."""

    def __init__(self, width: int, maps: int, config: ExplicitConfig, own_dynamics: bool = False):
        super().__init__(width, maps, config)
        self.value = nn.Parameter(torch.randn(maps, width, config.length))

    def values(self, taps: int, channels: slice) -> Tensor:
        return self.value[:, channels, :taps]


class HyenaFilter(LongFilter):
    """A filter whose values a network computes from the position. Its size does not depend on the trained length."""

    single_precision = True
    """For `roles.single_precision`: sines of high frequency multiply rounding errors. With initial values and 1,024
    taps, parameters in bf16 change the filter by 56 %, in fp16 by 8 %."""

    def __init__(self, width: int, maps: int, config: HyenaConfig, own_dynamics: bool = False):
        super().__init__(width, maps, config)
        self.bands = config.bands
        sizes = [1 + 2 * config.bands, *[config.hidden] * config.hidden_layers]
        self.layers = nn.ModuleList(_DoubleLinear(a, b, Role.FILTER, bias=True) for a, b in pairwise(sizes))
        self.frequency = nn.Parameter(torch.full((config.hidden,), config.sine))
        self.last = nn.Parameter(torch.randn(maps, width, config.hidden) / math.sqrt(config.hidden))
        self.roles |= {"last": Role.FILTER}

    def values(self, taps: int, channels: slice) -> Tensor:
        x = self._embedding(taps)
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        return math.sqrt(2) * self.last[:, channels] @ x.to(self.last.dtype).T  # a sine's mean square is 1/2

    def _embedding(self, taps: int) -> Tensor:
        """Return the position in [0, 1) with its cosines and sines at the bands' frequencies.

        (taps, 1 + 2 bands), in double precision.
        """
        t = torch.arange(taps, device=self.skip.device, dtype=torch.float64).unsqueeze(1) / self.length
        angle = 2 * math.pi * t * torch.arange(1, self.bands + 1, device=t.device)
        return torch.cat((t, angle.cos(), angle.sin()), dim=1)


class _DoubleLinear(Linear):
    """A linear map in double precision, of float64 inputs.

    Sines of high frequency multiply errors. On a GPU, products in single precision may be in TF32, whose ten bits also
    do not tell the positions of more than 2,048 taps apart: gradients were off by 8 %.
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.double(), self.bias.double())


def _unit_window(log_decay: Tensor, length: int, taps: int) -> Tensor:
    """Return exp(-α t / K) scaled to unit energy over the K taps, (Ds, taps): a filter's gain is about 1 at any K."""
    rate = torch.exp(log_decay.double()) / length
    energy = torch.expm1(-2 * rate * length) / torch.expm1(-2 * rate)  # the geometric sum of the window's squares
    t = torch.arange(taps, device=rate.device)
    window = torch.exp(-rate.unsqueeze(1) * t) * torch.rsqrt(energy).unsqueeze(1)
    return window.to(log_decay.dtype)


def _into_blocks(u: Tensor, block: int) -> Tensor:
    """Cut into whole blocks from the end, with zeros before the first token: (B, n, Ds) -> (Ds, blocks, B, W)."""
    u = nn.functional.pad(u, (0, 0, -u.shape[1] % block, 0))
    return u.unflatten(1, (-1, block)).permute(3, 1, 0, 2)


def _into_lags(kernel: Tensor, block: int) -> Tensor:
    """Cut taps into blocks of lag, each in the order of the inputs they meet: (C, Ds, lags W) -> (lags, Ds, W, C)."""
    return kernel.unflatten(-1, (-1, block)).flip(-1).permute(2, 1, 3, 0)


def _refuse(starts: Tensor | None) -> None:
    if starts is not None:
        raise DocumentResetError(
            "ssm.kernel explicit and hyena keep their last inputs, not a state that could be reset between documents: "
            "set data.documents to joined, or ssm.kernel to s4d or s4-dplr"
        )
