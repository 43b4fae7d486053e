"""The approximate orthogonal factor of a matrix, by Newton–Schulz iterations."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of x -> a x + b x^3 + c x^5, chosen by Keller Jordan (https://kellerjordan.github.io/posts/muon/) so that
small singular values grow fastest. They do not converge to 1, but end between about 0.7 and 1.2."""
STEPS = 5
EPS = 1e-7


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return U S' V^T for U S V^T, with all singular values S' near 1: (rows, columns) -> the same; zero stays zero.

    Products are in the matrix's dtype. bf16 is enough, because its rounding is small compared with the spread of S'.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=EPS)  # so that no singular value is above 1
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


def flops(rows: int, columns: int) -> float:
    """Return the FLOPs of `orthogonalised`: per step, two products with the matrix, one of its Gram matrix squared."""
    short, long = sorted((rows, columns))
    return STEPS * (4 * short**2 * long + 2 * short**3)
