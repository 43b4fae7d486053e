"""The loss of whole documents, streamed through a model slice by slice with its carried state.

Memory does not grow with the length of a document: only the model's state passes from slice to slice. Documents of
similar length share a batch, and a finished row leaves its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from bst_dist.model.config import MIXER_SECTIONS, FilterConfig, ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.past import EarlierCall, State
from bst_dist.study.statistics import Estimate, ratio

TOKENS_AT_ONCE = 16_384
"""Maximum number of tokens per forward pass, over all rows of its batch, unless `rows` is given."""


def filter_length(model: ModelConfig) -> int | None:
    """Return the length of the model's unstructured kernel, in inputs; None if no layer has one."""
    reads_ssm = any("ssm" in MIXER_SECTIONS[mixer] for mixer in model.mixers())
    return model.ssm.length if reads_ssm and isinstance(model.ssm, FilterConfig) else None


class Documents(Protocol):
    """The part of a corpus that is used here. `data_pipeline.serve.reader.Corpus` implements it."""

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start:stop`` of a document."""


class Stream(NamedTuple):
    """Consecutive tokens to predict. For the first of them the context is only the one token before it."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class ScoredSlice(NamedTuple):
    """The result of one forward pass over l tokens from `offset` on of each of b streams."""

    streams: list[Stream]
    """(b,)"""
    offset: int
    """Number of tokens of each stream before the slice."""
    labels: np.ndarray
    """(b, l) int64, the predicted tokens; -1 after the end of a stream."""
    nats: np.ndarray
    """(b, l) float64, the loss of each token; 0 after the end of a stream."""


@dataclass(frozen=True)
class Score:
    """Sums for each document under a model; all (n,)."""

    nats: np.ndarray
    """Negative log-likelihood in nats."""
    tokens: np.ndarray
    """Number of predicted tokens, including the end of the document."""
    bytes: np.ndarray
    """Number of UTF-8 bytes of the text of these tokens."""

    def of(self, documents: np.ndarray) -> Score:
        """Return the scores of the documents selected by a mask (n,) bool."""
        return Score(self.nats[documents], self.tokens[documents], self.bytes[documents])


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray) -> Estimate | None:
    """Return the bits per byte of documents of `sizes` (n,) bytes; None if their ids stand for no text."""
    return ratio(nats / np.log(2), sizes) if sizes.sum() else None


def reported(found: Estimate | None, name: str) -> dict[str, float | None]:
    """Return the entries of `Estimate.report`, both null if there is no estimate."""
    return Estimate(None, None).report(name) if found is None else found.report(name)


def streams(lengths: np.ndarray, context: int | None, first: int) -> list[Stream]:
    """Return each document from token `first` on as one stream, or as independent streams of `context` tokens."""
    found = []
    for document, length in enumerate(np.asarray(lengths).tolist()):
        step = context or max(1, length)
        found += [Stream(document, at, min(at + step, length)) for at in range(first, length, step)]
    return found


def score(
    model: LanguageModel,
    corpus: Documents,
    lengths: np.ndarray,
    token_bytes: np.ndarray,
    *,
    begin: int | None,
    context: int | None = None,
    slice_length: int,
    precision: str = "fp32",
    rows: int | None = None,
    part: int = 0,
    parts: int = 1,
    progress: Callable[[int], None] = lambda tokens: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Score:
    """Score documents 0 to n-1, or one reader's share of them. Documents of other readers have sums of 0.

    Args:
        model: the model, on the device where it is to run.
        corpus: the source of the documents' tokens.
        lengths: (n,) number of tokens to score from the beginning of each document; the whole length includes the end
            symbol.
        token_bytes: (V,) bytes of text of each id.
        begin: the token before a document's first token, which is the end of another document. None for a model of
            isolated or masked documents, which has never seen such a token: the first token then costs ``ln V``, a
            uniform guess.
        context: number of tokens after which the model forgets, a multiple of the block; None: no limit.
        slice_length: tokens per row and forward pass, a multiple of the block.
        precision: fp32, or bf16 for autocast.
        rows: maximum number of rows per forward pass; None: as many as TOKENS_AT_ONCE allows.
        part: index of this reader.
        parts: number of readers. Each document is read by one of them.
        progress: called with the number of tokens that this reader has scored so far.
        stopped: called after each forward pass. If it returns True, the rest is not read, and `Score.tokens` of
            unfinished documents is less than their length.
    """
    model.eval()
    own = np.zeros(len(lengths), bool)
    own[np.argsort(-np.asarray(lengths, np.int64), kind="stable")[part::parts]] = True  # all parts get similar lengths
    nats, tokens, sizes = np.zeros(len(lengths)), np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    if begin is None:
        nats[own] = np.log(len(token_bytes))
        tokens[own] = 1
        sizes[own] = [token_bytes[corpus.tokens(document, 0, 1)[0]] for document in np.flatnonzero(own).tolist()]
    found = [stream for stream in streams(lengths, context, int(begin is None)) if own[stream.document]]
    for read in score_slices(
        model, corpus, found, begin=begin, slice_length=slice_length, precision=precision, rows=rows
    ):
        documents, there = [stream.document for stream in read.streams], read.labels >= 0
        np.add.at(nats, documents, read.nats.sum(1))
        np.add.at(tokens, documents, there.sum(1))
        np.add.at(sizes, documents, np.where(there, token_bytes[read.labels], 0).sum(1))
        progress(int(tokens.sum()))
        if stopped():
            break
    return Score(nats, tokens, sizes)


def score_slices(
    model: LanguageModel,
    corpus: Documents,
    found: list[Stream],
    *,
    begin: int | None,
    slice_length: int,
    precision: str = "fp32",
    rows: int | None = None,
) -> Iterator[ScoredSlice]:
    """Yield the scores of every token of the streams, slice by slice; arguments as for `score`.

    Memory holds one slice of each row of a batch (TOKENS_AT_ONCE tokens, unless `rows` is given) and the state that the
    model carries from one slice to the next.
    """
    block = model.config.block
    for batch in _batches(found, slice_length, block, rows):
        state: State = {}
        for offset, ids, labels in _slices(corpus, batch, begin, slice_length, block):
            past = model.carry({name: tensor[: len(ids)] for name, tensor in state.items()}, offset)
            nats = _forward(model, ids, labels, past, precision)
            state = past.after
            yield ScoredSlice(batch[: len(ids)], offset, labels, nats)


def _forward(
    model: LanguageModel, ids: np.ndarray, labels: np.ndarray, past: EarlierCall, precision: str
) -> np.ndarray:
    """Return the nats of each label, (b, l)."""
    device = next(model.parameters()).device
    inputs, targets = torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses = model(inputs, targets.clamp(min=0), targets >= 0, past=past)
    return losses.per_token.double().cpu().numpy()


def _batches(found: list[Stream], slice_length: int, block: int, rows: int | None) -> Iterator[list[Stream]]:
    """Yield the streams, longest first, in groups of `rows` or of TOKENS_AT_ONCE tokens per forward pass."""
    found = sorted(found, key=len, reverse=True)
    at = 0
    while at < len(found):
        width = min(slice_length, _whole_blocks(len(found[at]), block))
        size = rows or max(1, TOKENS_AT_ONCE // width)
        yield found[at : at + size]
        at += size


def _slices(
    corpus: Documents, batch: list[Stream], begin: int | None, slice_length: int, block: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (offset, input ids, labels) of each slice of a batch; the arrays are (b, l), with label -1 after an end.

    The batch is ordered longest first, so the unfinished rows are the first b.
    """
    for offset in range(0, len(batch[0]), slice_length):
        running = [stream for stream in batch if len(stream) > offset]
        width = min(slice_length, _whole_blocks(len(running[0]) - offset, block))
        ids, labels = np.zeros((len(running), width), np.int64), np.full((len(running), width), -1)
        for row, stream in enumerate(running):
            at = stream.start + offset
            stop = min(at + width, stream.stop)
            tokens = corpus.tokens(stream.document, max(0, at - 1), stop).astype(np.int64)
            if at == 0:
                tokens = np.concatenate(([begin], tokens))
            ids[row, : stop - at], labels[row, : stop - at] = tokens[:-1], tokens[1:]
        yield offset, ids, labels


def _whole_blocks(tokens: int, block: int) -> int:
    return -(-tokens // block) * block
