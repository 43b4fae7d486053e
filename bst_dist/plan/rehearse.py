"""Dry run of sequence parallelism: the bytes that a rank will send, and errors for layers that cannot be sliced.

The real layers run on fake tensors, with a group that only counts messages. So the counts always match the code.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bst_dist.model.config import FilterConfig, ModelConfig
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.neighbour import LeftNeighbour, SequenceParallelError
from bst_dist.parallel.sequence.past import EarlierCall
from bst_dist.parallel.sequence.rehearsal import Rehearsal

ONCE = ("documents", "begins")
"""Kinds of messages sent once per forward call for all layers: where masked documents begin."""

MOST_BLOCKS = 16
"""Longest slice of the dry run, in blocks, tried first: the bytes sent do not depend on the length."""


def rehearse(
    model: ModelConfig,
    sp: int,
    rows: int,
    slice_length: int,
    bf16: bool = False,
    documents: str = "joined",
    run_again: bool = False,
    stream: bool = False,
) -> dict[str, int]:
    """Return the bytes, by kind, that a rank with two neighbours sends for one micro-batch, forward and backward.

    Args:
        rows: sequences of the micro-batch.
        slice_length: tokens of a slice, l = L / sp.
        documents: as `data.documents`; with isolated or masked documents, each row has its own transitions.
        run_again: whether every layer is recomputed in the backward pass.
        stream: whether the sequence continues an earlier step or slice.

    Raises:
        SequenceParallelError: a layer needs more than its left neighbour has, or a state that cannot be passed on.
    """
    _require_segments(model, slice_length, documents)
    # A filter longer than its slice uses all-to-alls, whose bytes grow with the length; other bytes do not.
    grows = isinstance(model.ssm, FilterConfig)
    short = slice_length if grows else min(slice_length, MOST_BLOCKS * model.block)
    sent: Counter[str] = Counter()
    for mixer, layers in Counter(model.mixers()).items():
        one = model.model_copy(update={"depth": 1, "mixer": mixer, "placement": "all", "vocab_size": 1})
        try:
            kinds = _one_layer(one, sp, rows, short, bf16, documents, stream)
        except SequenceParallelError:  # it may work with the real, longer slices
            kinds = _one_layer(one, sp, rows, slice_length, bf16, documents, stream)
        for kind, count in kinds.items():
            passes = 2 if run_again and not kind.endswith(" gradient") else 1
            if kind in ONCE:
                sent[kind] = count
                continue
            sent[kind] += layers * passes * count
    return dict(sent)


def _require_segments(model: ModelConfig, slice_length: int, documents: str) -> None:
    """Raise SequenceParallelError if slices do not fit Transformer-XL.

    It stops gradients between segments, so slices must not cut a segment. It also attends several blocks back, so it
    supports only joined documents.
    """
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
    """Return a layer's `starts` argument for rows in which no document begins; `documents`: as `data.documents`."""
    if documents == "masked":
        return Borders.none(rows, length)
    return torch.zeros(rows, length // block, dtype=torch.bool) if documents == "isolated" else None


def _one_layer(
    model: ModelConfig, sp: int, rows: int, length: int, bf16: bool, documents: str, stream: bool
) -> dict[str, int]:
    group = Rehearsal(sp // 2, sp)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ids = torch.zeros(rows, length, dtype=torch.long)
        starts = no_borders(documents, rows, length, model.block)
        past = LeftNeighbour(group, length, EarlierCall() if stream else None)
        LanguageModel(model)(ids, starts=starts, past=past).sum().backward()
    return group.traffic.take()
