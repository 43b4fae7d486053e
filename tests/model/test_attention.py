"""Sliding attention in tiles against a literal loop over queries, in double precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bst_dist.model.attention import sliding
from bst_dist.model.attention.documents import documents_further_back, documents_of
from bst_dist.model.attention.rotary import angles, rotate
from bst_dist.model.attention.self_attention import DistanceBias, SlidingAttention
from bst_dist.model.attention.sliding import PartialAttention, one_softmax, sliding_attention, sliding_share
from bst_dist.model.attention.tiles import QUERY_TILE, sliding_tiles
from bst_dist.model.attention.window import Window
from bst_dist.model.config import AttentionConfig, LayerConfig
from bst_dist.parallel.sequence.past import EarlierCall, Past, RecordedPast


def query_by_query(q, k, v, window, bias, include_self, documents=None):
    """Return attention over the keys that each query may see, computed one query and head at a time."""
    batch, length, heads, _ = q.shape
    before = k.shape[1] - length
    out = torch.zeros(batch, length, heads, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for t in range(length):
            position = before + t
            last = position if include_self else position - 1
            seen = list(range(max(0, last - window + 1), last + 1))
            if documents is not None:
                seen = [j for j in seen if documents[b][j] == documents[b][position]]
            if not seen:
                continue
            for h in range(heads):
                scores = torch.stack([q[b, t, h] @ k[b, j, h] for j in seen])
                if bias is not None:
                    scores = scores + bias[h, [position - j for j in seen]]
                out[b, t, h] = torch.softmax(scores, 0) @ v[b, seen, h]
    return out


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 40),
    before=st.integers(0, 16),
    window=st.sampled_from([4, 8, 16]),
    include_self=st.booleans(),
    with_bias=st.booleans(),
)
def test_tiles_equal_query_by_query(length, before, window, include_self, with_bias):
    torch.manual_seed(length)
    before = min(before, window)
    q = torch.randn(2, length, 2, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, before + length, 2, 4, dtype=torch.float64)
    bias = torch.randn(2, window + 1, dtype=torch.float64) if with_bias else None
    ours = sliding_attention(q, k, v, Window(window, include_self), bias)
    torch.testing.assert_close(ours, query_by_query(q, k, v, window, bias, include_self), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "include_self", "fused"), [(2048, True, True), (2048, False, False), (100, True, False)]
)
def test_a_cpu_uses_the_fused_kernel_for_whole_tiles_in_which_each_token_sees_itself(
    length, include_self, fused, monkeypatch
):
    calls, kernel = [], sliding.fused_sliding_attention
    monkeypatch.setattr(sliding, "fused_sliding_attention", lambda *given: calls.append(1) or kernel(*given))
    q, k, v = torch.randn(3, 1, length, 2, 4)
    sliding_attention(q, k, v, Window(64, include_self))
    assert bool(calls) == fused


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=5, max_size=5), st.sampled_from([4, 8, 12, 14]), st.booleans())
def test_documents_are_separated_in_windows_of_several_blocks(starts, window, past):
    torch.manual_seed(0)
    before = 4 if past else 0
    q = torch.randn(1, 20, 2, 4, dtype=torch.float64)
    k, v = torch.randn(2, 1, before + 20, 2, 4, dtype=torch.float64)
    documents = documents_of(torch.tensor([starts]), 20, before + 20, window)
    ours = sliding_attention(q, k, v, Window(window), None, documents)
    expected = query_by_query(q, k, v, window, None, True, documents.number.tolist())
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@given(st.lists(st.booleans(), min_size=12, max_size=12), st.sampled_from([4, 8, 12, 20]))
def test_documents_of_earlier_slices_are_separated(starts, window):
    """Slices of two blocks of four tokens, in consecutive calls, compared with each token's document number."""
    starts = torch.tensor(starts).view(1, 12)
    document = starts.cumsum(1).repeat_interleave(4, dim=1)[0]
    state = {}
    for begin in range(0, 48, 8):
        past = EarlierCall(state, begin)
        keys = 8 + min(window, begin)
        found = documents_further_back(starts[:, begin // 4 : begin // 4 + 2], past, 8, keys, window)
        wanted = document[begin + 8 - keys : begin + 8]
        apart = found.number[0][:, None] != found.number[0]
        assert torch.equal(apart, wanted[:, None] != wanted)
        first = [int((wanted == one).nonzero()[0]) for one in wanted[-8:]]
        assert found.begin[0].tolist() == first
        in_window = [int(wanted[key] - wanted[max(0, key - window + 1)]) + 1 for key in range(keys)]
        assert max(in_window) <= found.kinds
        assert isinstance(found.kinds, int)
        state = past.after


def with_sums(q, k, v, window, bias, include_self):
    """Return `query_by_query` and each query's logsumexp of the scores."""
    before = k.shape[1] - q.shape[1]
    sums = torch.zeros(q.shape[:-1], dtype=q.dtype)
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:-1])).tolist():
        last = before + t - (0 if include_self else 1)
        seen = range(max(0, last - window + 1), last + 1)
        sums[b, t, h] = sum(torch.exp(q[b, t, h] @ k[b, j, h] + bias[h, before + t - j]) for j in seen).log()
    return query_by_query(q, k, v, window, bias, include_self), sums


@pytest.mark.parametrize(
    ("length", "include_self"),
    [(24, True), (21, True), (24, False)],
    ids=["fused tiles", "plain tiles", "without self"],
)
def test_sums_and_their_gradients_equal_query_by_query(length, include_self):
    """Distances from 4 on share a bias. The fused tiles compute its gradient from the near distances and the sums."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (length, 3 + length, 3 + length)
    )
    table = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, length, 2, 5, dtype=torch.float64)
    bias = table[:, torch.arange(9).clamp(max=4)]
    ours = sliding_share(q, k, v, Window(8, include_self, 4), bias)
    theirs = with_sums(q, k, v, 8, bias, include_self)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for total, wanted in (
        (lambda out, sums: (torch.cat((out, sums.unsqueeze(-1)), -1) * weights).sum(), (q, k, v, table)),
        (lambda out, sums: (sums * out[..., 0]).sum(), (q, k, v, table)),
        (lambda out, sums: (sums * weights[..., 0]).sum(), (q, k, table)),  # nothing depends on the values
    ):
        gradients = (torch.autograd.grad(total(*one), wanted, retain_graph=True) for one in (ours, theirs))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_one_softmax_of_two_key_sets_equals_the_softmax_over_both():
    q, k, v = torch.randn(5, 4), torch.randn(9, 4), torch.randn(9, 4)
    scores = q @ k.T
    parts = [
        PartialAttention(
            (scores[:, part].softmax(-1) @ v[part])[None, :, None], scores[:, part].logsumexp(-1)[None, :, None]
        )
        for part in (slice(0, 6), slice(6, 9))
    ]
    torch.testing.assert_close(one_softmax(*parts)[0, :, 0], scores.softmax(-1) @ v)


@pytest.mark.parametrize("position", ["t5", "rope"])
def test_a_layer_equals_query_by_query_attention_on_its_projections(position):
    """RoPE by complex numbers: the pair (i, i + dh / 2) of position t is turned by t base^(-2i / dh)."""
    torch.manual_seed(0)
    sizes = {"width": 8, "heads": 2, "head_width": 6, "ffn": 8, "block": 8}
    layer = SlidingAttention(LayerConfig(**sizes, attention={"position": position, "rope_base": 100}), 8).double()
    u = torch.randn(2, 24, 8, dtype=torch.float64)
    q, k, v = layer.qkv(u).view(2, 24, 6, 6).split(2, dim=2)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    q = q * layer.scale[:, None]
    bias = None
    if position == "rope":
        turn = torch.polar(torch.ones(24, 1, 3), torch.arange(24.0).view(-1, 1, 1) * 100.0 ** (-torch.arange(3.0) / 3))
        q, k = (torch.complex(*x.chunk(2, dim=-1)) * turn.to(torch.complex128) for x in (q, k))
        q, k = (torch.cat((x.real, x.imag), dim=-1) for x in (q, k))
    else:
        torch.nn.init.normal_(layer.bias.weight)
        bias = layer.bias.weight[:, :9]  # buckets of distances below 16 are exact
    expected = query_by_query(q, k, v, 8, bias, layer.config.include_self).flatten(-2)
    torch.testing.assert_close(layer(u, Past()), expected, rtol=1e-5, atol=1e-6)


def prepare(layer, u, starts):
    """Return the values that the layer prepares."""
    past = RecordedPast(Past())
    layer.prepare(u, past, starts)
    return past.recorded


@pytest.mark.parametrize("position", ["t5", "rope"])
def test_prepare_computes_all_shared_values_of_a_layer(position):
    layer = SlidingAttention(LayerConfig(width=16, heads=2, ffn=16, block=8, attention={"position": position}), 8)
    u, starts = torch.randn(1, 40, 16), torch.tensor([[False, True, False, True, True]])
    past = Past()
    layer(u, past, starts)
    prepared = prepare(layer, u, starts)
    assert set(prepared) == set(past.shared)
    for name, asked in past.shared.items():
        torch.testing.assert_close(prepared[name], asked)
    assert set(prepare(layer, u, None)) == {name for name in prepared if not name.startswith("documents")}


@given(st.integers(1, 900), st.integers(0, 40), st.integers(1, 300))
def test_tiles_cover_every_query_once_and_end_at_their_last_query(queries, before, window):
    tiles = list(sliding_tiles(queries, before, window))
    assert [place for tile in tiles for place in range(tile.first, tile.last)] == list(range(queries))
    for tile in tiles:
        assert tile.last - tile.first <= QUERY_TILE
        assert tile.begin == max(0, before + tile.first - window)
        assert tile.end == before + tile.last


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("length", "include_self"),
    [(24, True), (24, False), (QUERY_TILE + 5, False)],
    ids=["fused tiles", "one plain tile", "two plain tiles"],
)
def test_gradients_equal_query_by_query(length, include_self, heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(heads, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, length, heads, 4, dtype=torch.float64)
    ours = (sliding_attention(q, k, v, Window(8, include_self), bias) * weight).sum()
    theirs = (query_by_query(q, k, v, 8, bias, include_self) * weight).sum()
    ours, theirs = (torch.autograd.grad(total, (q, k, v, bias)) for total in (ours, theirs))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("before", [0, 3, 8])
@pytest.mark.parametrize("varying", [1, 3, 9])
@pytest.mark.parametrize("at_once", [1, 16, 80, 4096], ids=["one tile", "two tiles", "two rows", "all"])
def test_the_gradient_of_a_bias_shared_by_far_distances_is_exact(before, varying, at_once, monkeypatch):
    """The fused tiles compute this gradient from the near distances only; tested with several tile sizes and pasts."""
    monkeypatch.setattr("bst_dist.model.attention.fused_tiles.QUERIES_AT_ONCE", at_once)
    monkeypatch.setattr("bst_dist.model.attention.fused_tiles.BAND_SCORES_AT_ONCE", at_once * 16)
    torch.manual_seed(before)
    q = torch.randn(3, 40, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(3, before + 40, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    table = torch.randn(2, varying + 1, dtype=torch.float64, requires_grad=True)
    places = torch.arange(9).clamp(max=varying)
    weight = torch.randn(3, 40, 2, 4, dtype=torch.float64)
    ours = (sliding_attention(q, k, v, Window(8, varying=varying), table[:, places]) * weight).sum()
    theirs = (query_by_query(q, k, v, 8, table[:, places], True) * weight).sum()
    wanted = (q, k, v, table)
    for one, other in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("position", ["t5", "rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_cross_a_document_start(position, dtype):
    torch.manual_seed(0)
    attention = SlidingAttention(LayerConfig(width=16, heads=2, ffn=16, block=8, attention={"position": position}), 8)
    u = torch.randn(1, 40, 16, requires_grad=True)
    starts = torch.tensor([[False, True, False, True, True]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = attention(u, Past(), starts)
        alone = attention(u[:, 8:24], Past())
    for begin, end in ((8, 24), (24, 32), (32, 40)):
        (gradient,) = torch.autograd.grad(out[0, begin:end].float().sum(), u, retain_graph=True)
        assert gradient[0, :begin].count_nonzero() == 0
        assert gradient[0, end:].count_nonzero() == 0
    torch.testing.assert_close(out[:, 8:24], alone, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_t5_buckets_are_exact_then_logarithmic():
    """Bucket numbers by the definition: exact up to 15, then log-spaced up to 128, then the last bucket."""
    bias = DistanceBias(1, AttentionConfig(position="t5", buckets=32, max_distance=128))
    with torch.no_grad():
        bias.weight.copy_(torch.arange(32.0))
    buckets = bias(bias.buckets(200))[0].int().tolist()
    assert buckets[:16] == list(range(16))
    expected = [min(31, 16 + int(math.log(d / 16) / math.log(8) * 16)) for d in range(16, 200)]
    assert buckets[16:] == expected
    assert buckets[127] == buckets[199] == 31


def test_rope_products_depend_only_on_position_differences():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(of_query, of_key):
        return (rotate(q, angles(1e4, 4, of_query, 1, q)) * rotate(k, angles(1e4, 4, of_key, 1, k))).sum()

    at = [product(5 + s, 2 + s) for s in (0, 11, 400)]
    torch.testing.assert_close(at[0], at[1])
    torch.testing.assert_close(at[0], at[2])
    assert not torch.allclose(at[0], product(6, 2))


@pytest.mark.parametrize("position", ["t5", "rope"])
@pytest.mark.parametrize("length", [40, 64], ids=["plain tiles", "whole tiles"])
def test_shared_kv_heads_equal_repeated_kv_heads(position, length):
    """Values and gradients of 4 query heads with 2 key heads equal those of 4 key heads with repeated weights."""
    sizes = {"width": 8, "heads": 4, "head_width": 6, "ffn": 8, "block": 32}
    torch.manual_seed(0)
    shared = SlidingAttention(LayerConfig(**sizes, attention={"position": position, "kv_heads": 2}), 32).double()
    whole = SlidingAttention(LayerConfig(**sizes, attention={"position": position}), 32).double()
    pair = torch.tensor([0, 0, 1, 1])  # query heads 0 and 1 use key head 0, query heads 2 and 3 use key head 1
    with torch.no_grad():
        for module in (shared, whole):
            module.scale.copy_(torch.linspace(1, 2, 4))
            if position == "t5":
                module.bias.weight.copy_(torch.linspace(-1, 1, 128).view(4, 32))
        q, k, v = shared.qkv.weight.unflatten(0, (8, 6)).split((4, 2, 2))
        whole.qkv.weight.copy_(torch.cat((q, k[pair], v[pair])).flatten(0, 1))
    u = torch.randn(2, length, 8, dtype=torch.double)
    out, expected = shared(u, Past()), whole(u, Past())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient)
    d_q, d_k, d_v = whole.qkv.weight.grad.unflatten(0, (12, 6)).split((4, 4, 4))
    sums = [x.unflatten(0, (2, 2)).sum(1) for x in (d_k, d_v)]
    torch.testing.assert_close(shared.qkv.weight.grad, torch.cat((d_q, *sums)).flatten(0, 1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(shared.scale.grad, whole.scale.grad, rtol=1e-11, atol=1e-11)
