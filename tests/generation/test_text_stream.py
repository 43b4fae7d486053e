from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from bst_dist.generation.text_stream import TextStream, printable


def streamed(data: bytes, cuts: list[int], stops: list[str] = ()) -> list[str]:
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    written = []
    stream = TextStream(written.append, stops)
    for start, stop in pairwise(places):
        stream.add(data[start:stop])
    stream.close()
    return written


@given(text=st.text(), cuts=st.lists(st.integers(0, 50)))
def test_streamed_text_is_complete_for_any_split_of_its_bytes(text, cuts):
    written = streamed(text.encode(), cuts)
    assert "".join(written) == text
    assert "�" not in "".join(written) or "�" in text


@given(
    text=st.text("ab\n", max_size=30),
    cuts=st.lists(st.integers(0, 30)),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_for_any_split(text, cuts, stops):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first = min(ends)[1] if ends else len(text)
    assert "".join(streamed(text.encode(), cuts, stops)) == text[:first]


def test_text_that_cannot_begin_a_stop_string_is_written_at_once():
    written = []
    stream = TextStream(written.append, ["\n\nclass"])
    for piece in (b"x = 1\n", b"y", b"\n\ncl", b"oud"):
        stream.add(piece)
    assert written == ["x = 1", "\ny", "\n\ncloud"]
    assert not stream.stopped


def test_an_incomplete_character_becomes_a_replacement_character():
    assert streamed(b"a\xf0\x9f", [1]) == ["a", "�"]


def test_control_characters_cannot_reach_the_terminal():
    assert printable("a\tb\n\x1b[2J\x07\x9b") == "a\tb\n␛[2J␇�"
