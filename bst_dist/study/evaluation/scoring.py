"""The loss of whole documents, streamed through a model slice by slice with its carried state.

Memory does not grow with a document's length: what crosses from slice to slice is the model's own state. Documents
of similar length share a batch; a row that has come to its end leaves it.
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

TOKENS_AT_ONCE = 16_384
"""Tokens of one forward pass, over all rows of its batch."""


def filter_length(model: ModelConfig) -> int | None:
    """Inputs that an unstructured kernel of the model sees at most; None where no layer has one, so nothing is cut."""
    reads_ssm = any("ssm" in MIXER_SECTIONS[mixer] for mixer in model.mixers())
    return model.ssm.length if reads_ssm and isinstance(model.ssm, FilterConfig) else None


class Documents(Protocol):
    """What is read of a corpus: `data_pipeline.serve.reader.Corpus` is one."""

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start..stop`` of a document."""


class Stream(NamedTuple):
    """A run of tokens to predict in turn; the first of them is predicted with nothing before its input token."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class ScoredSlice(NamedTuple):
    """What one forward pass has found: b streams that run in step, l tokens of each from `offset` on."""

    streams: list[Stream]
    """(b,)"""
    offset: int
    """Tokens of each stream before the slice."""
    labels: np.ndarray
    """(b, l) int64, the tokens predicted; -1 where a stream has come to its end."""
    nats: np.ndarray
    """(b, l) float64, what each cost; 0 there."""


@dataclass(frozen=True)
class Score:
    """What each document costs under a model; all (n,)."""

    nats: np.ndarray
    """Negative log-likelihood."""
    tokens: np.ndarray
    """Tokens predicted, the end of the document among them."""
    bytes: np.ndarray
    """UTF-8 bytes of the text that these tokens stand for."""

    def of(self, documents: np.ndarray) -> Score:
        """Some of the documents: (n,) bool."""
        return Score(self.nats[documents], self.tokens[documents], self.bytes[documents])


def streams(lengths: np.ndarray, context: int | None, first: int) -> list[Stream]:
    """Every document from token `first` on, whole, or in pieces of `context` tokens that forget what came before."""
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
    """Score documents 0 to n-1, or this reader's share of them: the sums of all `parts` readers are the whole.

    Args:
        model: on the device where it is to run.
        corpus: gives the documents' tokens.
        lengths: (n,) tokens of each document, the end symbol included.
        token_bytes: (V,) bytes of text of each id.
        begin: the token that stands before a document's first, the end of another one. None for a model of isolated
            or masked documents, which never sees one there: the first token is charged ``ln V``, a uniform guess.
        context: tokens after which the model forgets, a multiple of the block; None: the whole document is seen.
        slice_length: tokens of a forward pass in one row, a multiple of the block.
        precision: fp32, or bf16 for autocast.
        rows: documents of a forward pass at most; None: as many as TOKENS_AT_ONCE allow.
        part: which of the `parts` readers this is; a document is read by one of them.
        progress: told how many tokens this reader has done.
        stopped: asked after each forward pass; when it says so the rest is not read, and `Score.tokens` of a document
            is less than its length.
    """
    model.eval()
    own = np.zeros(len(lengths), bool)
    own[np.argsort(-np.asarray(lengths, np.int64), kind="stable")[part::parts]] = True  # lengths are alike in all parts
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
    model: LanguageModel, corpus: Documents, found: list[Stream], *, begin: int | None, slice_length: int,
    precision: str = "fp32", rows: int | None = None,
) -> Iterator[ScoredSlice]:  # fmt: skip
    """Every token of the streams once, slice by slice; arguments as for `score`.

    What is held at a time is a slice of each row of a batch (TOKENS_AT_ONCE tokens, unless `rows` says how many rows)
    and what the model carries from one slice to the next.
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
    """Nats of each label, (b, l)."""
    device = next(model.parameters()).device
    inputs, targets = torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses = model(inputs, targets.clamp(min=0), targets >= 0, past=past)
    return losses.per_token.double().cpu().numpy()


def _batches(found: list[Stream], slice_length: int, block: int, rows: int | None) -> Iterator[list[Stream]]:
    """Streams in groups of `rows` for one forward pass, longest first."""
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
    """(offset, input ids, labels) of each slice of a batch, the arrays (b, l); labels are -1 where nothing is left.

    The batch is ordered longest first, so the rows that are still running are the first b.
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
