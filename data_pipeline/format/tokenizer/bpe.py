"""Byte-pair encoding of many words at a time. It gives the same ids as SentencePiece, in a third of the time.

SentencePiece repeatedly joins two neighbours that form the piece with the highest score, the leftmost ones if there are
several such places. Here one step is done in all words at once: each word joins its own best pair. Joins in one word do
not depend on other words, so the result is the same. Some words need more than joins: those with a character that is no
piece, or with the first character of a user-defined symbol, which SentencePiece cuts out first. They are left to
SentencePiece.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as proto

from data_pipeline.format.tokenizer.table import Table

_LENGTHS = (4, 8, 12, 16, 24, 32, 64)
"""Maximum characters of each group of words that are encoded together. Longer words are rare and left to
SentencePiece."""
_TOGETHER = 1 << 13  # words encoded at a time: their arrays stay in the processor's cache
_PLACE = 6  # bits for the position of a character in its word
_NONE = np.uint32(0xFFFFFFFF << _PLACE & 0xFFFFFFFF)
_WRITTEN_SPACE = "\u2581"


class Encoded(NamedTuple):
    """The ids of n words."""

    known: np.ndarray  # (n,) bool: false for the words left to SentencePiece, which have no ids here
    counts: np.ndarray  # (n,) int64
    ids: np.ndarray  # (counts.sum(),) int32, one word after the other


class Merges:
    """The table of joins: which piece each pair of pieces becomes.

    Symbols are numbered. Pieces that are made by joins come first, by descending score, so that a smaller number is
    better. Pieces of one character follow.
    """

    def __init__(self, model: proto.ModelProto) -> None:
        kind = proto.ModelProto.SentencePiece
        normal = {_text(piece): i for i, piece in enumerate(model.pieces) if piece.type == kind.NORMAL}
        scores = [piece.score for piece in model.pieces]
        joined = sorted((text for text in normal if len(text) > 1), key=lambda text: -scores[normal[text]])
        single = [text for text in normal if len(text) == 1]
        numbers = {text: number for number, text in enumerate([*joined, *single])}
        self._ids = np.array([normal[text] for text in numbers], np.int32)
        self._character = np.full(0x110000, -1, np.int32)  # number of each character; -1: left to SentencePiece
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
        """Return the table of a BPE model.

        Returns None if scores are equal or pieces are joined by other rules than these.
        """
        kind = proto.ModelProto.SentencePiece
        normal = [piece for piece in model.pieces if piece.type == kind.NORMAL]
        scores = [piece.score for piece in normal if len(piece.piece) > 1]
        texts = {piece.piece for piece in normal}
        characters = set("".join(texts))
        unlike = len(set(scores)) < len(scores) or any(piece.type == kind.UNUSED for piece in model.pieces)
        return None if unlike or not characters <= texts or len(texts) >= 1 << 32 - _PLACE else cls(model)

    def encode(self, characters: np.ndarray, lengths: np.ndarray) -> Encoded:
        """Encode n words of `lengths` (n,), at least 1 each.

        Their characters (sum of lengths,) lie one after the other.
        """
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
        """Join pairs until none is left.

        `symbols` is (L + 1, n), with -1 after a word's last character; returns (n, L).
        """
        rows, count = symbols.shape[0] - 1, symbols.shape[1]
        done, words = np.empty((count, rows), np.int32), np.arange(count)
        place = np.arange(rows + 1, dtype=np.uint8)[:, None]
        following = np.repeat(place + np.uint8(1), count, axis=1)
        before = np.repeat(place - np.uint8(1), count, axis=1)
        before[0] = rows  # the empty last row is the neighbour at both ends
        best = np.empty(symbols.shape, np.uint32)
        best[:-1] = _rank(self._pairs.find(_keys(symbols[:-1], symbols[1:]).reshape(-1)).reshape(rows, -1), place[:-1])
        while True:
            least = best[:-1].min(axis=0)
            active = (least < _NONE).nonzero()[0]
            if 2 * len(active) < len(words):  # remove the finished words from the arrays
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
        """Join the best pair of each of `words`.

        `least` encodes the number of the new piece and the position of the pair.
        """
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
    """Return the numbers ``starts[i] .. starts[i] + lengths[i]`` of all i, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def _columns(symbols: np.ndarray, begins: np.ndarray, lengths: np.ndarray, length: int) -> np.ndarray:
    """Return (length + 1, n): one word per column, -1 after its end."""
    place = np.arange(length + 1)[:, None]
    return np.where(place < lengths, symbols.take(begins + place, mode="clip"), np.int32(-1))


def _keys(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the keys of pairs of symbols. A key with a -1 matches no pair."""
    return (left.astype(np.int64) + 1 << 32 | right.astype(np.int64) + 1).view(np.uint64)


def _rank(pairs: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return the rank of pairs, smaller is better: first by the piece that it becomes, then by position.

    A pair of -1, which cannot be joined, has a rank of at least _NONE.
    """
    return pairs.view(np.uint32) << _PLACE | place.astype(np.uint32)


def _text(piece: proto.ModelProto.SentencePiece) -> str:
    return piece.piece.replace(_WRITTEN_SPACE, " ")
