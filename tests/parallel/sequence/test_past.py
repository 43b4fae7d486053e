"""Block arithmetic of the past, compared with the whole stream."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bst_dist.parallel.sequence.past import EarlierCall, Past

BLOCK = 4


@st.composite
def slices(draw: st.DrawFn) -> list[int]:
    """Draw lengths of slices; each is whole blocks from a block boundary, or lies within one block."""
    lengths, position = [], 0
    for _ in range(draw(st.integers(1, 8))):
        left = BLOCK - position % BLOCK
        whole = st.integers(1, 3).map(lambda blocks: blocks * BLOCK)
        lengths.append(draw(st.one_of(st.integers(1, left), whole) if left == BLOCK else st.integers(1, left)))
        position += lengths[-1]
    return lengths


@given(lengths=slices(), whole=st.integers(0, 2))
def test_a_slice_is_extended_to_its_block_start_and_earlier_blocks(lengths, whole):
    stream = torch.arange(sum(lengths)).view(1, -1, 1)
    state, position = {}, 0
    for length in lengths:
        past = EarlierCall(state, position)
        found = past.child("layer").extend_to_blocks("x", stream[:, position : position + length], BLOCK, whole)
        first = max(0, (position // BLOCK - whole) * BLOCK)
        assert found.flatten().tolist() == list(range(first, position + length))
        assert past.blocks_ended(BLOCK, length) == sum((p + 1) % BLOCK == 0 for p in range(position, position + length))
        state, position = past.after, position + length


def test_without_a_past_a_slice_is_not_extended():
    x = torch.ones(1, BLOCK, 1)
    assert Past().extend_to_blocks("x", x, BLOCK, whole=1) is x
