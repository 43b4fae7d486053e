"""The loss increase of an intervention: losses with and without it on the same documents, by position.

Shapes: n documents, P bins of the position in the document, Q bins of the position in the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bst_dist.model.lm import LanguageModel
from bst_dist.study.ablation.interventions import Intervention, intervened
from bst_dist.study.evaluation.scoring import Documents, bits_per_byte, reported, score_slices, streams
from bst_dist.study.statistics import Estimate, ratio

IN_BLOCK = 16
"""Number of bins of the position in a block; smaller blocks have one bin per token."""


@dataclass(frozen=True)
class Text:
    """Beginnings of documents to predict."""

    corpus: Documents
    lengths: np.ndarray
    """(n,) number of tokens to read from the beginning of each document of the corpus; 0 leaves a document out."""
    token_bytes: np.ndarray
    """(V,) bytes of text of each id."""
    begin: int | None
    """The token before a document's first token; None if the first is not predicted (isolated or masked documents)."""

    @property
    def predicted(self) -> np.ndarray:
        """(n,) number of tokens to predict of each document."""
        return np.maximum(self.lengths.astype(np.int64) - (self.begin is None), 0)

    @property
    def tokens(self) -> int:
        """Number of tokens to predict."""
        return int(self.predicted.sum())


@dataclass(frozen=True)
class Losses:
    """Sums over tokens."""

    document_edges: np.ndarray
    """(P + 1,) edges of the bins of the position in a document, in tokens."""
    block_edges: np.ndarray
    """(Q + 1,) edges of the bins of the position in a block, in tokens; they end with the longest document."""
    nats: np.ndarray
    """(n, P)"""
    nats_in_block: np.ndarray
    """(n, Q)"""
    tokens: np.ndarray
    """(n, P)"""
    tokens_in_block: np.ndarray
    """(n, Q)"""
    bytes: np.ndarray
    """(n,)"""


@dataclass(frozen=True)
class Increase:
    """The loss increase of an intervention in some layers over the unchanged model.

    In nats per token, except `bits_per_byte`.
    """

    intervention: Intervention
    layers: Sequence[int]
    loss: Estimate
    bits_per_byte: Estimate | None
    """None if the ids stand for no text."""
    in_document: list[Estimate]
    """(P,)"""
    in_block: list[Estimate]
    """(Q,)"""

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report."""
        return {
            "intervention": str(self.intervention),
            "layers": list(self.layers),
            **self.loss.report("loss_increase_nats_per_token"),
            **reported(self.bits_per_byte, "bits_per_byte_increase"),
            "by_place_in_document": [place.report("loss_increase_nats_per_token") for place in self.in_document],
            "by_place_in_block": [place.report("loss_increase_nats_per_token") for place in self.in_block],
        }


@dataclass(frozen=True)
class Ablation:
    """The loss of the unchanged model on one text, and the increases of all interventions."""

    documents: int
    tokens: int
    bytes: int
    loss: Estimate
    """Loss of the unchanged model in nats per token."""
    bits_per_byte: Estimate | None
    """None if the ids stand for no text."""
    document_edges: list[int]
    """(P + 1,) tokens"""
    tokens_in_document: list[int]
    """(P,)"""
    in_document: list[Estimate]
    """(P,) nats per token of the unchanged model."""
    block_edges: list[int]
    """(Q + 1,) tokens"""
    in_block: list[Estimate]
    """(Q,)"""
    increases: list[Increase]
    time_s: float

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            **self.loss.report("loss_nats_per_token"),
            **reported(self.bits_per_byte, "bits_per_byte"),
            "places_in_document": self.document_edges,
            "tokens_in_document": self.tokens_in_document,
            "loss_in_document": [place.report("loss_nats_per_token") for place in self.in_document],
            "places_in_block": self.block_edges,
            "loss_in_block": [place.report("loss_nats_per_token") for place in self.in_block],
            "interventions": [increase.report() for increase in self.increases],
            "time_s": self.time_s,
        }


def document_bins(longest: int, block: int) -> np.ndarray:
    """Return (P + 1,) bin edges of the position in a document, in tokens: block 0, 1, 2-3, 4-7, ..."""
    edges = [0, block]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return np.array(edges)


def block_bins(block: int) -> np.ndarray:
    """Return (Q + 1,) bin edges of the position in a block, in tokens."""
    bins = min(IN_BLOCK, block)
    return np.arange(bins + 1) * block // bins


def losses(
    model: LanguageModel,
    text: Text,
    slice_length: int,
    precision: str,
    progress: Callable[[int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Losses | None:
    """Score the text with the model as it is; return None once `stopped` is true. `progress` gets the tokens done."""
    block, done = model.config.block, 0
    longest = int(text.predicted.max())
    edges, edges_in_block = document_bins(longest, block), block_bins(min(block, longest))
    shapes = (len(text.lengths), len(edges) - 1), (len(text.lengths), len(edges_in_block) - 1)
    found = Losses(
        edges,
        edges_in_block,
        *map(np.zeros, shapes),
        *(np.zeros(shape, np.int64) for shape in shapes),
        np.zeros(len(text.lengths), np.int64),
    )
    pieces = streams(text.lengths, None, first=int(text.begin is None))
    for part in score_slices(
        model, text.corpus, pieces, begin=text.begin, slice_length=slice_length, precision=precision
    ):
        documents = [stream.document for stream in part.streams]
        there = part.labels >= 0
        at = part.offset + np.arange(part.labels.shape[1])  # index of each predicted token in its stream
        for place, bins, nats, tokens in (
            (at, edges, found.nats, found.tokens),
            (at % block, edges_in_block, found.nats_in_block, found.tokens_in_block),
        ):
            membership = _membership(place, bins)
            np.add.at(nats, documents, part.nats @ membership)
            np.add.at(tokens, documents, there @ membership)
        np.add.at(found.bytes, documents, np.where(there, text.token_bytes[part.labels], 0).sum(1))
        done += int(there.sum())
        progress(done)
        if stopped():
            return None
    return found


def _membership(place: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return an indicator (l, bins) of the bin of each token."""
    bins = np.searchsorted(edges, place, side="right") - 1
    return (bins[:, None] == np.arange(len(edges) - 1)).astype(np.int64)


def increase(intervention: Intervention, layers: Sequence[int], with_it: Losses, without: Losses) -> Increase:
    """Return the increase from the losses with and without an intervention, paired by document."""
    read = without.tokens.sum(1) > 0
    more, tokens = (with_it.nats - without.nats).sum(1)[read], without.tokens.sum(1)[read]
    return Increase(
        intervention,
        layers,
        ratio(more, tokens),
        bits_per_byte(more, without.bytes[read]),
        by_place(with_it.nats - without.nats, without.tokens),
        by_place(with_it.nats_in_block - without.nats_in_block, without.tokens_in_block),
    )


def by_place(nats: np.ndarray, tokens: np.ndarray) -> list[Estimate]:
    """Return nats per token of each bin, from sums (n, bins). Documents without a token in a bin are left out there."""
    there = tokens > 0
    return [ratio(nats[there[:, i], i], tokens[there[:, i], i]) for i in range(tokens.shape[1])]


def summary(untouched: Losses, increases: list[Increase], time_s: float) -> Ablation:
    """Return all results on a text."""
    tokens, nats = untouched.tokens.sum(1), untouched.nats.sum(1)
    read = tokens > 0
    return Ablation(
        int(read.sum()),
        int(tokens.sum()),
        int(untouched.bytes.sum()),
        ratio(nats[read], tokens[read]),
        bits_per_byte(nats[read], untouched.bytes[read]),
        untouched.document_edges.tolist(),
        untouched.tokens.sum(0).tolist(),
        by_place(untouched.nats, untouched.tokens),
        untouched.block_edges.tolist(),
        by_place(untouched.nats_in_block, untouched.tokens_in_block),
        increases,
        time_s,
    )


def ablate(
    model: LanguageModel,
    text: Text,
    planned: Sequence[tuple[Intervention, Sequence[int]]],
    *,
    slice_length: int,
    precision: str = "fp32",
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Losses, list[Increase]]:
    """Return the losses of the unchanged model, and the increase by each intervention.

    Args:
        model: the model, on the device where it is to run.
        planned: interventions, each with its layers.
        slice_length: tokens per row and forward pass, a multiple of the block.
        seed: seed of the noise and the shuffling.
        progress: called with the number of tokens done, over all passes.
        stopped: called after each forward pass of an intervention. If it returns True, this and all later interventions
            are left out.
    """
    model.eval()
    untouched = losses(model, text, slice_length, precision, progress)
    found = []
    for number, (intervention, layers) in enumerate(planned, start=1):
        with intervened(model, intervention, layers, seed):
            told = partial(_beyond, progress, number * text.tokens)
            changed = losses(model, text, slice_length, precision, told, stopped)
        if changed is None:
            break
        found.append(increase(intervention, layers, changed, untouched))
    return untouched, found


def _beyond(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)
