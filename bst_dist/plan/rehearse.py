"""Sequence parallelism before the launch: what a rank will send, and what cannot be computed with slices.

The layers themselves run, on fake tensors and with nobody to talk to, so what is told here cannot differ from what
happens later.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bst_dist.model.borders import Borders, Starts
from bst_dist.model.config import FilterConfig, ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.neighbour import LeftNeighbour, SequenceParallelError
from bst_dist.parallel.sequence.past import EarlierCall
from bst_dist.parallel.sequence.rehearsal import Rehearsal

ONCE = ("documents", "begins")
"""What is sent once a call for all layers, by whichever asks first: where masked documents begin."""

MOST_BLOCKS = 16
"""Blocks of a slice that are rehearsed at first: what is sent does not depend on the length."""


def rehearse(model: ModelConfig, sp: int, rows: int, slice_length: int, bf16: bool = False, documents: str = "joined",
             run_again: bool = False, stream: bool = False) -> dict[str, int]:  # fmt: skip
    """Bytes by kind that a rank with neighbours on both sides sends for one micro-batch, forward and backward.

    Args:
        rows: sequences of the micro-batch.
        slice_length: tokens of a slice, l = L / sp.
        documents: as `data.documents`; those that are isolated or masked give each row transitions of its own.
        run_again: whether every layer is run again in the backward pass.
        stream: whether the sequence continues from what came before: in an earlier step, or in an earlier slice.

    Raises:
        SequenceParallelError: a layer needs more than its left neighbour has, or a state that cannot be passed on.
    """
    _require_segments(model, slice_length, documents)
    # A filter longer than its slice is computed by all-to-alls, whose bytes do grow with the length.
    grows = isinstance(model.ssm, FilterConfig)
    short = slice_length if grows else min(slice_length, MOST_BLOCKS * model.block)
    sent: Counter[str] = Counter()
    for mixer, layers in Counter(model.mixers()).items():
        one = model.model_copy(update={"depth": 1, "mixer": mixer, "placement": "all", "vocab_size": 1})
        try:
            kinds = _one_layer(one, sp, rows, short, bf16, documents, stream)
        except SequenceParallelError:  # it may be able to with longer slices
            kinds = _one_layer(one, sp, rows, slice_length, bf16, documents, stream)
        for kind, count in kinds.items():
            passes = 2 if run_again and not kind.endswith(" gradient") else 1
            if kind in ONCE:
                sent[kind] = count
                continue
            sent[kind] += layers * passes * count
    return dict(sent)


def _require_segments(model: ModelConfig, slice_length: int, documents: str) -> None:
    """Transformer-XL stops gradients between segments and sees several blocks back: slices must not cut either."""
    segment = model.transformer_xl.window
    if "transformer-xl" not in model.mixers() or segment == model.block:
        return
    if slice_length % segment:
        raise SequenceParallelError(
            f"a slice of {slice_length} tokens cuts a segment of {segment} (model.transformer_xl.window), through "
            "which no gradient would flow: lower parallel.sp or lengthen train.sequence_length"
        )
    if documents != "joined":
        raise SequenceParallelError(
            f"transformer-xl sees {segment} tokens before a slice, but a rank does not know which documents begin "
            "there: set data.documents to joined, or parallel.sp to 1"
        )


def no_borders(documents: str, rows: int, length: int, block: int) -> Starts | None:
    """What a layer is told of where documents begin, for rows in which none does; `documents`: as `data.documents`."""
    if documents == "masked":
        return Borders.none(rows, length)
    return torch.zeros(rows, length // block, dtype=torch.bool) if documents == "isolated" else None


def _one_layer(model: ModelConfig, sp: int, rows: int, length: int, bf16: bool, documents: str,
               stream: bool) -> dict[str, int]:  # fmt: skip
    group = Rehearsal(sp // 2, sp)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ids = torch.zeros(rows, length, dtype=torch.long)
        starts = no_borders(documents, rows, length, model.block)
        past = LeftNeighbour(group, length, EarlierCall() if stream else None)
        LanguageModel(model)(ids, starts=starts, past=past).sum().backward()
    return group.traffic.take()
