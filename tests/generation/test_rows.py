from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bst_dist.generation.rows import Rows, portions
from tests.generation.decoder import Decoder

KINDS = [
    {"variant": "SH"},
    {"variant": "MH"},
    {"variant": "MF"},
    {"ssm": {"kernel": "explicit", "length": 20}},
    *({"mixer": mixer} for mixer in ("transformer-xl", "block-recurrent", "gss", "ssm", "full")),
]


def counted(model):
    """Return a list that records the number of rows of each forward pass."""
    batches = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    return batches


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_rows_at_different_positions_equal_rows_read_alone(make_model, changes):
    model = make_model(**changes)
    texts = [torch.randint(0, 19, (45,)) for _ in range(5)]
    reads = [(3, 16, 0, 24, 24), (5, 3, 11, 0, 1), (1, 1, 1, 1, 1), (8, 0, 8, 15, 14)]
    rows, at = Rows(5), [0] * 5
    with torch.no_grad():
        for counts in reads:
            hidden = rows.read(model, [text[a : a + n] for text, a, n in zip(texts, at, counts, strict=True)])
            at = [a + n for a, n in zip(at, counts, strict=True)]
    assert rows.positions == at
    for text, stop, states in zip(texts, at, hidden, strict=True):
        if len(states):
            alone = Decoder(model).read(text[:stop].tolist())
            torch.testing.assert_close(model.logits(states), alone, rtol=1e-9, atol=1e-9)


def test_all_hidden_states_equal_those_read_token_by_token(make_model):
    model, text = make_model(), torch.randint(0, 19, (29,))
    every = Rows(1).read(model, [text], every=True)[0]
    rows = Rows(1)
    last = torch.stack([rows.read(model, [token])[0] for token in text.split(1)])
    torch.testing.assert_close(every, last, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_whose_states_have_the_same_shape_share_a_forward_pass(make_model):
    model = make_model()
    rows = Rows(3)
    rows.read(model, [torch.zeros(count, dtype=torch.long) for count in (16, 48, 3)])
    batches = counted(model)
    rows.read(model, [torch.tensor([1])] * 3)
    assert sorted(batches) == [1, 2]


@torch.no_grad()
def test_selected_rows_continue_from_their_source_rows(make_model):
    model = make_model()
    texts = [torch.randint(0, 19, (n,)) for n in (11, 16, 5, 24)]
    rows, origins = Rows(4), [3, 1, 1, 0]
    rows.read(model, texts)
    rows.select(origins)
    assert rows.positions == [24, 16, 16, 11]
    hidden = rows.read(model, [torch.tensor([row]) for row in range(4)])
    for row, origin in enumerate(origins):
        alone = Decoder(model).read([*texts[origin].tolist(), row])
        torch.testing.assert_close(model.logits(hidden[row]), alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [kind for kind in KINDS if kind.get("mixer") != "full"], ids=str)
def test_the_state_size_does_not_grow_with_tokens(make_model, changes):
    decoder = Decoder(make_model(transformer_xl={"window": 16}, **changes))
    sizes = {}
    decoder.read([1] * 32)
    for _ in range(32):
        decoder.read([1])
        sizes.setdefault(decoder.position % 8, []).append(decoder.state_bytes)
    assert all(len(set(found)) == 1 for found in sizes.values())


@given(
    position=st.integers(0, 200),
    count=st.integers(0, 700),
    chunk=st.sampled_from([1, 2, 8, 64]),
    block=st.sampled_from([8, 32]),
)
def test_portions_never_mix_whole_and_partial_blocks_or_chunks(position, count, chunk, block):
    lengths = list(portions(position, count, block, min(chunk, block)))
    assert sum(lengths) == count
    for length in lengths:
        offset, small = position % block, min(chunk, block)
        assert (offset == 0 and length % block == 0) or offset + length <= block
        assert length % small == 0 or length < small
        position += length
