"""Words hashed all at once have the same hashes as word by word with a regular expression and zlib."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.prepare import word_hashes

ALONE = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u3040-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+|[^\w\s{ALONE}]+")
SAMPLES = [
    "word",
    "Word_1",
    "x",
    "...",
    "!=",
    " ",
    "\n",
    "\t",
    "\x00",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u2028",
    "é",
    "e\u0301",
    "ß",
    "İ",
    "Σας",
    "漢字",
    "ひらがな",
    "ไทย",
    "한국어",
    "русский",
    "\U0001f600",
    "\U00020000",
    "w" * 31,
    "w" * 32,
    "w" * 33,
    "w" * 64,
    "w" * 65,
    "w" * 300,
    "-" * 47,
]
texts = st.lists(st.one_of(st.sampled_from(SAMPLES), st.text(max_size=12)), max_size=60).map("".join)


def one_by_one(text: bytes) -> list[int]:
    if text.isascii():
        return [zlib.crc32(word) for word in re.findall(rb"\w+|[^\w\s]+", text.lower())]
    return [zlib.crc32(word.encode()) for word in WORD.findall(text.decode().lower())]


def together(text: bytes) -> list[int]:
    return np.concatenate([np.empty(0, np.uint64), *word_hashes.word_hashes(text)]).tolist()


@settings(max_examples=400, deadline=None)
@given(text=texts.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text)))
def test_hashes_equal_those_of_single_words(text: str) -> None:
    assert together(text.encode()) == one_by_one(text.encode())
    ascii_alone = text.encode("ascii", "ignore")
    assert together(ascii_alone) == one_by_one(ascii_alone)


@pytest.mark.parametrize("length", range(1, 70))
def test_word_hashes_are_crc32_for_every_length(length: int) -> None:
    words = [bytes([97 + (7 * i + k) % 26 for k in range(length)]) for i in range(5)]
    assert together(b" ".join(words)) == [zlib.crc32(word) for word in words]


def test_words_of_real_text_equal_those_of_the_regular_expression() -> None:
    text = (__doc__ + Path(re.__file__).read_text()).encode()
    assert together(text) == one_by_one(text)
    text += " – naïve 漢字".encode()
    assert together(text) == one_by_one(text)
