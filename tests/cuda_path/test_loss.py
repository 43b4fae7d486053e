"""The compiled loss: equal to the one computed operation by operation, with few graphs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bst_dist.model import loss
from bst_dist.model.attention import flex
from bst_dist.model.loss import linear_cross_entropy


def results(fused: bool, z_loss: float, tokens: int = 50, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return loss, losses of the tokens, squares, and both gradients, of a loss with masked tokens."""
    torch.manual_seed(0)
    hidden = torch.randn(2, tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 8, dtype=dtype, requires_grad=True)
    labels, mask = torch.randint(0, 37, (2, tokens)), torch.rand(2, tokens) < 0.7
    total, per_token, _, squares = linear_cross_entropy(hidden, weight, labels, mask, 0.5, z_loss, fused)
    total.backward()
    return [total.detach(), per_token, torch.zeros(()) if squares is None else squares, hidden.grad, weight.grad]


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_compiled_loss_has_the_same_losses_and_gradients(z_loss, monkeypatch):
    monkeypatch.setattr(loss, "TILE_LOGITS", 37 * 30)  # four tiles of 25 tokens
    for found, exact in zip(results(True, z_loss), results(False, z_loss), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_in_bf16_the_compiled_loss_rounds_like_the_uncompiled_one():
    with torch.autocast("cpu", torch.bfloat16):
        both = zip(results(True, 0.1, dtype=torch.float32), results(False, 0.1, dtype=torch.float32), strict=True)
    for found, exact in both:
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_tiles_of_any_number_of_tokens_have_at_most_two_sizes(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(flex, "BACKEND", counter)
    monkeypatch.setattr(loss, "TILE_LOGITS", 37 * 30)
    results(True, 0.0, tokens=50)  # four tiles of 25
    assert counter.frame_count == 1
    results(True, 0.0, tokens=48)  # four tiles of 24
    results(True, 0.0, tokens=52)  # three tiles of 26, one of 26
    assert counter.frame_count == 3
    results(True, 0.0, tokens=61)  # four tiles of 25, one of 22
    assert counter.frame_count == 4


def test_the_loss_may_have_as_many_graphs_as_a_recipe_has_sizes_of_tiles(monkeypatch):
    """Eight lengths, two sizes of micro-batches for each, two sizes of tiles for each of these."""
    monkeypatch.setattr(flex, "BACKEND", "eager")
    for tokens in range(20, 52):  # one tile each
        results(True, 0.0, tokens)
