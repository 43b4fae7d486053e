"""FlexAttention (mask, bias, gradients) compared with the tiles, which other tests compare with a literal loop."""

from __future__ import annotations

import pytest
import torch

from bst_dist.model.attention import flex, sliding
from bst_dist.model.attention.documents import documents_of
from bst_dist.model.attention.sliding import sliding_attention, sliding_share
from bst_dist.model.attention.window import Window

ROWS, LENGTH, HEADS, WIDTH, WINDOW = 2, 256, 2, 16, 128
STARTS = torch.tensor([[False, True], [True, False]])


def inputs(
    before: int,
    dtype: torch.dtype = torch.float32,
    window: int = WINDOW,
    length: int = LENGTH,
    width: int = WIDTH,
    kv_heads: int = HEADS,
):
    torch.manual_seed(0)
    shapes = ((length, HEADS), (before + length, kv_heads), (before + length, kv_heads))
    q, k, v = (torch.randn(ROWS, n, heads, width, dtype=dtype, requires_grad=True) for n, heads in shapes)
    bias = torch.randn(HEADS, window + 1, requires_grad=True)
    return q, k, v, bias


def shared_from(bias: torch.Tensor, distance: int) -> torch.Tensor:
    """Return the bias with one shared value from `distance` on, differentiable."""
    return bias[:, torch.arange(bias.shape[1]).clamp(max=distance)]


def errors(found, exact) -> list[float]:
    return [float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("varying", [None, 40, 128])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(("before", "documents"), [(0, False), (128, True)])
def test_outputs_and_gradients_equal_the_tiles(before, documents, include_self, varying, monkeypatch):
    q, k, v, bias = inputs(before)
    weight = torch.randn(ROWS, LENGTH, HEADS, WIDTH)
    known = documents_of(STARTS, LENGTH, before + LENGTH, WINDOW) if documents else None

    def run():
        table = bias if varying is None else shared_from(bias, varying)
        out = sliding_attention(q, k, v, Window(WINDOW, include_self, varying), table, known)
        return out, *torch.autograd.grad((out * weight).sum(), (q, k, v, bias))

    found = run()
    monkeypatch.setattr(sliding, "attention_path", lambda device: "tiles")
    assert max(errors(found, run())) < 2e-6


@pytest.mark.parametrize("varying", [None, 40])
@pytest.mark.parametrize("documents", [False, True])
def test_sums_and_their_gradients_equal_the_tiles(documents, varying, monkeypatch):
    q, k, v, bias = inputs(128)
    weight, of_sums = torch.randn(ROWS, LENGTH, HEADS, WIDTH), torch.randn(ROWS, LENGTH, HEADS)
    known = documents_of(STARTS, LENGTH, 128 + LENGTH, WINDOW) if documents else None

    def run():
        table = bias if varying is None else shared_from(bias, varying)
        share = sliding_share(q, k, v, Window(WINDOW, varying=varying), table, known)
        total = (share.out * weight).sum() + (share.sums * of_sums).sum()
        return *share, *torch.autograd.grad(total, (q, k, v, bias))

    found = run()
    monkeypatch.setattr(sliding, "attention_path", lambda device: "tiles")
    assert max(errors(found, run())) < 2e-6


@pytest.mark.parametrize(("width", "kv_heads"), [(4, 2), (15, 1), (16, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_heads_of_any_width_reach_the_kernel_with_16_channels(width, kv_heads, biased, monkeypatch):
    """Inductor's lowering refuses narrower heads, which the CPU's stand-in for the kernel does not."""
    q, k, v, bias = inputs(128, width=width, kv_heads=kv_heads)
    bias = bias if biased else None
    weight, of_sums = torch.randn(ROWS, LENGTH, HEADS, width), torch.randn(ROWS, LENGTH, HEADS)
    real, widths = flex.flex_attention, []

    def recorded(*args, **settings):
        widths.extend(x.shape[-1] for x in args[:3])
        return real(*args, **settings)

    def run():
        share = sliding_share(q, k, v, Window(WINDOW), bias)
        total = (share.out * weight).sum() + (share.sums * of_sums).sum()
        return *share, *torch.autograd.grad(total, (q, k, v, *([bias] if biased else [])))

    monkeypatch.setattr(flex, "flex_attention", recorded)
    found = run()
    assert set(widths) == {16}
    with torch.no_grad():
        assert max(errors(sliding_share(q, k, v, Window(WINDOW), bias), found[:2])) < 2e-6
    monkeypatch.setattr(sliding, "attention_path", lambda device: "tiles")
    assert max(errors(found, run())) < 2e-6


@pytest.mark.parametrize("length", [7, 256])
def test_sums_without_gradients_equal_the_tiles(length, monkeypatch):
    q, k, v, bias = (x.detach() for x in inputs(128, length=length))
    found = sliding_share(q, k, v, Window(WINDOW), bias)
    monkeypatch.setattr(sliding, "attention_path", lambda device: "tiles")
    torch.testing.assert_close(found, sliding_share(q, k, v, Window(WINDOW), bias))


def test_a_window_of_partial_tiles_equals_the_tiles(monkeypatch):
    q, k, v, bias = inputs(96, window=96, length=1056)
    weight = torch.randn(ROWS, 1056, HEADS, WIDTH)
    documents = documents_of(torch.randn(ROWS, 11).gt(0.5), 1056, 1152, 96)

    def run():
        out = sliding_attention(q, k, v, Window(96), bias, documents)
        return out, *torch.autograd.grad((out * weight).sum(), (q, k, v, bias))

    found = run()
    monkeypatch.setattr(sliding, "attention_path", lambda device: "tiles")
    assert max(errors(found, run())) < 2e-6


def test_the_bias_gradient_in_bfloat16_is_close_to_single_precision():
    q, k, v, bias = inputs(128)
    weight = torch.randn(ROWS, LENGTH, HEADS, WIDTH)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        table = shared_from(bias, 100)
        out = sliding_attention(*(x.to(dtype) for x in (q, k, v)), Window(WINDOW, varying=100), table)
        found.append(torch.autograd.grad((out * weight).sum(), bias)[0])
    assert errors(found[1:], found[:1])[0] < 0.03


@pytest.mark.parametrize("length", [1, 7, 256, 300])
@pytest.mark.parametrize("include_self", [True, False])
def test_slices_without_gradients_equal_the_tiles(length, include_self, monkeypatch):
    """One token, part of a block, and whole tiles, at the start of a stream and later."""
    for before in (0, 128):
        q, k, v, bias = (x.detach() for x in inputs(before, length=length))
        found = sliding_attention(q, k, v, Window(WINDOW, include_self), bias)
        with monkeypatch.context() as patch:
            patch.setattr(sliding, "attention_path", lambda device: "tiles")
            torch.testing.assert_close(found, sliding_attention(q, k, v, Window(WINDOW, include_self), bias))


@pytest.mark.parametrize("before", [0, 128])
def test_masks_and_biases_get_no_values_computed_from_dynamic_lengths(before, monkeypatch):
    """Inductor of torch 2.11 fails on such values; it accepts tensors and the lengths themselves."""
    given = []

    def backend(graph, inputs):
        calls = [node for node in graph.graph.nodes if "flex_attention" in str(node.target)]
        given.extend(one.meta["example_value"] for call in calls for one in (*call.args[-2], *call.args[-1]))
        return graph

    monkeypatch.setattr(flex, "BACKEND", backend)
    for length in (256, 384):
        q, k, v, bias = (x.detach() for x in inputs(before, length=length))
        sliding_attention(q, k, v, Window(WINDOW), bias)
    assert sum(isinstance(one, torch.Tensor) for one in given) == 4  # for each of the two calls
    assert all(isinstance(one, torch.Tensor) or one.node.expr.is_Symbol for one in given)


def test_exceeding_the_graph_limit_is_an_error(monkeypatch):
    monkeypatch.setattr(flex, "GRAPHS", 2)
    for length in (256, 384):
        sliding_attention(*inputs(0, length=length)[:3], Window(WINDOW))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        sliding_attention(*inputs(0, length=512)[:3], Window(WINDOW))
