"""Recall tasks: repeat the value that followed a key earlier in the row."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.synthetic.draws import Draws
from data_pipeline.synthetic.task import EpisodicConfig, Row, TaskConfig


class Induction(EpisodicConfig):
    """Random symbols with a trigger that occurs twice.

    The last token, after the second trigger, is the one that followed the first. This is the induction-heads task of H3
    (arXiv 2212.14052, section 3.1). Token 0 is the trigger, the others are symbols.
    """

    task: Literal["induction"]
    """Predict what followed the trigger the last time."""
    symbols: int = Field(16, ge=2, le=2**16)
    """Number of different tokens besides the trigger."""

    @property
    def vocabulary(self) -> int:
        return 1 + self.symbols

    @property
    def choices(self) -> int:
        return self.symbols

    @property
    def shortest(self) -> int:
        return 4

    def episode(self, draws: Draws, tokens: np.ndarray, distance: np.ndarray) -> None:
        last = len(tokens) - 1
        tokens[:] = 1 + draws.below(self.symbols, len(tokens))
        place = draws.one(last - 2)
        tokens[place] = tokens[last - 1] = 0
        tokens[last] = tokens[place + 1]
        distance[last] = last - place - 1


class AssociativeRecall(EpisodicConfig):
    """Pairs of a key and a value, then some of the keys again, once each, followed by their values.

    Only these last values count. This is multi-query associative recall (Zoology, arXiv 2312.04927, section 3). Token
    ids: first the fillers, then the keys, then the values. The keys of an episode differ; values may be equal. The
    values of the keys are drawn anew in each episode.
    """

    task: Literal["associative-recall"]
    """Predict the value that followed a key."""
    pairs: int = Field(8, ge=1, le=2**40)
    """Pairs per episode."""
    queries: int | None = Field(None, ge=1, le=2**40)
    """Number of keys to ask for; null: all of them."""
    keys: int = Field(32, ge=1, le=2**16)
    """Number of different keys."""
    symbols: int = Field(32, ge=2, le=2**16)
    """Number of different values."""
    fillers: int = Field(1, ge=1, le=2**16)
    """Number of different filler tokens between the questions, drawn at random; more than 1 makes noise."""

    @model_validator(mode="after")
    def _enough_keys(self) -> AssociativeRecall:
        if self.keys < self.pairs:
            raise ValueError(f"keys {self.keys} for {self.pairs} pairs: the keys of an episode differ")
        if self.queries is not None and self.queries > self.pairs:
            raise ValueError(f"queries {self.queries} of {self.pairs} pairs: each key is asked for once at most")
        return self

    @property
    def vocabulary(self) -> int:
        return self.fillers + self.keys + self.symbols

    @property
    def choices(self) -> int:
        return self.symbols

    @property
    def shortest(self) -> int:
        return 2 * self.pairs + 2 * (self.queries or self.pairs)

    def episode(self, draws: Draws, tokens: np.ndarray, distance: np.ndarray) -> None:
        begin, queries = 2 * self.pairs, self.queries or self.pairs
        if self.fillers > 1:
            tokens[:] = draws.below(self.fillers, len(tokens))
        keys = self.fillers + draws.chosen(self.keys, self.pairs)
        values = self.fillers + self.keys + draws.below(self.symbols, self.pairs)
        tokens[0:begin:2], tokens[1:begin:2] = keys, values
        asked = draws.chosen(self.pairs, queries)
        places = begin + 2 * draws.chosen((len(tokens) - begin) // 2, queries)
        tokens[places], tokens[places + 1] = keys[asked], values[asked]
        distance[places + 1] = places + 1 - (2 * asked + 1)


class Needle(TaskConfig):
    """A pass key somewhere in hay (random tokens), asked for later in the row. The repeated digits count.

    This is passkey retrieval (Landmark Attention, arXiv 2305.16300, section 4.2) without words. Token ids: first the
    hay, then the mark before the key, then the question, then the digits.
    """

    task: Literal["needle"]
    """Repeat the pass key that came somewhere before."""
    digits: int = Field(4, ge=1, le=2**40)
    """Digits of the key."""
    symbols: int = Field(10, ge=2, le=2**16)
    """Number of different digits."""
    hay: int = Field(16, ge=1, le=2**16)
    """Number of different tokens around the key."""
    distance: int | None = Field(None, ge=1, le=2**40)
    """Tokens from each digit to its repetition, with the question at any place where it fits. null: the question ends
    the row, and the key is at a random place before it."""

    @model_validator(mode="after")
    def _apart(self) -> Needle:
        if self.distance is not None and self.distance <= self.digits:
            raise ValueError(f"distance {self.distance}: at least {self.digits + 1}, or the key meets its question")
        return self

    @property
    def vocabulary(self) -> int:
        return self.hay + 2 + self.symbols

    @property
    def choices(self) -> int:
        return self.symbols

    def problem(self, length: int) -> str | None:
        needed = self.digits + 1 + (self.distance or self.digits + 1)
        return f"the key and its question need {needed - 1} inputs" if length + 1 < needed else None

    def row(self, draws: Draws, length: int) -> Row:
        part = self.digits + 1  # the mark or the question, followed by the digits
        if self.distance is None:
            question = length + 1 - part
            key = draws.one(question - part + 1)
        else:
            key = draws.one(length + 2 - part - self.distance)
            question = key + self.distance
        return self.at(draws, length, key, question)

    def at(self, draws: Draws, length: int, key: int, question: int) -> Row:
        """Return a row with the mark before the key, and the question, at the given places."""
        tokens, distance = draws.below(self.hay, length + 1), np.zeros(length + 1, np.int64)
        digits = self.hay + 2 + draws.below(self.symbols, self.digits)
        for place, mark in ((key, self.hay), (question, self.hay + 1)):
            tokens[place], tokens[place + 1 : place + 1 + self.digits] = mark, digits
        distance[question + 1 : question + 1 + self.digits] = question - key
        return Row(tokens, distance)
