"""FFT convolution compared with its definition as a sum."""

from __future__ import annotations

import pytest
import torch

from bst_dist.model.ssm.convolution import causal_convolution, causal_matrix


def direct(u, kernel):
    """y_t = sum_{j <= t} kernel[t - j] u_j, term by term."""
    batch, length, width = u.shape
    y = u.new_zeros(batch, length, len(kernel), width)
    for t in range(length):
        for j in range(max(0, t - kernel.shape[-1] + 1), t + 1):
            y[:, t] += kernel[..., t - j] * u[:, None, j]
    return y


@pytest.mark.parametrize("taps", [1, 5, 24, 40])
@pytest.mark.parametrize("outputs", [None, 1, 7, 24])
def test_convolution_equals_the_direct_sum(taps, outputs):
    u, kernel = torch.randn(2, 24, 3, dtype=torch.float64), torch.randn(4, 3, taps, dtype=torch.float64)
    expected = direct(u, kernel)[:, -(outputs or 24) :]
    torch.testing.assert_close(causal_convolution(u, kernel, outputs), expected, rtol=0, atol=1e-12)


def test_convolution_uses_at_least_single_precision():
    u, kernel = torch.randn(1, 64, 2).bfloat16(), torch.randn(1, 2, 64).bfloat16()
    y = causal_convolution(u, kernel)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), direct(u.double(), kernel.double()), rtol=0, atol=1e-4)


def test_convolution_gradients_pass_gradcheck():
    u = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, 2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, k: causal_convolution(u, k, outputs=3), (u, kernel))


def test_matrix_form_equals_the_direct_sum():
    u, kernel = torch.randn(1, 9, 2, dtype=torch.float64), torch.randn(3, 2, 9, dtype=torch.float64)
    y = torch.einsum("bjd,cdtj->btcd", u, causal_matrix(kernel))
    torch.testing.assert_close(y, direct(u, kernel), rtol=0, atol=1e-13)
