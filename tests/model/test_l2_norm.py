"""Vectors of length one and their gradients against double precision."""

import torch

from bst_dist.model.l2_norm import unit


def normalised(x, scale):
    return x / x.norm(dim=-1, keepdim=True) * scale.unsqueeze(-1)


def test_unit_vectors_and_their_gradients_are_rounded_once_in_bfloat16():
    """Rounding the norm as well would give all numbers of a head the same error, and the scale's gradient 0.2 %."""
    torch.manual_seed(0)
    x, direction = (torch.randn(2, 64, 4, 32).bfloat16().requires_grad_() for _ in range(2))
    scale = (5 + torch.rand(4)).requires_grad_()
    out = unit(x, scale)
    found = out, *torch.autograd.grad(out, (x, scale), direction.detach())
    exact = normalised(*(inputs := [y.detach().double().requires_grad_() for y in (x, scale)]))
    wanted = exact, *torch.autograd.grad(exact, inputs, direction.detach().double())
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]
    assert errors[0] < 2e-3
    assert errors[1] < 2e-3
    assert errors[2] < 1e-6


def test_a_zero_vector_stays_zero_and_has_finite_gradients():
    x = torch.zeros(1, 1, 1, 4, requires_grad=True)
    out = unit(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad.isfinite().all()
