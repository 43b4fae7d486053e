"""Unstructured filters compared with direct sums; block-end outputs compared with full convolutions; in slices."""

from __future__ import annotations

import math

import pytest
import torch

from bst_dist.model.config import ExplicitConfig, HyenaConfig
from bst_dist.model.ssm.unstructured import DocumentResetError, ExplicitFilter, HyenaFilter
from bst_dist.parallel.sequence.past import EarlierCall, Past

BLOCK, WIDTH, MAPS = 8, 3, 4
KINDS = ["explicit", "hyena"]


def build(kind, length=20):
    torch.manual_seed(1)
    if kind == "explicit":
        return ExplicitFilter(WIDTH, MAPS, ExplicitConfig(length=length)).double()
    return HyenaFilter(WIDTH, MAPS, HyenaConfig(length=length, hidden=8, bands=3)).double()


def inputs(length=5 * BLOCK, batch=2):
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


@torch.no_grad()
def literal_filter(model, kind, config_length):
    """Return h[t] tap by tap from the definition: values · exp(-α t/K); the window has unit energy over K taps."""
    h = torch.zeros(MAPS, WIDTH, config_length, dtype=torch.float64)
    for d in range(WIDTH):
        rate = math.exp(model.log_decay[d])
        window = [math.exp(-rate * t / config_length) for t in range(config_length)]
        energy = math.sqrt(sum(w * w for w in window))
        for t in range(config_length):
            for c in range(MAPS):
                h[c, d, t] = literal_value(model, kind, c, d, t, config_length) * window[t] / energy
    return h


def literal_value(model, kind, c, d, t, length):
    if kind == "explicit":
        return model.value[c, d, t]
    angles = [2 * math.pi * k * t / length for k in range(1, model.bands + 1)]
    x = torch.tensor([t / length, *map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
    for layer in model.layers:
        x = torch.sin(model.frequency * (layer.weight @ x + layer.bias))
    return math.sqrt(2) * (model.last[c, d] @ x)


@torch.no_grad()
def literal_outputs(model, kind, z, length):
    h = literal_filter(model, kind, length)
    y = torch.zeros(*z.shape[:2], MAPS, WIDTH, dtype=torch.float64)
    for t in range(z.shape[1]):
        for j in range(max(0, t - length + 1), t + 1):
            y[:, t] += h[..., t - j] * z[:, None, j]
        y[:, t] += model.skip * z[:, None, t]
    return y


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [20, 40, 64])
def test_forward_equals_the_direct_sum_within_and_beyond_the_trained_length(kind, length):
    model, z = build(kind, length), inputs()
    close(model(z, Past()), literal_outputs(model, kind, z, length))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7, 20, 40, 64])
def test_block_ends_equal_the_full_convolutions(kind, length):
    model, z = build(kind, length), inputs()
    close(model.block_ends(z, BLOCK, Past()), model(z, Past())[:, BLOCK - 1 :: BLOCK])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7, 20, 40])
@pytest.mark.parametrize("sizes", [[2 * BLOCK, 3 * BLOCK], [1] * 5 * BLOCK, [3, 5, 2 * BLOCK, BLOCK, 7, 1]])
def test_slices_equal_the_whole(kind, length, sizes):
    model, z = build(kind, length), inputs()
    state, position, outputs, ends = {}, 0, [], []
    for part in z.split(sizes, dim=1):
        past = EarlierCall(state, position)
        outputs.append(model(part, past))
        ends.append(model.block_ends(part, BLOCK, EarlierCall(state, position)))
        state, position = past.after, position + part.shape[1]
    close(torch.cat(outputs, 1), model(z, Past()))
    close(torch.cat(ends, 1), model.block_ends(z, BLOCK, Past()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_keeps_trained_length_minus_one_inputs(kind):
    model, past = build(kind), EarlierCall()
    model(inputs(), past)
    assert past.after["inputs"].shape == (2, 19, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_isolated_documents_are_refused_by_name_of_the_option(kind):
    model, starts = build(kind), torch.zeros(2, 5, dtype=torch.bool)
    for call in (lambda: model(inputs(), Past(), starts), lambda: model.block_ends(inputs(), BLOCK, Past(), starts)):
        with pytest.raises(DocumentResetError, match=r"data\.documents to joined"):
            call()


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_have_only_rounding_level_effects(kind):
    model, z = build(kind, 40).float(), inputs().float()
    changed = z.clone()
    changed[:, 17:] = 10 * torch.randn_like(changed[:, 17:])
    torch.testing.assert_close(model(z, Past())[:, :17], model(changed, Past())[:, :17], rtol=0, atol=2e-5)
    assert torch.equal(model.block_ends(z, BLOCK, Past())[:, :2], model.block_ends(changed, BLOCK, Past())[:, :2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [False, True])
def test_gradients_pass_gradcheck(kind, ends):
    model, z = build(kind, 6), inputs(BLOCK, batch=1).requires_grad_()
    run = (lambda *_: model.block_ends(z, 4, Past())) if ends else (lambda *_: model(z, Past()))
    assert torch.autograd.gradcheck(run, (z, *model.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_gain_is_about_one_at_any_trained_length(kind):
    for length in (64, 4096):
        torch.manual_seed(0)
        model = ExplicitFilter(64, 4, ExplicitConfig(length=length)) if kind == "explicit" else None
        model = model or HyenaFilter(64, 4, HyenaConfig(length=length))
        energy = model.kernel(length).square().sum(-1).mean()
        assert 0.5 < energy < 2
