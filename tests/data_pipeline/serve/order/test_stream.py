"""The virtual stream of tokens of one pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.format.extents import extents
from data_pipeline.serve.order.permutation import Permutation
from data_pipeline.serve.order.stream import Pieces, TokenStream, inputs

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 1)


def spelled_out(lengths: list[int], block: int | None, seed: int) -> list[tuple[int, int] | None]:
    """Return the stream position by position: (document, position in it), None for padding."""
    stream: list[tuple[int, int] | None] = []
    for document in Permutation(len(lengths), "documents", seed).all().tolist():
        stream += [(document, place) for place in range(lengths[document])]
        while block and len(stream) % block:
            stream.append(None)
    return stream


@given(
    lengths=LENGTHS,
    block=st.sampled_from([None, 1, 4, 7]),
    seed=st.integers(0, 9),
    at_once=st.sampled_from([1, 4, 1 << 18]),
    data=st.data(),
)
def test_pieces_equal_the_explicit_stream(
    lengths: list[int], block: int | None, seed: int, at_once: int, data: st.DataObject
) -> None:
    whole = spelled_out(lengths, block, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.serve.order.stream._BLOCK", at_once)
        stream = TokenStream(np.array(lengths, np.uint32), block, ("documents", seed))
    assert stream.total == len(whole)
    starts = data.draw(st.lists(st.integers(0, len(whole) + 5), min_size=1, max_size=5))
    count = data.draw(st.integers(1, 60))
    pieces = stream.pieces(np.array(starts), count)
    rows: list[list[tuple[int, int] | None]] = [[None] * count for _ in starts]
    for row, slot, run, document, offset in zip(*(column.tolist() for column in pieces), strict=True):
        assert run >= 1
        rows[row][slot : slot + run] = [(document, offset + i) for i in range(run)]
    padded = whole + [None] * (count + 5)
    assert rows == [padded[start : start + count] for start in starts]


@pytest.mark.parametrize("block, extent", [(None, [0, 1, 8, 9]), (8, [0, 8, 8, 16])])
def test_extents_round_up_to_the_block(block: int | None, extent: list[int]) -> None:
    assert extents(np.array([0, 1, 8, 9], np.uint32), block).tolist() == extent


def test_the_last_token_of_a_joined_pass_is_a_label_only() -> None:
    assert inputs(100, None) == 99
    assert inputs(104, 8) == 104


def test_each_pass_has_another_order() -> None:
    lengths = np.full(100, 3, np.uint32)
    first, second = (TokenStream(lengths, None, ("documents", 0, epoch)).pieces([0], 300) for epoch in (0, 1))
    assert sorted(first.document) == sorted(second.document)
    assert (first.document != second.document).any()


def test_joined_pieces_are_sorted_by_row() -> None:
    lengths = np.array([5, 5], np.uint32)
    streams = [TokenStream(lengths, None, ("documents", seed)) for seed in (1, 2)]
    parts = [(np.array([0, 2]), streams[0].pieces([0, 5], 4)), (np.array([1]), streams[1].pieces([3], 4))]
    assert Pieces.join(parts[:1]) is parts[0][1]
    joined = Pieces.join(parts)
    assert joined.row.tolist() == [0, 1, 1, 2]
    assert joined.length.tolist() == [4, 2, 2, 4]
