"""Full-length causal convolution by FFT: the reference for the chunked kernels, and used by the unstructured ones.

An FFT mixes all positions and cancels the future only up to rounding: outputs depend on later tokens by about 1e-7 of
their size in single precision. Outputs of the chunked kernels do not depend on later tokens.

Shapes: B rows, p + l tokens of which outputs of the last l are wanted, Ds channels, C output maps, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_convolution(u: Tensor, kernel: Tensor, outputs: int | None = None) -> Tensor:
    """Return ``y_t = sum_{j <= t} kernel[t - j] u_j``: (B, p + l, Ds), (C, Ds, K) -> (B, l, C, Ds).

    It is in single precision at least.

    Args:
        outputs: number of last positions to compute (l); None: all.
    """
    length, taps = u.shape[1], kernel.shape[-1]
    outputs = length if outputs is None else outputs
    wide = torch.promote_types(u.dtype, torch.float32)
    if outputs == 1:  # a token at a time: one sum, where an FFT would compute all other outputs too
        seen = min(length, taps)
        latest_first = u[:, length - seen :].to(wide).flip(1)
        return torch.einsum("btd,cdt->bcd", latest_first, kernel[..., :seen].to(wide)).unsqueeze(1)
    size = padded_size(length, outputs, taps)
    spectrum = torch.fft.rfft(u.to(wide).transpose(1, 2), n=size).unsqueeze(1)  # (B, 1, Ds, f)
    response = torch.fft.rfft(kernel.to(wide), n=size)  # (C, Ds, f)
    y = torch.fft.irfft(spectrum * response, n=size)[..., length - outputs : length]  # (B, C, Ds, l)
    return y.permute(0, 3, 1, 2)


def causal_matrix(kernel: Tensor) -> Tensor:
    """Return the causal convolution over T tokens as a matrix, K[t - j] at (t, j): (C, Ds, T) -> (C, Ds, T, T).

    It only reshapes: rows of 2 T numbers, read as rows of 2 T - 1, each shift by one more place. Indexing would work
    too, but its gradient on a GPU is a sum by atomics, in no fixed order.
    """
    length = kernel.shape[-1]
    rows = torch.nn.functional.pad(kernel, (0, length)).unsqueeze(-2).expand(*kernel.shape[:-1], length, 2 * length)
    moved = rows.flatten(-2)[..., : length * (2 * length - 1)].unflatten(-1, (length, 2 * length - 1))
    return moved[..., :length].mT


def padded_size(length: int, outputs: int, taps: int) -> int:
    """Return the FFT size for the last `outputs` of `length` tokens: 2^a or 3 · 2^a, which are fast in every library.

    The circular convolution wraps around into the first positions, so positions that are not needed serve as padding.
    """
    least = outputs + max(length - outputs, taps - 1)
    power = 1 << (least - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= least else power
