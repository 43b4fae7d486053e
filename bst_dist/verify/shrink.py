"""A small copy of a recipe: the same architecture, kernel, placement and documents, in small shapes.

The copy keeps all that could make gradients wrong: the layers and their order, the number of blocks in a slice, whether
segments and filters fit into a slice. Only the sizes are reduced.
"""

from __future__ import annotations

import math
from typing import Any

from bst_base.settings import Config, parse
from bst_dist.config import Recipe
from bst_dist.model.config import MIXER_SECTIONS, ContextConfig, FullAttentionConfig, ModelConfig

WIDTH, HEADS, BLOCK, MOST_LAYERS, MOST_BLOCKS = 32, 2, 8, 4, 16
VOCABULARY, STATES, SSM_STATE = 61, 4, 4


def shrink(recipe: Recipe, unit: int, rows: int) -> Recipe:
    """Return the small copy, with `rows` sequences per step. The blocks of a sequence can be divided into `unit` equal
    parts: one for every sequence-parallel rank and slice.

    Lengths in tokens keep their ratio to the block, up to 16 blocks. The order of layers is kept, up to 4 layers.
    """
    data = recipe.model_dump(mode="json")
    data["model"] |= _model(recipe.model)
    blocks = min(max(recipe.train.sequence_length // recipe.model.block, unit), max(MOST_BLOCKS, unit))
    data["train"] |= {"sequence_length": -(-blocks // unit) * unit * BLOCK, "sequences": rows, "micro_sequences": 1}
    data["train"] |= {"length_changes": [], "slice_tokens": None, "edges": "device", "edges_every": 1}
    data["parallel"] |= {"sp": 1}
    return parse(Recipe, data)


def small_buckets(strategy: dict[str, Any]) -> dict[str, Any]:
    """Return a DeepSpeed strategy in which the small model fills several buckets, and ZeRO-3 shards all parameters."""
    sizes = {
        "reduce_bucket_size": 8192,
        "allgather_bucket_size": 8192,
        "stage3_prefetch_bucket_size": 4096,
        "stage3_param_persistence_threshold": 0,
    }
    return {**strategy, "zero_optimization": {**strategy.get("zero_optimization", {}), **sizes}}


def _model(model: ModelConfig) -> dict[str, Any]:
    depth, heads = min(model.depth, MOST_LAYERS), min(model.heads, HEADS)
    context = model.context.model_dump(mode="json")
    if model.context.variant == "MF":
        context["states"] = min(model.context.states, STATES)
    if model.context.ssm_width is not None:
        context["ssm_width"] = max(1, model.context.ssm_width * WIDTH // model.width)
    return {
        "width": WIDTH,
        "heads": heads,
        "head_width": model.head_width and max(2, model.inner * WIDTH // model.width // heads // 2 * 2),
        "ffn": max(1, model.ffn * WIDTH // model.width),
        "block": BLOCK,
        "depth": depth,
        "placement": _placement(model, depth),
        "vocab_size": VOCABULARY,
        "attention": _attention(model, heads),
        **_sections(model, context),
    }


def _attention(model: ModelConfig, heads: int) -> dict[str, Any]:
    """Return the attention section. About as many query heads share a key and value head as in the full model."""
    shared = math.gcd(heads, model.heads // model.kv_heads)
    return model.attention.model_dump(mode="json") | (
        {} if model.attention.kv_heads is None else {"kv_heads": heads // shared}
    )


def _sections(model: ModelConfig, context: dict[str, Any]) -> dict[str, Any]:
    """Return the sections that a layer of the model reads. Others would be reported as having no effect."""
    sizes = {
        "context": context,
        "ssm": _kernel(model, context),
        "transformer_xl": {"window": max(1, model.transformer_xl.window // model.block) * BLOCK},
        "block_recurrent": {"states": max(1, model.block_recurrent.states * BLOCK // model.block)},
        "gss": {"reduce": math.gcd(model.gss.reduce, WIDTH)},
        "mamba2": _mamba2(model),
        "full": {"longest": max(model.full.longest, FullAttentionConfig().longest)},
        "gated_deltanet": _recurrence(model.gated_deltanet, model.block),
    }
    used = {section for mixer in model.mixers() for section in MIXER_SECTIONS[mixer]}
    return {section: size for section, size in sizes.items() if section in used}


def _placement(model: ModelConfig, depth: int) -> list[int] | str:
    """Return the places at the same fractions of the depth, and keep a filler layer if there was one."""
    if model.placement == "all":
        return "all"
    places = sorted({place * depth // model.depth for place in model.placement})
    return places[1:] if len(places) == depth > len(set(model.placement)) * depth / model.depth else places


def _mamba2(model: ModelConfig) -> dict[str, Any]:
    data = _recurrence(model.mamba2, model.block)
    return data | {"head": math.gcd(model.mamba2.head, model.mamba2.expand * WIDTH)}


def _kernel(model: ModelConfig, context: dict[str, Any]) -> dict[str, Any]:
    """Return the section `ssm`. Its heads divide the SSM's width in each mixer that has one; `context`: as shrunk."""
    data = _recurrence(model.ssm, model.block)
    if "head" in data:
        data["head"] = math.gcd(data["head"], WIDTH, parse(ContextConfig, context).width(WIDTH))
    return data


def _recurrence(settings: Config, block: int) -> dict[str, Any]:
    """Return the settings of an SSM or another recurrence: a small state, lengths and time scales in blocks."""
    data = settings.model_dump(mode="json")
    if "state" in data:
        data["state"] = min(data["state"], SSM_STATE)
    if "chunk" in data:  # a power of two, so that it divides the block; at least 2 tokens
        data["chunk"] = 2 ** max(1, int(math.log2(min(BLOCK, max(1, data["chunk"] * BLOCK // block)))))
    if "convolution" in data:
        data["convolution"] = min(data["convolution"], BLOCK + 1)
    for step in {"dt_min", "dt_max"} & data.keys():  # keep the time scales in blocks, so that the carried state matters
        data[step] = min(1.0, data[step] * block / BLOCK)
    if "length" in data:
        data["length"] = max(1, data["length"] * BLOCK // block)
    return data
