"""Further tasks of MAD (arXiv 2403.17844, section 3): in-context recall (exact, noisy or fuzzy) and memorisation."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.synthetic.draws import Draws
from data_pipeline.synthetic.task import EpisodicConfig


class InContextRecall(EpisodicConfig):
    """Pairs of a key and its value all through an episode. A value counts if its key occurred earlier in the episode.

    In-context recall of MAD. With `noise` it is the noisy form. With `longest` above 1 it is the fuzzy form, in which
    keys and values are words of one to `longest` tokens. The first token of a word determines its length, so a word's
    end can always be predicted. Token ids: first the noise, then the tokens of keys, then those of values. Each key of
    an episode begins with a different token. The values of the keys are drawn anew in each episode.
    """

    task: Literal["in-context-recall"]
    """Predict the value of a key that occurred before."""
    keys: int = Field(16, ge=1, le=2**16)
    """Different keys per episode, and number of tokens that they are made of."""
    symbols: int = Field(16, ge=2, le=2**16)
    """Number of tokens that values are made of."""
    longest: int = Field(1, ge=1, le=64)
    """Maximum length of keys and values in tokens; above 1, this is fuzzy recall."""
    noise: float = Field(0.0, ge=0, lt=1)
    """Share of places between the pairs that hold a noise token."""
    noises: int = Field(16, ge=1, le=2**16)
    """Number of different noise tokens."""

    @property
    def vocabulary(self) -> int:
        return self.noises + self.keys + self.symbols

    @property
    def choices(self) -> int:
        return self.symbols

    @property
    def shortest(self) -> int:
        return 4 * self.longest

    def episode(self, draws: Draws, tokens: np.ndarray, distance: np.ndarray) -> None:
        keys = [self._word(draws, self.noises, self.keys, first) for first in range(self.keys)]
        firsts = draws.below(self.symbols, self.keys).tolist()
        values = [self._word(draws, self.noises + self.keys, self.symbols, first) for first in firsts]
        noise = draws.below(self.noises, len(tokens))
        noisy, which = draws.uniforms(len(tokens)) < self.noise, draws.below(self.keys, len(tokens))
        tokens[:] = noise  # what is left after the last pair is noise
        seen: dict[int, int] = {}
        place = 0
        while place < len(tokens):
            if noisy[place]:
                place += 1
                continue
            key = int(which[place])
            begin, end = place + len(keys[key]), place + len(keys[key]) + len(values[key])
            if end > len(tokens):
                return
            tokens[place:begin], tokens[begin:end] = keys[key], values[key]
            if key in seen:
                distance[begin:end] = begin - seen[key]
            seen[key], place = begin, end

    def _word(self, draws: Draws, offset: int, symbols: int, first: int) -> np.ndarray:
        rest = draws.below(symbols, first % self.longest)
        return offset + np.concatenate(([first], rest))


class Memorisation(EpisodicConfig):
    """Keys, each followed by its value, which is the same in all rows. So the values must be learnt by the weights.

    Memorisation of MAD. The keys of an episode differ, so no value can be copied. Token ids: the keys, then the values.
    """

    task: Literal["memorisation"]
    """Predict the value of a key; it is the same in every row."""
    keys: int = Field(256, ge=1, le=2**16)
    """Number of different keys, each with a fixed value."""
    symbols: int = Field(16, ge=2, le=2**16)
    """Number of different values."""

    @model_validator(mode="after")
    def _keys_differ(self) -> Memorisation:
        if self.span is not None and self.span > 2 * self.keys:
            raise ValueError(
                f"span {self.span} for {self.keys} keys, which differ in an episode: {2 * self.keys} at most"
            )
        return self

    @property
    def vocabulary(self) -> int:
        return self.keys + self.symbols

    @property
    def choices(self) -> int:
        return self.symbols

    @property
    def shortest(self) -> int:
        return 2

    def problem(self, length: int) -> str | None:
        if (self.span or length + 1) // 2 > self.keys:
            return f"an episode of {length + 1} tokens needs more than {self.keys} keys, which differ: give span"
        return super().problem(length)

    def episode(self, draws: Draws, tokens: np.ndarray, distance: np.ndarray) -> None:
        pairs = len(tokens) // 2
        known = Draws("synthetic/memorisation", self.keys).below(self.symbols, self.keys)
        keys = draws.chosen(self.keys, pairs)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, self.keys + known[keys]
        distance[1 : 2 * pairs : 2] = 1
