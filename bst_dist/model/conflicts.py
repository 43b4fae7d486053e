"""Settings with which a mixer cannot be built. They are found when a recipe is read, before any layer exists.

Only sections that a layer reads are checked, so that one recipe can have settings for several mixers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

LayerConfig: TypeAlias = Any
"""`bst_dist.model.config.LayerConfig`, which imports this module."""


def conflict(config: LayerConfig, mixers: set[str], sections: set[str]) -> str | None:
    """Return why a layer cannot be built, with the setting and the remedy; None if all layers can.

    Args:
        mixers: those of the model's layers.
        sections: the settings sections that these mixers read.
    """
    for section in sections & CHUNKED:
        chunk = min(getattr(config, section).chunk, config.block)
        if config.block % chunk:
            fitting = math.gcd(chunk, config.block)
            return f"{section}.chunk ({chunk}) must divide block ({config.block}): set it to {fitting}"
    for mixer in mixers & CONFLICTS.keys():
        if found := next(CONFLICTS[mixer](config), None):
            return found
    return None


def _bst(config: LayerConfig) -> Iterator[str]:
    context, channels = config.context, config.context.width(config.width)
    if channels == 0:
        yield (
            f"context.ssm_width: its default is a fraction of the width, and width {config.width} is too small for one "
            "channel: set context.ssm_width, or raise width"
        )
    if config.ssm.kernel == "ssd":
        if context.variant == "MF":
            yield (
                "ssm.kernel ssd has one state for all read-outs: context.variant must be SH or MH, or ssm.kernel "
                "another one"
            )
        yield from _indivisible("ssm.head", config.ssm.head, "the SSM's width", channels)


def _joint(config: LayerConfig) -> Iterator[str]:
    if config.context.attend == "previous":
        yield (
            "bst-joint: context.attend must be current: a block has no states where none came before; set it to "
            "current, or mixer to bst"
        )
    yield from _bst(config)


def _pure_ssm(config: LayerConfig) -> Iterator[str]:
    if config.ssm.kernel == "ssd":
        yield from _indivisible("ssm.head", config.ssm.head, "the SSM's width", config.width)


def _gss(config: LayerConfig) -> Iterator[str]:
    if config.ssm.kernel != "s4d":
        yield f"gss shares the modes of a diagonal SSM: ssm.kernel must be s4d, not {config.ssm.kernel}"
    if config.width % config.gss.reduce:
        fitting = math.gcd(config.width, config.gss.reduce)
        yield f"gss.reduce ({config.gss.reduce}) must divide width ({config.width}): set it to {fitting}"


def _mamba2(config: LayerConfig) -> Iterator[str]:
    inner = config.mamba2.expand * config.width
    yield from _indivisible("mamba2.head", config.mamba2.head, "mamba2.expand x width", inner)
    yield from _long_convolution("mamba2", config.mamba2.convolution, config.block)


def _gated_deltanet(config: LayerConfig) -> Iterator[str]:
    yield from _long_convolution("gated_deltanet", config.gated_deltanet.convolution, config.block)


def _transformer_xl(config: LayerConfig) -> Iterator[str]:
    window = config.transformer_xl.window
    if window % config.block:
        near = max(1, round(window / config.block)) * config.block
        yield f"transformer_xl.window ({window}) must be a multiple of block ({config.block}): the nearest is {near}"


def _indivisible(name: str, head: int, whole: str, width: int) -> Iterator[str]:
    if width % head:
        yield f"{name} {head} must divide {whole}, {width}: set it to {math.gcd(head, width)}"


def _long_convolution(section: str, taps: int, block: int) -> Iterator[str]:
    if taps > block + 1:
        yield f"{section}.convolution {taps} reaches further back than a block, {block}: at most {block + 1}"


CHUNKED = {"ssm", "mamba2", "gated_deltanet"}
"""Sections of a recurrence that is computed in chunks."""
CONFLICTS: dict[str, Callable[[LayerConfig], Iterator[str]]] = {
    "bst": _bst,
    "bst-no-cross": _bst,
    "bst-joint": _joint,
    "ssm": _pure_ssm,
    "gss": _gss,
    "mamba2": _mamba2,
    "gated-deltanet": _gated_deltanet,
    "transformer-xl": _transformer_xl,
}
"""For each mixer with sections of its own, a function that yields its conflicts."""
