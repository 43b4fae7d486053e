"""CRC-32 of every word of a text, without their case: what the 5-grams of MinHash are made of.

A word is a run of letters and digits, or of other characters that are no spaces; in scripts that write no spaces
between words (Chinese, Japanese, Thai and their like) a character. All words of a slice of text are hashed together,
eight bytes of each at a time, so that no word becomes an object of Python.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from string import ascii_lowercase, digits

import numpy as np

_SLICE = 1 << 22  # bytes split into words at a time; part of what a word is, where a text holds ASCII's control codes
_BREAK = re.compile(rb"\s")
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai to Tibetan, Myanmar, Khmer
    "\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f"  # Tai Le, New Tai Lue, Tai Tham, Balinese
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f"  # kana, bopomofo, their extensions, half-width kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # CJK ideographs and their extensions
)
_LONG = 64  # bytes; longer words are few, and hashed one by one
_SPACE, _LETTER, _OTHER, _ALONE, _UNKNOWN = range(5)

_CRC = np.arange(256, dtype=np.uint32)
for _ in range(8):
    _CRC = np.where(_CRC & 1, np.uint32(0xEDB88320) ^ (_CRC >> 1), _CRC >> 1)
_PAIRS = np.arange(1 << 16, dtype=np.uint32)
_CRC_2 = _CRC[(_CRC[_PAIRS & 0xFF] ^ (_PAIRS >> 8)) & 0xFF] ^ (_CRC[_PAIRS & 0xFF] >> 8)  # of two bytes
_CRC_8 = [_CRC_2]  # of the two bytes at each place of eight, the others being 0
for _ in range(3):
    _CRC_8.insert(0, _CRC_2[_CRC_8[0] & 0xFFFF] ^ (_CRC_8[0] >> 16))
_AHEAD = 64 - 8 * np.arange(9, dtype=np.uint64)  # bits of the zeros ahead of the first n of eight bytes, n = 1 to 8
_BEGIN = np.uint64(0xFFFFFFFF) << _AHEAD % 64  # the register at the begin of a word, where it meets those bytes
_BEGIN_LEFT = (0xFFFFFFFF >> 8 * np.arange(9, dtype=np.uint64)).astype(np.uint32)  # and what of it meets none
_ASCII = np.full(128, _OTHER, np.uint8)
_ASCII[np.frombuffer(b"\t\n\v\f\r ", np.uint8)] = _SPACE
_ASCII[np.frombuffer(f"{ascii_lowercase}{digits}_".encode(), np.uint8)] = _LETTER  # of a text in lower case
_kinds = np.full(0x110000, _UNKNOWN, np.uint8)  # of every character, filled in as they are met


def word_hashes(text: bytes) -> Iterator[np.ndarray]:
    """The hashes of the text's words, (k,) uint64 a slice; slices end between words."""
    start = 0
    while start < len(text):
        end = _BREAK.search(text, start + _SLICE)
        stop = end.start() if end else len(text)
        part = text[start:stop]
        yield _ascii_words(part) if part.isascii() else _words(part.decode().lower())
        start = stop


def _ascii_words(text: bytes) -> np.ndarray:
    data = np.frombuffer(text.lower(), np.uint8)
    kinds = _ASCII[data]
    starts = np.flatnonzero(_changes(kinds))
    return _hashes(data, starts, np.append(starts[1:], len(data)), kinds[starts])


def _words(text: str) -> np.ndarray:
    characters = np.frombuffer(text.encode("utf-32-le"), "<u4")
    kinds = _kinds[characters]
    if (kinds == _UNKNOWN).any():
        for character in np.unique(characters[kinds == _UNKNOWN]).tolist():
            _kinds[character] = _kind(chr(character))
        kinds = _kinds[characters]
    starts = np.flatnonzero(_changes(kinds) | (kinds == _ALONE))
    ends = np.cumsum(1 + sum((characters >= first).view(np.uint8) for first in (0x80, 0x800, 0x10000)), dtype=np.int64)
    begins = np.append(0, ends)[starts]  # in bytes of UTF-8
    return _hashes(np.frombuffer(text.encode(), np.uint8), begins, np.append(begins[1:], ends[-1]), kinds[starts])


def _changes(kinds: np.ndarray) -> np.ndarray:
    """(n,) bool: which differ from the one before; the first does."""
    changes = np.ones(len(kinds), bool)
    np.not_equal(kinds[1:], kinds[:-1], out=changes[1:])
    return changes


def _kind(character: str) -> int:
    if _UNSPACED.match(character):
        return _ALONE
    return _LETTER if re.match(r"\w", character) else _SPACE if re.match(r"\s", character) else _OTHER


def _hashes(data: np.ndarray, starts: np.ndarray, stops: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """(k,) uint64: CRC-32 of each run of bytes that is no space."""
    word = kinds != _SPACE
    starts, lengths = starts[word], (stops - starts)[word]
    return _crcs(data, starts, lengths).astype(np.uint64)


def _crcs(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(k,) uint32: CRC-32 of each run of bytes; eight bytes of each at a time, at first 1 to 8 so that the rest is a
    multiple of eight."""
    eights = np.ndarray(len(data), "<u8", np.append(data, np.zeros(8, np.uint8)), strides=(1,))  # from each byte on
    first = (lengths - 1 & 7) + 1
    mine = eights[starts] << _AHEAD.take(first)  # what comes behind these bytes is shifted out
    hashes = _advanced(mine ^ _BEGIN.take(first)) ^ _BEGIN_LEFT.take(first)
    place, stops = starts + first, starts + lengths
    more = np.flatnonzero((place < stops) & (lengths <= _LONG))
    while len(more):
        hashes[more] = _advanced(eights[place[more]] ^ hashes[more])
        place[more] += 8
        more = more[place[more] < stops[more]]
    hashes ^= np.uint32(0xFFFFFFFF)
    for i in np.flatnonzero(lengths > _LONG).tolist():
        hashes[i] = zlib.crc32(data[starts[i] : stops[i]])
    return hashes


def _advanced(eight: np.ndarray) -> np.ndarray:
    """(k,) uint32: the register after eight bytes, of the register and those bytes exclusive-ored."""
    parts = eight.view("<u2").reshape(-1, 4)
    return (
        _CRC_8[0].take(parts[:, 0])
        ^ _CRC_8[1].take(parts[:, 1])
        ^ _CRC_8[2].take(parts[:, 2])
        ^ _CRC_8[3].take(parts[:, 3])
    )
