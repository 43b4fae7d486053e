"""List every model at the sizes of a recipe: parameters, FLOPs and carried state.

    bst models launch/recipes/paper/small-bst-sh.yaml
    bst models launch/recipes/paper/small-bst-sh.yaml model.width=512 model.heads=4

The first row is the recipe's own model; the others have the same width, heads, feed-forward network, block, depth,
vocabulary and placement. Chunks and heads of SSMs are reduced where they do not divide the block or the width; a model
that cannot be built all the same is named with the reason. Nothing is trained and no weights are allocated. Without
model.vocab_size, the recipe's corpus must exist, to give it.

FLOPs are per token of a forward pass, averaged over the recipe's sequence length; training takes three times as many.
The state is what one sequence carries to the next, in the recipe's precision.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bst_base.settings import ConfigError, parse
from bst_base.terminal import Sheet, print_table
from bst_dist.config import load_recipe, with_vocabulary
from bst_dist.model.config import ContextConfig, ModelConfig, SSDConfig, SSMConfig
from bst_dist.model.layers import FeedForward, Layer
from bst_dist.model.ssm.kernels import KERNELS
from bst_dist.model.ssm.selective import Decays
from bst_dist.parallel.sequence.past import EarlierCall
from bst_dist.plan.flops import forward_flops
from data_pipeline.serve.loader import open_corpora

SHARED = ("width", "heads", "head_width", "ffn", "activation", "block", "depth", "vocab_size", "tied", "attention")
"""Settings that every listed model takes from the recipe."""
KINDS = ("embedding", "attention", "ssm", "ffn", "norm")
SHOWN = ("attention", "ssm")
"""Kinds of parameters with a column; the other counts are the same in all models."""


@dataclass(frozen=True)
class Entry:
    """Counts of one listed model."""

    name: str
    parameters: dict[str, int]
    """Number of parameters by kind. `ssm` is an SSM kernel, or the decays and steps of a selective recurrence (Mamba-2,
    Gated DeltaNet). `attention` is everything else in a mixer: projections, short convolutions, biases, scales, a
    recurrent state. `embedding` includes the head."""
    total_parameters: int
    forward_flops_per_token: dict[str, float]
    """FLOPs by term."""
    total_forward_flops_per_token: float
    state_bytes: int
    """Bytes that one sequence carries to the next."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe, YAML, or the name of one of launch/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the list, and return every count."""
    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.model.vocab_size is None:
        recipe = with_vocabulary(recipe, open_corpora(recipe.data))
    length = recipe.train.sequence_length
    configs = {recipe.name: recipe.model, **catalogue(recipe.model, length)}
    refused = {name: str(found) for name, found in _read(recipe.model, length) if isinstance(found, ConfigError)}
    half = recipe.train.precision == "bf16"
    entries = [entry(name, config, length, half) for name, config in configs.items()]
    _print(entries, recipe.model, length)
    for problem in refused.values():
        print(f"not listed: {problem}")
    models = [asdict(each) for each in entries]
    return {"recipe": recipe.name, "sequence_length_tokens": length, "models": models, "refused": refused}


def catalogue(config: ModelConfig, length: int) -> dict[str, ModelConfig]:
    """Return every model that can be built at the sizes of `config`, by name; filters have `length` taps."""
    return {name: found for name, found in _read(config, length) if isinstance(found, ModelConfig)}


def _read(config: ModelConfig, length: int) -> Iterator[tuple[str, ModelConfig | ConfigError]]:
    """Yield the name of each model and its settings, or why it cannot be built at these sizes."""
    shared = config.model_dump(include=set(SHARED))
    for name, rest in _models(config, length):
        try:
            yield name, parse(ModelConfig, {**shared, **rest}, name)
        except ConfigError as error:
            yield name, error


def _chunk(chunk: int, block: int) -> int:
    """Return the chunk of a recurrence, or the largest part of it that divides the block if it does not fit."""
    return math.gcd(chunk, block) if chunk < block else chunk


def _models(config: ModelConfig, length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each model and its settings beyond the shared ones."""
    s4d = (config.ssm if config.ssm.kernel == "s4d" else SSMConfig()).model_dump()
    s4d["chunk"] = _chunk(s4d["chunk"], config.block)
    dplr = {"kernel": "s4-dplr"} | {key: s4d[key] for key in ("state", "dt_min", "dt_max", "chunk")}
    filters = [{"kernel": kernel, "length": length} for kernel in ("explicit", "hyena")]
    placed = {"placement": config.placement}
    for variant in ("SH", "MH", "MF"):
        context = {"variant": variant, "states": config.context.states}
        for ssm in (s4d, dplr, *filters):
            yield f"BST {variant} {ssm['kernel']}", {"mixer": "bst", **placed, "context": context, "ssm": ssm}
    ssd = {"kernel": "ssd", "head": math.gcd(16, ContextConfig().width(config.width) or 16)}
    ssd["chunk"] = _chunk(SSDConfig(kernel="ssd").chunk, config.block)
    yield "BST SH ssd", {"mixer": "bst", **placed, "context": {"variant": "SH"}, "ssm": ssd}
    yield "BST SH, no SSM", {"mixer": "bst", **placed, "ssm": {"kernel": "none"}}
    for variant in ("SH", "MF"):
        context = {"variant": variant, "states": config.context.states}
        joint = {"mixer": "bst-joint", **placed, "context": context, "ssm": s4d}
        yield f"BST {variant}, one softmax", joint
    yield "BST SH, no cross", {"mixer": "bst-no-cross", **placed, "ssm": s4d}
    yield "sliding window", {"mixer": "sliding"}
    window = config.transformer_xl.window
    window = window if window % config.block == 0 else 4 * config.block
    yield f"Transformer-XL {window}", {"mixer": "transformer-xl", "transformer_xl": {"window": window}}
    recurrent = {"mixer": "block-recurrent", "block_recurrent": {"states": config.block}}
    yield "Block-Recurrent", {**recurrent, "placement": [config.depth * 3 // 4]}
    hybrid = [place for place in range(config.depth) if place % 4 != 3]
    gss = {"gate": config.gss.gate, "reduce": math.gcd(config.gss.reduce, config.width)}
    gss_ssm = {"state": 512, "chunk": _chunk(128, config.block)}
    yield "GSS hybrid", {"mixer": "gss", "placement": hybrid, "gss": gss, "ssm": gss_ssm}
    mamba2 = {"head": math.gcd(64, 2 * config.width), "chunk": _chunk(config.mamba2.chunk, config.block)}
    yield "Mamba-2 hybrid", {"mixer": "mamba2", "placement": hybrid, "mamba2": mamba2}
    deltanet = {"chunk": _chunk(config.gated_deltanet.chunk, config.block)}
    yield "Gated DeltaNet hybrid", {"mixer": "gated-deltanet", "placement": hybrid, "gated_deltanet": deltanet}
    yield "pure SSM", {"mixer": "ssm", "ssm": s4d}
    yield "full attention", {"mixer": "full", "full": {"longest": max(length, config.full.longest)}}


def entry(name: str, config: ModelConfig, length: int, half: bool = False) -> Entry:
    """Return the counts of one model for sequences of `length` tokens; `half`: trained in bf16."""
    table = config.width * (config.vocab_size or 0)
    parameters = Counter({"embedding": table if config.tied else 2 * table, "norm": config.width})
    state = 0
    for mixer, layers in Counter(config.mixers()).items():
        with FakeTensorMode():  # tensors without storage: a layer of any size takes no memory and computes nothing
            layer = Layer(mixer, config)
            state += layers * carried_bytes(layer, config.width, length, half)
        parameters.update({kind: layers * count for kind, count in parameters_by_kind(layer).items()})
    flops = forward_flops(config, length)
    counts = {kind: parameters[kind] for kind in KINDS}
    return Entry(name, counts, sum(counts.values()), flops, sum(flops.values()), state)


def parameters_by_kind(layer: Layer) -> Counter[str]:
    """Return the number of a layer's parameters by kind."""
    counts: Counter[str] = Counter()

    def walk(module: nn.Module, kind: str) -> None:
        kind = _kind(module) or kind
        counts[kind] += sum(p.numel() for p in module.parameters(recurse=False))
        for child in module.children():
            walk(child, kind)

    walk(layer, "attention")
    return counts


def _kind(module: nn.Module) -> str | None:
    """Return the kind of this module's parameters; None: the same kind as its parent."""
    if isinstance(module, (*KERNELS.values(), Decays)):
        return "ssm"
    return {FeedForward: "ffn", nn.RMSNorm: "norm"}.get(type(module))


def carried_bytes(layer: Layer, width: int, length: int, half: bool) -> int:
    """Return the bytes that one sequence of `length` tokens leaves in a layer for the next sequence."""
    past = EarlierCall()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        layer(torch.zeros(1, length, width), past)
    return sum(tensor.nbytes for tensor in past.after.values())


def _print(entries: list[Entry], config: ModelConfig, length: int) -> None:
    heads = f"{config.heads} heads of {config.head}"
    network = f"M {config.ffn} ({config.activation})"
    sizes = f"{config.depth} layers, D {config.width}, {heads}, {network}, W {config.block}"
    title = f"{sizes}, vocabulary {config.vocab_size}, L {length}"
    units = "parameters in millions; of a forward pass, MFLOP per token; KiB carried per sequence"
    rows = []
    for each in entries:
        counts = [each.total_parameters, *(each.parameters[kind] for kind in SHOWN)]
        flops, state = each.total_forward_flops_per_token / 1e6, each.state_bytes / 1024
        rows.append([each.name, *(f"{count / 1e6:,.2f}" for count in counts), f"{flops:,.1f}", f"{state:,.0f}"])
    print_table(Sheet(("model", "parameters", *SHOWN, "MFLOP", "KiB"), rows), title, units)
