"""Exact counts of floating-point operations per token, by term, before anything is built.

A multiply-add is two operations. Counted is what the model does: scores over every key that a tile of queries
materialises, chunk matrices of the SSM, and the tables they are made from are left out (they are amortised over the
batch). Training costs three times the forward pass; recomputation under activation checkpointing is *hardware* work
and not counted here: model and hardware utilisation (MFU, HFU) are two numbers.
"""

from __future__ import annotations

from bst_dist.model.lm import ModelConfig
from bst_dist.model.tiles import sliding_tiles


def forward_flops(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """FLOPs of one token's forward pass by term, averaged over a sequence of that length."""
    terms: dict[str, float] = {}
    for mixer in config.mixers():
        counted = MIXER_TERMS[mixer](config, sequence_length) | {"ffn": 4 * config.width * config.ffn}
        for term, flops in counted.items():
            terms[term] = terms.get(term, 0) + flops
    return terms | {"head": 2 * config.width * (config.vocab_size or 0)}


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward pass."""
    return 3 * sum(forward_flops(config, sequence_length).values())


def _sliding(config: ModelConfig, length: int) -> dict[str, float]:
    d = config.width
    return {"projections": 8 * d * d, "attention": 4 * d * _mean_keys(config.block, length)}


def _bst(config: ModelConfig, length: int) -> dict[str, float]:
    d, context, ssm = config.width, config.context, config.ssm
    channels, modes, chunk = context.width(d), ssm.state // 2, min(ssm.chunk, config.block)
    terms = _sliding(config, length)
    terms["projections"] += 2 * d * channels + 4 * d * d  # down; second query, wider output
    if context.variant == "MF":
        states = context.states
        terms["context"] = 4 * channels * d * states / config.block
        terms["cross"] = 4 * d * states
        terms["ssm"] = 4 * channels * states * modes
    else:
        maps = config.heads if context.variant == "MH" else 1
        terms["context"] = 4 * channels * d
        terms["cross"] = 4 * d * config.block
        terms["ssm"] = 2 * channels * maps * (chunk + 2 * modes) + 4 * channels * modes
    return terms


def _mean_keys(window: int, length: int) -> float:
    """Keys scored per query, over the tiles of a sequence: fewer in the first window, which has nothing before it."""
    tiles = sliding_tiles(length, 0, window)
    return sum((tile.last - tile.first) * (tile.end - tile.begin) for tile in tiles) / length


MIXER_TERMS = {"sliding": _sliding, "bst": _bst}
