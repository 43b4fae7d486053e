"""A text's ids word by word, each distinct word encoded once: the same ids as line by line, where that is provable.

A *word* here is a run of spaces with what follows up to the next space. BPE joins the pair of neighbouring pieces that
ranks first, again and again, until no two neighbours together are a piece. If no piece of the vocabulary goes on behind
a space that follows something else, no pair across two words is ever joined, and what happens in one word changes
nothing in another. So the ids of a line are those of its words, one after the other: by this argument, not by rounding.
A unigram model sums the scores of a whole line, where rounding can decide between two ways to cut a word; its lines
are encoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as proto

WORD = re.compile(r"\n| *[^ \n]+| +")
"""The words of a text; a newline is one of its own."""

_ROOM = 64 << 20  # bytes of the words that a process keeps, about
_EACH = 200  # bytes of a word besides its letters: two objects and their place in the dictionary
_WRITTEN_SPACE = "\u2581"
_ACROSS = re.compile(r"[^ ] ")


def words_are_independent(model: bytes) -> bool:
    """Whether a SentencePiece model gives each word the same ids wherever it stands; see the module."""
    found = proto.ModelProto.FromString(model)
    trained, rules = found.trainer_spec, found.normalizer_spec
    changed = rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces
    if trained.model_type != proto.TrainerSpec.BPE or changed or not rules.escape_whitespaces:
        return False
    kind = proto.ModelProto.SentencePiece
    joins = (piece.piece for piece in found.pieces if piece.type in (kind.NORMAL, kind.USER_DEFINED, kind.UNUSED))
    return not any(_ACROSS.search(piece.replace(_WRITTEN_SPACE, " ")) for piece in joins)


class WordIds:
    """Words to the bytes of their ids; the distinct ones are kept, up to about `_ROOM` bytes.

    Args:
        encode: gives the ids of each of several words.
        dtype: of the ids.
        fixed: words whose ids `encode` would not give.
    """

    def __init__(
        self, encode: Callable[[list[str]], list[list[int]]], dtype: np.dtype, fixed: Mapping[str, Sequence[int]]
    ) -> None:
        self._encode, self._dtype = encode, dtype
        self._fixed = {word: np.array(ids, dtype).tobytes() for word, ids in fixed.items()}
        self._forget()

    def ids(self, words: list[str]) -> bytes:
        """The ids of these words, one after the other."""
        known = self._known
        missing = list(set(words).difference(known))
        if missing:
            known.update(self._new(missing))
        ids = b"".join(map(known.__getitem__, words))
        self._room -= sum(map(len, missing)) + _EACH * len(missing)
        if self._room < 0:  # begin anew: the frequent ones are soon there again
            self._forget()
        return ids

    def _forget(self) -> None:
        """Another dictionary, for another thread may be reading the old one."""
        self._known, self._room = dict(self._fixed), _ROOM

    def _new(self, words: list[str]) -> Iterator[tuple[str, bytes]]:
        """Each word and the bytes of its ids."""
        found = self._encode(words)
        ids, size = np.fromiter(chain.from_iterable(found), self._dtype).tobytes(), self._dtype.itemsize
        ends = list(accumulate(len(each) * size for each in found))
        return zip(words, map(ids.__getitem__, map(slice, [0, *ends], ends)), strict=False)
