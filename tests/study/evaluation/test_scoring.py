from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bst_dist.model.layers import MIXERS
from bst_dist.study.evaluation import scoring
from bst_dist.study.evaluation.scoring import score, streams

END = 3
LENGTHS = [21, 1, 70, 16, 8, 17, 33]


def literal(model, tokens, begin, context=None):
    """Return the nats of one document, with one forward pass per token over everything before it."""
    total = 0.0 if begin is not None else math.log(model.config.vocab_size)
    inputs = ([] if begin is None else [begin]) + tokens.astype(int).tolist()
    labels = tokens.astype(int).tolist()[begin is None :]
    for i, label in enumerate(labels):
        first = 0 if context is None else i // context * context
        seen = inputs[first : i + 1]
        padded = seen + [0] * (-len(seen) % model.config.block)  # causal: padding at the end has no effect
        losses = model(torch.tensor([padded]), torch.full((1, len(padded)), label)).per_token
        total += float(losses[0, len(seen) - 1])
    return total


@pytest.mark.parametrize("variant", ["SH", "MH", "MF"])
@pytest.mark.parametrize(("begin", "context"), [(END, None), (None, None), (END, 16)])
def test_streamed_scores_equal_those_of_single_documents(make_model, in_memory, variant, begin, context):
    model, corpus = make_model(variant=variant), in_memory(LENGTHS, 19)
    got = score(model, corpus, corpus.lengths, np.arange(19), begin=begin, context=context, slice_length=16)
    expected = [literal(model, tokens, begin, context) for tokens in corpus.documents]
    np.testing.assert_allclose(got.nats, expected, rtol=1e-9)
    np.testing.assert_array_equal(got.tokens, LENGTHS)
    np.testing.assert_array_equal(got.bytes, [tokens.sum() for tokens in corpus.documents])


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "bst"])
def test_every_model_carries_its_state_from_slice_to_slice(make_model, in_memory, mixer):
    model, corpus = make_model(mixer), in_memory([60], 19)
    pieces, whole = (
        score(model, corpus, corpus.lengths, np.ones(19, int), begin=END, slice_length=length) for length in (8, 64)
    )
    np.testing.assert_allclose(pieces.nats, whole.nats, rtol=1e-9)


def test_slices_and_batches_do_not_change_the_score(make_model, in_memory, monkeypatch):
    model, corpus = make_model(), in_memory(LENGTHS, 19)
    whole = score(model, corpus, corpus.lengths, np.ones(19, int), begin=END, slice_length=128)
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 8)
    single = score(model, corpus, corpus.lengths, np.ones(19, int), begin=END, slice_length=8)
    np.testing.assert_allclose(single.nats, whole.nats, rtol=1e-9)


def test_a_long_document_is_read_a_slice_at_a_time(make_model, in_memory):
    corpus = in_memory([1000], 19)
    done = []
    score(make_model(), corpus, corpus.lengths, np.ones(19, int), begin=END, slice_length=32, progress=done.append)
    assert corpus.longest_read <= 33
    assert done == [*range(32, 1000, 32), 1000]


def test_context_cuts_documents_into_streams_that_cover_them():
    found = streams(np.array([0, 5, 8]), 4, 0)
    assert [tuple(stream) for stream in found] == [(1, 0, 4), (1, 4, 5), (2, 0, 4), (2, 4, 8)]
    assert [tuple(stream) for stream in streams(np.array([1, 5]), None, 1)] == [(1, 1, 5)]


@pytest.mark.parametrize("begin", [END, None])
def test_sum_over_readers_equals_the_whole_score(make_model, in_memory, begin):
    model, corpus = make_model(), in_memory(LENGTHS, 19)
    whole = score(model, corpus, corpus.lengths, np.arange(19), begin=begin, slice_length=16)
    shares = [
        score(model, corpus, corpus.lengths, np.arange(19), begin=begin, slice_length=16, part=part, parts=9)
        for part in range(9)
    ]
    assert all(np.count_nonzero(share.tokens) <= 1 for share in shares)  # seven documents for nine processes
    for name in ("nats", "tokens", "bytes"):
        np.testing.assert_allclose(sum(getattr(share, name) for share in shares), getattr(whole, name), rtol=1e-9)


def test_number_of_rows_per_forward_pass_is_limited(make_model, in_memory):
    model, corpus = make_model(), in_memory([20] * 7, 19)
    seen = [
        len(part.streams)
        for part in scoring.score_slices(
            model, corpus, streams(corpus.lengths, None, 0), begin=END, slice_length=16, rows=3
        )
    ]
    assert seen == [3, 3, 3, 3, 1, 1]


@pytest.mark.parametrize("begin", [END, None])
def test_documents_finished_before_a_stop_have_exact_scores(make_model, in_memory, begin):
    model, corpus, asked = make_model(), in_memory(LENGTHS, 19), []

    def stopped() -> bool:
        asked.append(None)
        return len(asked) == 4

    whole = score(model, corpus, corpus.lengths, np.arange(19), begin=begin, slice_length=16)
    part = score(model, corpus, corpus.lengths, np.arange(19), begin=begin, slice_length=16, rows=2, stopped=stopped)
    done = part.tokens == corpus.lengths
    assert 0 < done.sum() < len(LENGTHS)
    np.testing.assert_allclose(part.of(done).nats, whole.of(done).nats, rtol=1e-9)
