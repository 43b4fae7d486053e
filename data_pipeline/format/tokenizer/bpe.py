"""Byte-pair encoding of many words at a time: the ids that SentencePiece gives them, in a third of the time.

SentencePiece joins, again and again, the two neighbours that together are the piece of the highest score, of several
such places the leftmost. Here a step is made in all words at once: each joins its own best pair. What is joined in one
word does not depend on another, so the result is the same. Words for which more is needed than joining (a character
that is no piece, or one with which a symbol begins that is cut out first) are left to SentencePiece.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as proto

from data_pipeline.format.tokenizer.table import Table

_LENGTHS = (4, 8, 12, 16, 24, 32, 64)
"""Characters of the words that are worked on together; longer ones are few."""
_TOGETHER = 1 << 13  # words: what is known of their characters stays in the processor's cache
_PLACE = 6  # bits of a character's place in its word
_NONE = np.uint32(0xFFFFFFFF << _PLACE & 0xFFFFFFFF)
_WRITTEN_SPACE = "\u2581"


class Encoded(NamedTuple):
    """The ids of n words."""

    known: np.ndarray  # (n,) bool: false for the words that are left to SentencePiece, of which there is nothing here
    counts: np.ndarray  # (n,) int64
    ids: np.ndarray  # (counts.sum(),) int32, one word after the other


class Merges:
    """What is joined to what. Symbols have numbers of their own: pieces that are made by joining by descending score,
    so that the better one of two is the smaller, and then those of one character."""

    def __init__(self, model: proto.ModelProto) -> None:
        kind = proto.ModelProto.SentencePiece
        normal = {_text(piece): i for i, piece in enumerate(model.pieces) if piece.type == kind.NORMAL}
        scores = [piece.score for piece in model.pieces]
        joined = sorted((text for text in normal if len(text) > 1), key=lambda text: -scores[normal[text]])
        single = [text for text in normal if len(text) == 1]
        numbers = {text: number for number, text in enumerate([*joined, *single])}
        self._ids = np.array([normal[text] for text in numbers], np.int32)
        self._character = np.full(0x110000, -1, np.int32)  # the number of each; -1: for SentencePiece
        for text in single:
            self._character[ord(text)] = numbers[text]
        for piece in model.pieces:
            if piece.type == kind.USER_DEFINED:
                self._character[ord(_text(piece)[0])] = -1
        pairs = [
            (left, right, number)
            for number, text in enumerate(joined)
            for k in range(1, len(text))
            if (left := numbers.get(text[:k])) is not None and (right := numbers.get(text[k:])) is not None
        ]
        left, right, to = np.array(pairs, np.int64).reshape(-1, 3).T
        self._pairs = Table(4 * len(pairs))
        self._pairs.add(_keys(left, right), to.astype(np.int32))

    @classmethod
    def of(cls, model: proto.ModelProto) -> Merges | None:
        """Those of a BPE model; None where its pieces are joined by other rules than these, or scores are equal."""
        kind = proto.ModelProto.SentencePiece
        normal = [piece for piece in model.pieces if piece.type == kind.NORMAL]
        scores = [piece.score for piece in normal if len(piece.piece) > 1]
        texts = {piece.piece for piece in normal}
        characters = set("".join(texts))
        unlike = len(set(scores)) < len(scores) or any(piece.type == kind.UNUSED for piece in model.pieces)
        return None if unlike or not characters <= texts or len(texts) >= 1 << 32 - _PLACE else cls(model)

    def encode(self, characters: np.ndarray, lengths: np.ndarray) -> Encoded:
        """Words of `lengths` (n,), at least 1, whose characters (sum of them,) lie one after the other."""
        symbols = self._character.take(characters)
        begins = np.cumsum(lengths) - lengths
        known = (np.minimum.reduceat(symbols, begins) >= 0) & (lengths <= _LENGTHS[-1]) if len(lengths) else begins > 0
        counts, parts = np.zeros(len(lengths), np.int64), []
        for shorter, length in zip((0, *_LENGTHS), _LENGTHS, strict=False):
            alike = np.flatnonzero(known & (lengths > shorter) & (lengths <= length))
            for first in range(0, len(alike), _TOGETHER):
                own = alike[first : first + _TOGETHER]
                words = self._joined(_columns(symbols, begins[own], lengths[own], length))
                counts[own] = (words >= 0).sum(axis=1)
                parts.append((own, words[words >= 0]))
        ids, ends = np.empty(int(counts.sum()), np.int32), np.cumsum(counts)
        for own, numbers in parts:
            ids[ranges(ends[own] - counts[own], counts[own])] = self._ids.take(numbers)
        return Encoded(known, counts, ids)

    def _joined(self, symbols: np.ndarray) -> np.ndarray:
        """What is left of words, (L + 1, n) with -1 after their last characters, when nothing can be joined: (n, L)."""
        rows, count = symbols.shape[0] - 1, symbols.shape[1]
        done, words = np.empty((count, rows), np.int32), np.arange(count)
        place = np.arange(rows + 1, dtype=np.uint8)[:, None]
        following = np.repeat(place + np.uint8(1), count, axis=1)
        before = np.repeat(place - np.uint8(1), count, axis=1)
        before[0] = rows  # the last row, which holds nothing, is on both sides
        best = np.empty(symbols.shape, np.uint32)
        best[:-1] = _rank(self._pairs.find(_keys(symbols[:-1], symbols[1:]).reshape(-1)).reshape(rows, -1), place[:-1])
        while True:
            least = best[:-1].min(axis=0)
            active = (least < _NONE).nonzero()[0]
            if 2 * len(active) < len(words):  # put aside those that are done
                over = least >= _NONE
                done[words[over]] = symbols[:-1, over].T
                words, least = words[active], least[active]
                symbols, following, before, best = (
                    each.take(active, axis=1) for each in (symbols, following, before, best)
                )
                active = np.arange(len(words))
            if not len(active):
                return done
            self._join(active, least[active], symbols, following, before, best)

    def _join(
        self,
        words: np.ndarray,
        least: np.ndarray,
        symbols: np.ndarray,
        following: np.ndarray,
        before: np.ndarray,
        best: np.ndarray,
    ) -> None:
        """Join the best pair of each of `words`: `least` is its number and its place."""
        width = symbols.shape[1]
        symbols, following, before, best = (each.reshape(-1) for each in (symbols, following, before, best))
        place, number = (least & np.uint32((1 << _PLACE) - 1)).astype(np.int64), (least >> _PLACE).view(np.int32)
        left = place * width + words
        right = following.take(left).astype(np.int64) * width + words
        after, ahead = following.take(right).astype(np.int64), before.take(left).astype(np.int64)
        next_, last = after * width + words, ahead * width + words
        symbols[left], symbols[right], best[right] = number, -1, _NONE
        following[left], before[next_] = after, place
        keys = np.concatenate([_keys(symbols.take(last), number), _keys(number, symbols.take(next_))])
        pairs = self._pairs.find(keys)
        best[last], best[left] = _rank(pairs[: len(words)], ahead), _rank(pairs[len(words) :], place)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers ``starts[i] .. starts[i] + lengths[i]`` of all i, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def _columns(symbols: np.ndarray, begins: np.ndarray, lengths: np.ndarray, length: int) -> np.ndarray:
    """(length + 1, n): a word a column, -1 behind its end."""
    place = np.arange(length + 1)[:, None]
    return np.where(place < lengths, symbols.take(begins + place, mode="clip"), np.int32(-1))


def _keys(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of pairs of symbols; where one is -1, of none."""
    return (left.astype(np.int64) + 1 << 32 | right.astype(np.int64) + 1).view(np.uint64)


def _rank(pairs: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The smaller the better: by what the pair becomes, then the leftmost; at least _NONE for a pair of none, -1."""
    return pairs.view(np.uint32) << _PLACE | place.astype(np.uint32)


def _text(piece: proto.ModelProto.SentencePiece) -> str:
    return piece.piece.replace(_WRITTEN_SPACE, " ")
