"""Length generalisation: the loss of a model on sequences of other lengths than its training length.

At a length L the model reads L tokens, forgets, and reads the next L tokens. The text is the same at every length, and
each token is predicted once (`lengths/text.py`). So lengths are compared in pairs: the difficulty of the tokens cancels
in a difference, whose standard error is far smaller than those of the two losses.

Memory does not grow with L, because a sequence is streamed slice by slice with carried state. `LengthResult.how` names
the exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bst_base.errors import UserError
from bst_dist.model.config import ModelConfig
from bst_dist.study.evaluation.memory import PeakMemory
from bst_dist.study.evaluation.scoring import Score, bits_per_byte, filter_length, score_slices, streams
from bst_dist.study.evaluation.trained import Trained
from bst_dist.study.lengths.text import Stretches, open_stretches
from bst_dist.study.statistics import Estimate, exponential, ratio
from data_pipeline.serve.reader import Corpus

How = Literal["carried", "fir", "cache"]
"""What the model keeps of the tokens before a slice. `carried`: a state whose size does not depend on L. `fir`: an
unstructured filter has no state, so beyond its trained length it acts as a FIR filter over that many inputs. `cache`:
all keys and values (full attention), so memory grows with L."""


class LengthError(UserError):
    """The model cannot be evaluated at this length."""


@dataclass(frozen=True)
class Position:
    """The loss of the tokens in a range of positions in their sequence."""

    first: int
    """Minimum number of tokens read before the prediction, including the input token (at least 1)."""
    last: int
    """Maximum number of tokens read before the prediction."""
    tokens: int
    nats_per_token: Estimate
    versus_trained: Estimate | None
    """Nats per token minus those of the same tokens at the trained length; None if that was not measured."""


@dataclass(frozen=True)
class LengthResult:
    """The loss at one length; standard errors are over documents."""

    length: int
    how: How
    score: Score
    """Nats, tokens and bytes of each document, (n,); the tokens and bytes are the same at every length."""
    numbers: np.ndarray
    """(n,) indices of the documents in their corpus."""
    that_long: int
    """Number of the documents with at least `length` tokens."""
    sequences: int
    positions: list[Position]
    versus_trained: Estimate | None
    """Nats per token minus those at the trained length, paired; None if that was not measured."""
    peak_bytes: int | None
    """Peak memory: allocated on the accelerator, or resident in the process; None if not known."""

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
    def bits_per_byte(self) -> Estimate | None:
        return bits_per_byte(self.score.nats, self.score.bytes)


def measure(
    trained: Trained,
    corpus: Corpus,
    lengths: Sequence[int],
    *,
    tokens: int | None = None,
    rows: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LengthResult]:
    """Measure the loss at each length on the same tokens of a corpus split. Results are in the order of `lengths`.

    Args:
        trained: the model. Its recipe gives the kind of documents (joined or separate) and the trained length.
        corpus: the text, with the model's tokenizer.
        lengths: lengths in tokens, multiples of the block. The text consists of whole sequences of the longest one.
        tokens: maximum number of tokens to read; None: the whole split.
        rows: maximum number of sequences per forward pass; None: see `score`.
        progress: called with the tokens done and the total, over all lengths.

    Raises LengthError for a length that the model does not support, TooShortError if the corpus has too little text.
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
    """Return how the model processes sequences of a length; raises LengthError if it does not support the length."""
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
    """Sums over tokens by document and by position, to which slices are added."""

    def __init__(self, text: Stretches, last: np.ndarray, costs: np.ndarray | None = None, is_reference: bool = False):
        """
        Args:
            last: (bins,) the last position of each bin.
            costs: (count, text.length) nats of each token at the trained length. The reference tally writes it.
            is_reference: whether this tally is for the trained length.
        """
        documents, self.last = len(text.numbers), last
        self.nats = np.zeros((documents, len(self.last)))
        self.more = np.zeros((documents, len(self.last)))
        """Nats minus those at the trained length."""
        self.tokens = np.zeros((documents, len(self.last)), np.int64)
        self.bytes = np.zeros(documents, np.int64)
        self._text, self._token_bytes = text, text.corpus.token_bytes()
        self._costs, self._is_reference = costs, is_reference

    def add(self, stretch: int, start: int, position: int, labels: np.ndarray, nats: np.ndarray) -> None:
        """Add the tokens `labels` (l,) of a stretch, from `start` on, at `position` in their sequence; `nats` (l,)."""
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
        """Return the sums of each document."""
        return Score(self.nats.sum(1), self.tokens.sum(1), self.bytes)

    def positions(self) -> list[Position]:
        """Return the loss by position. A document without a token in a bin is no sample of this bin."""
        found = []
        for index, last in enumerate(self.last.tolist()):
            there = self.tokens[:, index] > 0
            nats, more, tokens = (x[there, index] for x in (self.nats, self.more, self.tokens))
            versus = None if self._costs is None else ratio(more, tokens)
            first = int(self.last[index - 1]) + 1 if index else 1
            found.append(Position(first, last, int(tokens.sum()), ratio(nats, tokens), versus))
        return found


def position_bins(length: int, trained: int) -> np.ndarray:
    """Return the last positions of the bins up to `length`.

    Up to the trained length they grow by sqrt(2): 1, 2, 3, 4, 6, 8, 11, 16, ... Beyond it they grow by 2, so that a bin
    covers whole sequences of the trained length, with their beginnings and their ends.
    """
    lasts = np.rint(np.sqrt(2) ** np.arange(2 * int(trained).bit_length())).astype(np.int64)
    beyond = trained * 2 ** np.arange(int(length).bit_length())
    lasts = np.concatenate((lasts[lasts < trained], beyond))
    return np.append(np.unique(lasts[lasts < length]), length)


def _read(trained: Trained, text: Stretches, length: int, tally: Tally, rows: int | None) -> Iterator[int]:
    """Read the whole text in sequences of `length`; yield the number of tokens done."""
    recipe, done = trained.recipe, 0
    pieces = streams(
        np.full(text.count, text.length + 1), length, first=1
    )  # the first token of a stretch is input only
    for part in score_slices(
        trained.model,
        text,
        pieces,
        begin=None,
        slice_length=min(recipe.train.sequence_length, length),
        precision=recipe.train.precision,
        rows=rows,
    ):
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
