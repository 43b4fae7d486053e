"""The feed-forward network compared with explicit formulas: values and all gradients, in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from bst_base.settings import ConfigError, parse
from bst_dist.model.config import LayerConfig
from bst_dist.model.layers import ACTIVATIONS, FeedForward

SIZES = {"width": 6, "heads": 2, "ffn": 10, "block": 8}


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def normal(x):
    """Return the distribution function and the density of N(0, 1)."""
    return (1 + torch.erf(x / math.sqrt(2))) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


# Each activation and its derivative.
LITERAL = {
    "relu": lambda x: (x * (x > 0), (x > 0).double()),
    "relu2": lambda x: (x * x * (x > 0), 2 * x * (x > 0)),
    "gelu": lambda x: (x * normal(x)[0], normal(x)[0] + x * normal(x)[1]),
    "swiglu": lambda x: (x * sigmoid(x), sigmoid(x) * (1 + x * (1 - sigmoid(x)))),
}


@pytest.mark.parametrize("activation", LITERAL)
def test_values_and_gradients_equal_the_formula(activation):
    torch.manual_seed(0)
    network = FeedForward(LayerConfig(**SIZES, activation=activation)).double()
    x, g = torch.randn(7, 6, dtype=torch.double, requires_grad=True), torch.randn(7, 6, dtype=torch.double)
    y = network(x)
    y.backward(g)
    u, out = network.up.weight.detach(), network.out.weight.detach()
    with torch.no_grad():
        up = x @ u.T
        if activation == "swiglu":
            gate = network.gate.weight
            value, slope = LITERAL[activation](x @ gate.T)
            hidden, d_hidden = value * up, g @ out
            d_up, d_gate = d_hidden * value, d_hidden * up * slope
            torch.testing.assert_close(gate.grad, d_gate.T @ x, rtol=1e-12, atol=1e-12)
            d_x = d_up @ u + d_gate @ gate
        else:
            hidden, slope = LITERAL[activation](up)
            d_up = (g @ out) * slope
            d_x = d_up @ u
    for found, expected in (
        (y, hidden @ out.T),
        (network.out.weight.grad, g.T @ hidden),
        (network.up.weight.grad, d_up.T @ x),
        (x.grad, d_x),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_every_activation_exists_and_only_swiglu_has_three_matrices():
    assert LITERAL.keys() == ACTIVATIONS.keys()
    for activation in ACTIVATIONS:
        config = LayerConfig(**SIZES, activation=activation)
        assert len(list(FeedForward(config).parameters())) == config.ffn_matrices == 2 + (activation == "swiglu")


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="activation"):
        parse(LayerConfig, {**SIZES, "activation": "tanh"})
