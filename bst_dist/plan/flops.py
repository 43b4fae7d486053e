"""Floating-point operations per token, by term, counted without building the model.

A multiply-add is two operations. Attention is counted by tiles of 128 queries (`model.attention.tiles`), with the
scores of all keys that a tile meets, masked ones included, whatever kernel runs: so a count depends on the model and
the length only, and sizes and utilisation can be compared between devices. The kernels compute other numbers of scores:
for a window of 64 and 4,096 tokens, 190 keys per query are counted, the CPU kernel meets 127, and FlexAttention's
blocks of 128 x 128 have 252 (docs/sweeps.md has a table). Everything else is what the model computes, with products
with the SSM's chunk matrices. Computing the tables of these matrices is left out, because it is amortised over the
batch. Training costs three times the forward pass. Recomputation under activation checkpointing is *hardware* work and
is not counted here: MFU and HFU are two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

from bst_dist.model.attention.tiles import Tile, sliding_tiles
from bst_dist.model.baselines.full import causal_tiles
from bst_dist.model.config import ModelConfig, within_block
from bst_dist.model.ssm.convolution import padded_size


def forward_flops(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Return the FLOPs of one token's forward pass by term, averaged over a sequence of that length."""
    terms: dict[str, float] = {}
    of_mixer = {mixer: layer_flops(config, mixer, sequence_length) for mixer in set(config.mixers())}
    for mixer in config.mixers():
        for term, flops in of_mixer[mixer].items():
            terms[term] = terms.get(term, 0) + flops
    return terms | {"head": 2 * config.width * (config.vocab_size or 0)}


def layer_flops(config: ModelConfig, mixer: str, sequence_length: int) -> dict[str, float]:
    """Return the FLOPs of one token's forward pass through one layer, by term, averaged over such a sequence."""
    network = 2 * config.ffn_matrices * config.width * config.ffn
    return MIXER_TERMS[mixer](config, sequence_length) | {"ffn": network}


def train_flops_per_token(config: ModelConfig, sequence_length: int, head: bool = True) -> float:
    """Return the FLOPs of one token's forward and backward pass. `head`: whether logits are computed for each token."""
    terms = forward_flops(config, sequence_length)
    return 3 * (sum(terms.values()) - (0 if head else terms["head"]))


def _sliding(config: ModelConfig, length: int) -> dict[str, float]:
    inner = config.inner
    return {"projections": _projections(config), "attention": 4 * inner * _mean_keys(config.block, length)}


def _projections(config: ModelConfig) -> float:
    """Return the FLOPs of the projections of self-attention: queries, keys, values, output."""
    return 4 * config.width * (config.inner + config.kv_inner)


def _bst(config: ModelConfig, length: int) -> dict[str, float]:
    terms = _joint(config, length)
    terms["projections"] += 4 * config.width * config.inner  # second query, wider output
    return terms


def _joint(config: ModelConfig, length: int) -> dict[str, float]:
    d, inner, context = config.width, config.inner, config.context
    channels = context.width(d)
    terms = _sliding(config, length)
    terms["projections"] += 2 * d * channels
    if context.variant == "MF":
        states = context.states
        terms["context"] = 4 * channels * inner * states / config.block
        terms["cross"] = 4 * inner * states
        return terms | kernel_ends_flops(config, channels, states, length)
    terms["context"] = 4 * channels * inner
    terms["cross"] = 4 * inner * config.block
    return terms | kernel_flops(config, channels, config.heads if context.variant == "MH" else 1, length)


def _no_cross(config: ModelConfig, length: int) -> dict[str, float]:
    terms = _sliding(config, length)
    terms["projections"] += 2 * config.width * config.inner  # wider output
    return terms


def _transformer_xl(config: ModelConfig, length: int) -> dict[str, float]:
    inner, window = config.inner, config.transformer_xl.window
    first = min(window, length)
    rest = length - min(window, length)
    whole, last = divmod(rest, window)
    scored = _scored_in_windows(first, 0, window) + whole * _scored_in_windows(window, window, window)
    scored += _scored_in_windows(last, window, window)
    return {"projections": _projections(config), "attention": 4 * inner * scored / length}


def _full(config: ModelConfig, length: int) -> dict[str, float]:
    inner = config.inner
    scored = _scored(causal_tiles(length, 0))
    return {"projections": _projections(config), "attention": 4 * inner * scored / length}


def _block_recurrent(config: ModelConfig, length: int) -> dict[str, float]:
    d, inner, states, block = config.width, config.inner, config.block_recurrent.states, config.block
    terms = _sliding(config, length)
    terms["projections"] += 4 * d * inner  # second query, wider output
    terms["cross"] = 4 * inner * states
    terms["state"] = states / block * 12 * d * inner + state_attention_flops(config, length)
    return terms


def state_attention_flops(config: ModelConfig, length: int) -> float:
    """Return the attention in Block-Recurrent's term `state`: of the states to themselves and to tokens."""
    states, block = config.block_recurrent.states, config.block
    token_keys = 2 * block - block * block / length  # no block precedes the first
    return states / block * 4 * config.inner * (states + token_keys)


def _gss(config: ModelConfig, length: int) -> dict[str, float]:
    d, wide, narrow = config.width, config.gss.gate * config.width, config.width // config.gss.reduce
    return {"projections": 4 * d * wide + 2 * narrow * (d + wide)} | kernel_flops(config, narrow, 1, length)


def _mamba2(config: ModelConfig, length: int) -> dict[str, float]:
    d = config.width
    own = within_block(config.mamba2, config.block)
    inner = own.expand * d
    projections = 2 * d * (2 * inner + 2 * own.state + inner // own.head) + 2 * inner * d
    return {"projections": projections, "ssm": _selective(inner, inner // own.head, own.state, 1, own.chunk)}


def _selective(channels: int, heads: int, state: int, maps: int, chunk: int) -> float:
    """Return the FLOPs of the scan of a selective SSM, per token.

    They are the chunk's matrix and its product with the inputs, products into and out of the state, and the sums of the
    heads' decays.
    """
    return 2 * chunk * heads + 2 * maps * chunk * (state + channels) + 2 * channels * state * (1 + maps)


def _gated_deltanet(config: ModelConfig, length: int) -> dict[str, float]:
    d = config.width
    own = within_block(config.gated_deltanet, config.block)
    keys, values, chunk = config.inner, own.expand * config.inner, own.chunk
    projections = 2 * d * (2 * keys + 2 * values + 2 * config.heads) + 2 * values * d
    within = 4 * chunk * keys + 2 * chunk * values  # keys and queries times keys, and the written values
    within += 2 * chunk * config.heads  # the sums of the decays
    return {
        "projections": projections,
        "delta": within + 6 * config.head * values,
    }  # the triangular solve is not counted


def _pure_ssm(config: ModelConfig, length: int) -> dict[str, float]:
    return {"projections": 4 * config.width**2} | kernel_flops(config, config.width, 1, length)


def kernel_flops(config: ModelConfig, channels: int, maps: int, length: int) -> dict[str, float]:
    """Return the FLOPs per token of an SSM kernel with outputs for every token.

    For a filter they are the FFTs of the sequence, 2.5 n log2 n each, and the products between them.
    """
    ssm = within_block(config.ssm, config.block)
    chunk = ssm.chunk
    if ssm.kernel == "ssd":
        select = 2 * channels * (channels // ssm.head + ssm.state * (1 + maps))
        return {"ssm": select + _selective(channels, channels // ssm.head, ssm.state, maps, chunk)}
    if ssm.kernel == "s4d":
        return {"ssm": 2 * channels * maps * (chunk + ssm.state) + 2 * channels * ssm.state}
    if ssm.kernel == "s4-dplr":
        within = 2 * channels * maps * (chunk + ssm.state) + 2 * channels * ssm.state
        return {"ssm": within + channels * _dense_scan(ssm.state, length // chunk) / length}
    if ssm.kernel in ("explicit", "hyena"):
        size = padded_size(length, length, min(ssm.length, length))  # no token has more before it
        transforms = 2.5 * size * math.log2(size) * channels * (1 + maps)
        return {"fft": (transforms + 3 * size * channels * maps) / length}
    return {}


def kernel_ends_flops(config: ModelConfig, channels: int, maps: int, length: int) -> dict[str, float]:
    """Return the FLOPs per token of an SSM kernel with outputs at block ends only; each map has its own dynamics."""
    block = config.block
    ssm = within_block(config.ssm, block)
    if ssm.kernel == "s4d":
        return {"ssm": 2 * channels * maps * ssm.state}
    if ssm.kernel == "s4-dplr":
        between = _dense_scan(ssm.state, length // ssm.chunk) + 2 * ssm.state**2 * length / block
        return {"ssm": channels * maps * (2 * ssm.state + between / length)}
    if ssm.kernel in ("explicit", "hyena"):
        blocks = length // block
        lags = min(-(-ssm.length // block), blocks)
        return {"ssm": 2 * channels * maps * sum(blocks - lag for lag in range(lags)) / blocks}
    return {}


def _dense_scan(state: int, chunks: int) -> int:
    """Return the FLOPs of the scan over a sequence's chunks by doubling, for one channel."""
    steps = (2**k for k in range(chunks.bit_length()))
    return 2 * state**2 * sum(max(0, chunks + 1 - step) for step in steps)


def _mean_keys(window: int, length: int) -> float:
    """Return the mean number of keys per query in tiles of 128 queries. The first window has fewer, as nothing precedes
    it."""
    return _scored_in_windows(length, 0, window) / length


def _scored(tiles: Iterable[Tile]) -> int:
    """Return the number of query-key pairs in all tiles."""
    return sum((tile.last - tile.first) * (tile.end - tile.begin) for tile in tiles)


@lru_cache(maxsize=1024)
def _scored_in_windows(queries: int, before: int, window: int) -> int:
    """Return the same for sliding tiles. Cached, because a long sequence has many tiles, and a plan counts it often."""
    return _scored(sliding_tiles(queries, before, window))


MIXER_TERMS: dict[str, Callable[[ModelConfig, int], dict[str, float]]] = {
    "sliding": _sliding,
    "bst": _bst,
    "bst-no-cross": _no_cross,
    "bst-joint": _joint,
    "transformer-xl": _transformer_xl,
    "block-recurrent": _block_recurrent,
    "gss": _gss,
    "ssm": _pure_ssm,
    "mamba2": _mamba2,
    "gated-deltanet": _gated_deltanet,
    "full": _full,
}
"""For each mixer, the function that returns its FLOPs per token of a forward pass, by term."""
