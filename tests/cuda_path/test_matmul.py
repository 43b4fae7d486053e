"""Fused matrix products of a compiled layer, which replace one product per map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bst_dist.model.attention.rotary import Angles, angles, rotate
from bst_dist.model.matmul import contiguous_gradient, contiguous_operand, fused_linears, relu_of, whole
from bst_dist.model.roles import Linear


def compiled(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[object]]:
    """Return `function` compiled to one graph, and the list of functions that the graph calls."""
    called: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    return torch.compile(function, fullgraph=True, backend=backend), called


def gradients(call: Callable[[Tensor], Tensor], x: Tensor, *maps: Linear) -> list[Tensor]:
    """Return the output and the gradients of the input and the weights; each output element has its own weight."""
    out = call(x)
    factors = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()
    return [out, *torch.autograd.grad((out * factors).sum(), [x, *(one.weight for one in maps)])]


def test_maps_of_one_input_are_fused_into_one_product():
    torch.manual_seed(0)
    first, second = Linear(5, 6).double(), Linear(5, 3).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def parts(x: Tensor) -> Tensor:
        a, b, c = fused_linears(x, (first, [2, 4]), whole(second))
        return torch.cat((c.sin(), b, a.square()), dim=-1)

    def one_by_one(x: Tensor) -> Tensor:
        a, b = first(x).split([2, 4], dim=-1)
        return torch.cat((second(x).sin(), b, a.square()), dim=-1)

    call, called = compiled(parts)
    found = gradients(call, x, first, second)
    assert called.count(F.linear) == 1
    for other in (parts, one_by_one):
        torch.testing.assert_close(found, gradients(other, x, first, second), rtol=1e-13, atol=1e-13)


def test_an_operand_is_contiguous_only_when_compiled():
    """Values and gradients are those of its input."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    turned = x.permute(2, 0, 1)
    call, _ = compiled(contiguous_operand)
    found = call(turned)
    assert contiguous_operand(turned) is turned
    assert found.is_contiguous() and torch.equal(found, turned)
    factors = torch.arange(60, dtype=torch.float64).view(5, 3, 4)
    (gradient,) = torch.autograd.grad((found * factors).sum(), x)
    assert torch.equal(gradient, factors.permute(1, 2, 0))


def test_a_gradient_is_contiguous_only_when_compiled():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    factors = torch.arange(60, dtype=torch.float64).view(3, 4, 5)
    call, _ = compiled(contiguous_gradient)
    found = {}
    for name, function in (("compiled", call), ("not", contiguous_gradient)):
        out = function(x)
        assert torch.equal(out, x)
        (found[name],) = torch.autograd.grad((out.permute(1, 2, 0) * factors).sum(), x)
    assert torch.equal(found["compiled"], factors.permute(2, 0, 1)) and torch.equal(found["not"], found["compiled"])
    assert found["compiled"].is_contiguous() and not found["not"].is_contiguous()


def test_fused_relu_has_the_gradient_of_a_separate_relu():
    torch.manual_seed(0)
    into = Linear(5, 7).double()
    with torch.no_grad():
        into.weight[0] = 0  # products of exactly 0, where ReLU's derivative is defined as 0
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    call, called = compiled(lambda x: relu_of(x, into))
    found = gradients(call, x, into)
    assert F.linear not in called
    torch.testing.assert_close(found, gradients(lambda x: torch.relu(into(x)), x, into), rtol=1e-13, atol=1e-13)
    assert not found[2][0].any()


def test_fused_relu_uses_the_autocast_dtype():
    torch.manual_seed(0)
    into, x = Linear(32, 64), torch.randn(2, 8, 32, requires_grad=True)
    call, _ = compiled(lambda x: relu_of(x, into))
    with torch.autocast("cpu", torch.bfloat16):
        found, usual = call(x), torch.relu(into(x))
    assert found.dtype == usual.dtype == torch.bfloat16
    torch.testing.assert_close(found, usual, rtol=2**-8, atol=0)
    found.sum().backward()
    assert into.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("head", [2, 8])
def test_a_rotation_turns_each_pair_of_channels_by_its_angle(head):
    torch.manual_seed(0)
    x = torch.randn(1, 5, 3, head, dtype=torch.float64)
    half = head // 2
    by: Angles = angles(100.0, half, 7, 5, x)
    place = torch.arange(7, 12, dtype=torch.float64)
    turn = torch.polar(
        torch.ones(5, half, dtype=torch.float64),
        place.outer(100.0 ** (-torch.arange(half, dtype=torch.float64) / half)),
    )
    turned = torch.complex(x[..., :half], x[..., half:]) * turn.unsqueeze(1)
    torch.testing.assert_close(rotate(x, by), torch.cat((turned.real, turned.imag), dim=-1), rtol=1e-12, atol=1e-12)
