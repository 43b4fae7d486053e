"""Latent unigram: each sequence has its own token distribution, which must be learnt from the sequence itself."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from data_pipeline.synthetic.draws import Draws
from data_pipeline.synthetic.task import Row, TaskConfig


class LatentUnigram(TaskConfig):
    """Tokens drawn independently from a distribution, which is drawn for each row from a symmetric Dirichlet prior.

    After n tokens, of which k were token v, the best prediction of v is (k + a) / (n + a V), with a the concentration
    and V the symbols. So a model needs counts over the whole past. Every token counts, and its distance is the number
    of tokens before it.
    """

    task: Literal["latent-unigram"]
    """Learn each sequence's token distribution from the sequence itself."""
    symbols: int = Field(64, ge=2, le=2**16)
    """Number of different tokens, V."""
    concentration: float = Field(1.0, gt=0, allow_inf_nan=False, le=1e9)
    """Concentration of the Dirichlet prior, per symbol: a smaller one makes sequences use fewer symbols."""

    @property
    def vocabulary(self) -> int:
        return self.symbols

    @property
    def choices(self) -> int:
        return self.symbols

    def row(self, draws: Draws, length: int) -> Row:
        """Draw a row by Pólya's urn (Blackwell and MacQueen 1973).

        A token is new with probability a V / (a V + n). Otherwise it equals one of the n tokens before it, each equally
        likely. Only comparisons of exact products are needed.
        """
        before = np.arange(length + 1)
        mass = self.concentration * self.symbols
        new = draws.uniforms(length + 1) * (mass + before) < mass
        source = np.where(new, before, draws.below(np.maximum(before, 1), length + 1))
        while (source[source] != source).any():  # a source may have a source too: follow all chains at once
            source = source[source]
        return Row(draws.below(self.symbols, length + 1)[source], before)

    def best_loss(self, first: int, last: int) -> float:
        return (self._code_length(last + 1) - self._code_length(first)) / (last + 1 - first)

    def _code_length(self, tokens: int) -> float:
        """Return the expected nats of the first `tokens` tokens under the best predictions, by the chain rule.

        Their probability is prod_v (a)_{n_v} / (a V)_n with rising factorials, and a symbol's count n_v is
        beta-binomial with parameters a and a (V - 1).
        """
        a, counts = self.concentration, np.arange(tokens + 1)
        mine, others, all_ = (_log_rising(x, tokens) for x in (a, a * (self.symbols - 1), a * self.symbols))
        factorial = _log_rising(1.0, tokens)
        ways = factorial[tokens] - factorial[counts] - factorial[tokens - counts]
        probability = np.exp(ways + mine[counts] + others[tokens - counts] - all_[tokens])
        return float(all_[tokens] - self.symbols * (probability * mine[counts]).sum())


def _log_rising(x: float, count: int) -> np.ndarray:
    """Return (count + 1,): ln of x (x + 1) ... (x + n - 1) for n = 0, ..., count."""
    return np.concatenate(([0.0], np.cumsum(np.log(x + np.arange(count)))))
