"""Encodes many texts word by word, each distinct word once. The ids are provably the same as line by line.

A *word* is a run of spaces with the text after it, up to the next space. BPE repeatedly joins the neighbouring pieces
that rank first, until no two neighbours form a piece. If no piece of the vocabulary continues after a space that
follows other characters, no pair across two words is ever joined, and the joins in one word change nothing in another.
So the ids of a line are exactly those of its words, one after the other. In a unigram model this does not hold: it sums
the scores of a whole line, and rounding can decide between two ways to split a word. Its lines are encoded whole.

All words of a text are found, looked up and replaced by their ids together, without a Python object for each. They are
looked up by a hash, then compared byte by byte with the stored word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as proto

from data_pipeline.format.tokenizer.bpe import Merges, ranges
from data_pipeline.format.tokenizer.table import Table

_TOGETHER = 1 << 21  # characters encoded together, about
_MANY = 1 << 8  # minimum number of new words for which `Merges` is faster than SentencePiece
_WORDS, _BYTES = 1 << 19, 1 << 24  # maximum words, and bytes (or ids) of words, in the cache, about
_EXACT = 7  # bytes of a word that fit into its hash
_HASHED = 64  # bytes of a word that are hashed; later bytes are only compared
_AFTER = 8  # bytes of padding after a text, since eight bytes are read at a time
_NEWLINE, _SPACE = 10, 32
_WRITTEN_SPACE = "\u2581"
_ACROSS = re.compile(r"[^ ] ")
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # selects the first n bytes of eight


def words_are_independent(model: bytes) -> bool:
    """Whether a SentencePiece model gives a word the same ids wherever it occurs; see the module."""
    found = proto.ModelProto.FromString(model)
    trained, rules = found.trainer_spec, found.normalizer_spec
    changed = rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces
    if trained.model_type != proto.TrainerSpec.BPE or changed or not rules.escape_whitespaces:
        return False
    kind = proto.ModelProto.SentencePiece
    joins = (piece.piece for piece in found.pieces if piece.type in (kind.NORMAL, kind.USER_DEFINED, kind.UNUSED))
    return not any(_ACROSS.search(piece.replace(_WRITTEN_SPACE, " ")) for piece in joins)


class WordIds:
    """Encodes texts, with a cache of distinct words of up to about 60 MB. Not thread-safe.

    Args:
        model: a SentencePiece model for which `words_are_independent`.
        encode: returns SentencePiece's own ids for each of several words.
        dtype: of the ids.
        newline: the id of a newline.
    """

    def __init__(
        self, model: bytes, encode: Callable[[list[str]], list[list[int]]], dtype: np.dtype, newline: int
    ) -> None:
        self._merges = Merges.of(proto.ModelProto.FromString(model))
        self._encode, self._dtype, self._newline = encode, dtype, newline
        self._kept = _Kept(dtype)

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, (n,). Texts must not contain U+2581, nor lines longer than `MAX_LINE`."""
        found, start, size = [], 0, 0
        for number, text in enumerate(texts, start=1):
            size += len(text)
            if size >= _TOGETHER or number == len(texts):
                found += self._ids_of(texts[start:number])
                start, size = number, 0
        return found

    def _ids_of(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = [text.encode() for text in texts]
        data = np.frombuffer(b"\n".join([*encoded, bytes(_AFTER)]), np.uint8)  # separated by newlines
        starts = _starts(data[:-_AFTER])
        words = self._numbers(data, starts, np.diff(starts, append=len(data) - _AFTER))
        counts = self._kept.counts[words]
        ids = self._kept.ids[ranges(self._kept.firsts[words], counts)]
        before = np.append(0, np.cumsum(counts))
        after = np.cumsum([len(each) + 1 for each in encoded])  # position after the newline that follows each text
        first, last = np.searchsorted(starts, np.append(0, after[:-1])), np.searchsorted(starts, after - 1)
        return [ids[begin:end] for begin, end in zip(before[first].tolist(), before[last].tolist(), strict=True)]

    def _numbers(self, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the number of each word in the cache. New words are added."""
        if self._kept.full:  # empty the cache; frequent words are soon in it again
            self._kept = _Kept(self._dtype)
        kept, keys = self._kept, _hashes(data, starts, lengths)
        numbers = kept.table.find(keys).astype(np.int64)
        new = np.flatnonzero(numbers < 0)
        if len(new):
            distinct, first, which = np.unique(keys[new], return_index=True, return_inverse=True)
            own = self._keep(data, starts[new[first]], lengths[new[first]])
            kept.table.add(distinct, own.astype(np.int32))
            numbers[new] = own[which]
        longer = np.flatnonzero(lengths > _EXACT)
        unlike = longer[kept.unlike(numbers[longer], data, starts[longer], lengths[longer])]
        if len(unlike):  # hash collisions: each occurrence is encoded on its own
            numbers[unlike] = self._keep(data, starts[unlike], lengths[unlike])
        return numbers

    def _keep(self, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Encode words and add them to the cache; return their numbers."""
        text = data[ranges(starts, lengths)]
        ends = np.cumsum(lengths)
        known, counts, ids = np.zeros(len(lengths), bool), np.zeros(len(lengths), np.int64), np.empty(0, np.int32)
        if self._merges is not None and len(lengths) >= _MANY:
            characters = np.frombuffer(text.tobytes().decode().encode("utf-32-le"), "<u4")
            sizes = np.add.reduceat(text & 0xC0 != 0x80, ends - lengths, dtype=np.int64)
            known, counts, ids = self._merges.encode(characters, sizes)
        left = np.flatnonzero(~known)
        spelt, bounds = text.tobytes(), zip((ends - lengths)[left].tolist(), ends[left].tolist(), strict=True)
        words = [spelt[begin:end].decode() for begin, end in bounds]
        found = [[self._newline] if word == "\n" else own for word, own in zip(words, self._encode(words), strict=True)]
        return self._kept.add(text, lengths, *_merged(counts, ids, left, found))


class _Kept:
    """The cache of words, by number, and their ids."""

    def __init__(self, dtype: np.dtype) -> None:
        self.table = Table(1 << 10)
        """Maps the hash of a word to its number."""
        self.counts, self.firsts = _Growing(np.int32), _Growing(np.int32)
        """For each word: the number of its ids (`counts`), and the place of the first one in `ids` (`firsts`)."""
        self.ids = _Growing(dtype)
        self._lengths, self._begins, self._text = _Growing(np.int32), _Growing(np.int32), _Growing(np.uint8)

    @property
    def full(self) -> bool:
        """Whether the cache has reached its maximum size."""
        return self.counts.size > _WORDS or self._text.size > _BYTES or self.ids.size > _BYTES

    def add(self, text: np.ndarray, lengths: np.ndarray, counts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Add words, whose bytes and ids lie one after the other; return their numbers."""
        first = self.counts.size
        self._begins.append(self._text.size + np.cumsum(lengths) - lengths)
        self.firsts.append(self.ids.size + np.cumsum(counts) - counts)
        self._lengths.append(lengths)
        self.counts.append(counts)
        self._text.append(text)
        self.ids.append(ids)
        return np.arange(first, first + len(lengths))

    def unlike(self, numbers: np.ndarray, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the indices of the words, which begin at `starts` of `data`, that differ from the cached ones."""
        same = self._lengths[numbers] == lengths
        begins, text = self._begins[numbers], self._text.with_room(_AFTER)
        for which, mask, place in _eights(np.where(same, lengths, 0)):
            there, here = _lanes(text)[begins[which] + place], _lanes(data)[starts[which] + place]
            same[which] &= (there ^ here) & mask == 0
        for i in np.flatnonzero(same & (lengths > _HASHED)).tolist():
            there, here = text[begins[i] : begins[i] + lengths[i]], data[starts[i] : starts[i] + lengths[i]]
            same[i] = np.array_equal(there, here)
        return np.flatnonzero(~same)


class _Growing:
    """An array that grows when values are appended."""

    def __init__(self, dtype: np.dtype | type) -> None:
        self._values, self.size = np.zeros(1 << 10, dtype), 0

    def append(self, values: np.ndarray) -> None:
        """Append values."""
        self.with_room(len(values))
        self._values[self.size : self.size + len(values)] = values
        self.size += len(values)

    def with_room(self, count: int) -> np.ndarray:
        """Return the array with room for `count` more values after the existing ones."""
        if self.size + count > len(self._values):
            self._values = np.append(self._values, np.zeros(self.size + count, self._values.dtype))
        return self._values

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self._values.take(places)


def _starts(text: np.ndarray) -> np.ndarray:
    """Return the positions where the words of a text begin. A newline is a word of its own."""
    newline, space = text == _NEWLINE, text == _SPACE
    start = newline.copy()
    start[0] = True
    start[1:] |= newline[:-1] | (space[1:] & ~space[:-1])
    return np.flatnonzero(start)


def _hashes(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return (n,) uint64: a number, not 0, for each word.

    Up to `_EXACT` bytes, it is the word itself. For longer words, it is a hash of the length and the first `_HASHED`
    bytes, so different words can share it.
    """
    lanes, sizes = _lanes(data), lengths.astype(np.uint64)
    hashes = lanes[starts] & _MASKS.take(np.minimum(lengths, _EXACT)) | sizes << np.uint64(8 * _EXACT)
    longer = np.flatnonzero(lengths > _EXACT)
    starts, mixed = starts[longer], sizes[longer]
    for which, mask, place in _eights(lengths[longer]):
        mixed[which] = _mixed(mixed[which] ^ lanes[starts[which] + place] & mask)
    hashes[longer] = mixed | np.uint64(1 << 63)
    return hashes


def _mixed(values: np.ndarray) -> np.ndarray:
    values = values * _MULTIPLIER
    return values ^ values >> np.uint64(32)


def _eights(lengths: np.ndarray) -> Iterator[tuple[np.ndarray | slice, np.ndarray, int]]:
    """Yield eight bytes of each word at a time, as (which words have any, a mask of their bytes, their position)."""
    which: np.ndarray | slice = slice(None)
    rest, place = np.minimum(lengths, _HASHED), 0
    while len(rest):
        yield which, _MASKS.take(np.minimum(rest, 8)), place
        more = (rest > 8).nonzero()[0]
        which, rest, place = more if isinstance(which, slice) else which[more], rest[more] - 8, place + 8


def _lanes(data: np.ndarray) -> np.ndarray:
    """Return the eight bytes that begin at each byte."""
    return np.ndarray(len(data) - 7, "<u8", data, strides=(1,))


def _merged(
    counts: np.ndarray, ids: np.ndarray, left: np.ndarray, found: list[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts and ids of all words, after inserting those of the words `left`, whose counts were 0."""
    own = np.array([len(each) for each in found], np.int64)
    places = np.repeat((np.cumsum(counts) - counts)[left], own)
    counts = counts.copy()
    counts[left] = own
    return counts, np.insert(ids, places, np.fromiter(chain.from_iterable(found), np.int32, int(own.sum())))
