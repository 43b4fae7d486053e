"""CRC-32 of every word of a text in lower case. The 5-grams of MinHash are made from these hashes.

A word is a run of letters and digits, or of other characters that are not spaces. In scripts without spaces between
words (Chinese, Japanese, Thai and similar ones) every character is a word. All words of a slice of text are hashed
together, eight bytes of each at a time, so that no Python object is created for a word.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from string import ascii_lowercase, digits

import numpy as np

_SLICE = 1 << 22  # bytes split into words at a time; with ASCII control codes in a text, the words depend on it
_BREAK = re.compile(rb"\s")
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai to Tibetan, Myanmar, Khmer
    "\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f"  # Tai Le, New Tai Lue, Tai Tham, Balinese
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f"  # kana, bopomofo, their extensions, half-width kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # CJK ideographs and their extensions
)
_LONG = 64  # bytes; longer words are rare, and hashed one by one
_SPACE, _LETTER, _OTHER, _ALONE, _UNKNOWN = range(5)

_CRC = np.arange(256, dtype=np.uint32)
for _ in range(8):
    _CRC = np.where(_CRC & 1, np.uint32(0xEDB88320) ^ (_CRC >> 1), _CRC >> 1)
_PAIRS = np.arange(1 << 16, dtype=np.uint32)
_CRC_2 = _CRC[(_CRC[_PAIRS & 0xFF] ^ (_PAIRS >> 8)) & 0xFF] ^ (_CRC[_PAIRS & 0xFF] >> 8)  # table for two bytes
_CRC_8 = [_CRC_2]  # tables for each pair of eight bytes, the other bytes being 0
for _ in range(3):
    _CRC_8.insert(0, _CRC_2[_CRC_8[0] & 0xFFFF] ^ (_CRC_8[0] >> 16))
_AHEAD = 64 - 8 * np.arange(9, dtype=np.uint64)  # bits of leading zeros when only the first n of eight bytes count
_BEGIN = np.uint64(0xFFFFFFFF) << _AHEAD % 64  # the initial CRC register, aligned with those n bytes
_BEGIN_LEFT = (0xFFFFFFFF >> 8 * np.arange(9, dtype=np.uint64)).astype(np.uint32)  # and its part beyond n < 4 bytes
_ASCII = np.full(128, _OTHER, np.uint8)
_ASCII[np.frombuffer(b"\t\n\v\f\r ", np.uint8)] = _SPACE
_ASCII[np.frombuffer(f"{ascii_lowercase}{digits}_".encode(), np.uint8)] = _LETTER  # texts are in lower case
_kinds = np.full(0x110000, _UNKNOWN, np.uint8)  # the kind of every character, filled in when it first occurs


def word_hashes(text: bytes) -> Iterator[np.ndarray]:
    """Yield the hashes of the text's words, (k,) uint64 for each slice. Slices end between words."""
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
    begins = np.append(0, ends)[starts]  # byte offsets in UTF-8
    return _hashes(np.frombuffer(text.encode(), np.uint8), begins, np.append(begins[1:], ends[-1]), kinds[starts])


def _changes(kinds: np.ndarray) -> np.ndarray:
    """Return (n,) bool: which values differ from the one before. The first value counts as different."""
    changes = np.ones(len(kinds), bool)
    np.not_equal(kinds[1:], kinds[:-1], out=changes[1:])
    return changes


def _kind(character: str) -> int:
    if _UNSPACED.match(character):
        return _ALONE
    return _LETTER if re.match(r"\w", character) else _SPACE if re.match(r"\s", character) else _OTHER


def _hashes(data: np.ndarray, starts: np.ndarray, stops: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return (k,) uint64: the CRC-32 of each run of bytes that is not a space."""
    word = kinds != _SPACE
    starts, lengths = starts[word], (stops - starts)[word]
    return _crcs(data, starts, lengths).astype(np.uint64)


def _crcs(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return (k,) uint32: the CRC-32 of each run of bytes.

    All runs advance together: first by 1 to 8 bytes, so that the rest is a multiple of eight, then by eight bytes at a
    time.
    """
    eights = np.ndarray(len(data), "<u8", np.append(data, np.zeros(8, np.uint8)), strides=(1,))  # at each byte offset
    first = (lengths - 1 & 7) + 1
    mine = eights[starts] << _AHEAD.take(first)  # shifts out the bytes after the first ones
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
    """Return (k,) uint32: the CRC register after eight bytes.

    `eight` is the XOR of the register before and these bytes.
    """
    parts = eight.view("<u2").reshape(-1, 4)
    return (
        _CRC_8[0].take(parts[:, 0])
        ^ _CRC_8[1].take(parts[:, 1])
        ^ _CRC_8[2].take(parts[:, 2])
        ^ _CRC_8[3].take(parts[:, 3])
    )
