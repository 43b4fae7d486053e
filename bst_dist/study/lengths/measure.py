"""Length generalisation: what a token costs when the model may look back over sequences of another length.

At a length L the model reads L tokens from nothing, then forgets and reads the next L: the same text at every length,
each of its tokens predicted once (`lengths_text`). So lengths are compared in pairs: the tokens' own difficulty cancels
in a difference, whose standard error is far smaller than those of the two losses.

Memory does not grow with L: a sequence is streamed slice by slice through the state that the model carries. The
exceptions are said in `LengthResult.how`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bst_base.errors import UserError
from bst_dist.model.config import ModelConfig
from bst_dist.study.evaluation.memory import PeakMemory
from bst_dist.study.evaluation.scoring import Score, filter_length, score_slices, streams
from bst_dist.study.evaluation.trained import Trained
from bst_dist.study.lengths.text import Stretches, open_stretches
from bst_dist.study.statistics import Estimate, exponential, ratio
from data_pipeline.serve.reader import Corpus

How = Literal["carried", "fir", "cache"]
"""What a token knows of those before its slice: `carried`, a state of a size that does not depend on L; `fir`, for a
filter without a state and L beyond its trained length, the filter as a FIR over that many inputs; `cache`, all keys and
values (full attention), growing with L."""


class LengthError(UserError):
    """A length that a model cannot be measured at."""


@dataclass(frozen=True)
class Position:
    """The loss of the tokens at some distance from the begin of their sequence."""

    first: int
    """Tokens read before the prediction, from this many on (1: only one), ..."""
    last: int
    """... to this many."""
    tokens: int
    nats_per_token: Estimate
    versus_trained: Estimate | None
    """Nats per token more than the same tokens cost at the trained length; None when that was not measured."""


@dataclass(frozen=True)
class LengthResult:
    """The loss at one length; standard errors are over documents."""

    length: int
    how: How
    score: Score
    """Nats, tokens and bytes of each document, (n,); the tokens and bytes are the same at every length."""
    numbers: np.ndarray
    """(n,) the documents' numbers in their corpus."""
    that_long: int
    """How many of the documents have at least `length` tokens."""
    sequences: int
    positions: list[Position]
    versus_trained: Estimate | None
    """Nats per token more than at the trained length, paired; None when that was not measured."""
    peak_bytes: int | None
    """The most memory held: allocated on an accelerator, or resident in the process; None if not known."""

    @property
    def documents(self) -> int:
        return len(self.numbers)

    @property
    def tokens(self) -> int:
        return int(self.score.tokens.sum())

    @property
    def nats_per_token(self) -> Estimate:
        return ratio(self.score.nats, self.score.tokens)

    @property
    def perplexity(self) -> Estimate:
        return exponential(self.nats_per_token)

    @property
    def bits_per_byte(self) -> Estimate:
        return ratio(self.score.nats / np.log(2), self.score.bytes)


def measure(
    trained: Trained,
    corpus: Corpus,
    lengths: Sequence[int],
    *,
    tokens: int | None = None,
    rows: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LengthResult]:
    """The loss at each length, in their order, on the same tokens of an open corpus's split.

    Args:
        trained: whose recipe says how its documents were served, and its trained length.
        corpus: of the model's tokenizer.
        lengths: in tokens, multiples of the block. What is read are whole sequences of the longest of them.
        tokens: read no more than that many; None: the whole split.
        rows: sequences of a forward pass at most; None: see `score`.
        progress: told how many tokens of how many are done, over all lengths.

    Raises LengthError for a length that the model cannot do, TooShortError for one that the corpus has no text for.
    """
    recipe, own = trained.recipe, trained.recipe.train.sequence_length
    hows = {length: how(recipe.model, length) for length in lengths}
    text = open_stretches(corpus, max(lengths), recipe.data.documents != "joined", tokens)
    costs = np.zeros((text.count, text.length), np.float32) if own in hows else None
    tallies, peaks, total = {}, {}, text.count * text.length
    reference_first = sorted(hows, key=lambda length: length != own)
    for number, length in enumerate(reference_first):
        memory = PeakMemory(next(trained.model.parameters()).device)
        tallies[length] = Tally(text, position_bins(length, own), costs, is_reference=length == own)
        for done in _read(trained, text, length, tallies[length], rows):
            progress(number * total + done, len(hows) * total)
        peaks[length] = memory.bytes()
    return [_result(length, hows[length], tallies[length], peaks[length], text, tallies.get(own)) for length in lengths]


def how(model: ModelConfig, length: int) -> How:
    """How a model does sequences of a length; raises LengthError when it cannot."""
    if length < 1 or length % model.block:
        near = max(1, round(length / model.block)) * model.block
        raise LengthError(f"length {length:,} is not a multiple of the model's block, {model.block}: try {near:,}")
    if "full" in model.mixers():
        if length > model.full.longest:
            raise LengthError(
                f"length {length:,}: this model's full attention was configured for at most {model.full.longest:,} "
                "tokens (model.full.longest of its recipe): ask for shorter lengths"
            )
        return "cache"
    filtered = filter_length(model)
    return "fir" if filtered and length > filtered else "carried"


class Tally:
    """Sums over tokens by document and by position, as slices come in."""

    def __init__(self, text: Stretches, last: np.ndarray, costs: np.ndarray | None = None, is_reference: bool = False):
        """
        Args:
            last: (bins,) the last position of each bin.
            costs: (count, text.length) nats of each token at the trained length, which the reference itself writes.
        """
        documents, self.last = len(text.numbers), last
        self.nats = np.zeros((documents, len(self.last)))
        self.more = np.zeros((documents, len(self.last)))
        """Nats more than at the trained length."""
        self.tokens = np.zeros((documents, len(self.last)), np.int64)
        self.bytes = np.zeros(documents, np.int64)
        self._text, self._token_bytes = text, text.corpus.token_bytes()
        self._costs, self._is_reference = costs, is_reference

    def add(self, stretch: int, start: int, position: int, labels: np.ndarray, nats: np.ndarray) -> None:
        """Tokens `labels` (l,) of a stretch, from `start` on, at `position` in their sequence, and their cost (l,)."""
        document = self._text.documents(stretch, start, start + len(labels))
        bins = np.searchsorted(self.last, np.arange(position, position + len(labels)))
        np.add.at(self.nats, (document, bins), nats)
        np.add.at(self.tokens, (document, bins), 1)
        np.add.at(self.bytes, document, self._token_bytes[labels])
        if self._costs is not None:
            there = self._costs[stretch, start - 1 : start - 1 + len(labels)]
            if self._is_reference:
                there[:] = nats
            else:
                np.add.at(self.more, (document, bins), nats - there)

    def score(self) -> Score:
        """The sums of each document."""
        return Score(self.nats.sum(1), self.tokens.sum(1), self.bytes)

    def positions(self) -> list[Position]:
        """The loss by position; a document that has no token there is no sample of it."""
        found = []
        for index, last in enumerate(self.last.tolist()):
            there = self.tokens[:, index] > 0
            nats, more, tokens = (x[there, index] for x in (self.nats, self.more, self.tokens))
            versus = None if self._costs is None else ratio(more, tokens)
            first = int(self.last[index - 1]) + 1 if index else 1
            found.append(Position(first, last, int(tokens.sum()), ratio(nats, tokens), versus))
        return found


def position_bins(length: int, trained: int) -> np.ndarray:
    """Last positions of bins up to `length`: by sqrt(2) up to the trained length, 1, 2, 3, 4, 6, 8, 11, 16, ..., and
    then by 2, so that a bin holds the begins and the ends of the sequences that it is compared with alike."""
    lasts = np.rint(np.sqrt(2) ** np.arange(2 * int(trained).bit_length())).astype(np.int64)
    beyond = trained * 2 ** np.arange(int(length).bit_length())
    lasts = np.concatenate((lasts[lasts < trained], beyond))
    return np.append(np.unique(lasts[lasts < length]), length)


def _read(trained: Trained, text: Stretches, length: int, tally: Tally, rows: int | None) -> Iterator[int]:
    """Read the whole text in sequences of `length`; yields how many tokens are done."""
    recipe, done = trained.recipe, 0
    pieces = streams(
        np.full(text.count, text.length + 1), length, first=1
    )  # the first token of a stretch is input only
    for part in score_slices(
        trained.model, text, pieces, begin=None, slice_length=min(recipe.train.sequence_length, length),
        precision=recipe.train.precision, rows=rows,
    ):  # fmt: skip
        for stream, labels, nats in zip(part.streams, part.labels, part.nats, strict=True):
            count = int((labels >= 0).sum())
            tally.add(stream.document, stream.start + part.offset, 1 + part.offset, labels[:count], nats[:count])
            done += count
        yield done


def _result(
    length: int, kind: How, tally: Tally, peak: int | None, text: Stretches, reference: Tally | None
) -> LengthResult:
    score, versus = tally.score(), None
    if reference is not None:
        versus = ratio(score.nats - reference.score().nats, score.tokens)
    return LengthResult(
        length=length,
        how=kind,
        score=score,
        numbers=text.numbers,
        that_long=int((text.corpus.lengths[text.numbers] >= length).sum()),
        sequences=text.count * -(-text.length // length),
        positions=tally.positions(),
        versus_trained=versus,
        peak_bytes=peak,
    )
