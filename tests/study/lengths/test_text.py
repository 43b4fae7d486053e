from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bst_dist.study.lengths.text import ORDER, TooShortError, longest, open_stretches
from data_pipeline.serve.order.permutation import Permutation

LENGTHS = [21, 1, 70, 16, 8, 17, 33]


@pytest.fixture
def text(in_memory):
    corpus = in_memory(LENGTHS, 19)
    corpus.where, corpus.tokens_total = "here", sum(LENGTHS)
    return corpus


def read(stretches):
    """Read all stretches, a few tokens at a time.

    Return the tokens (count, length + 1) and the documents of the predicted tokens (count, length).
    """
    cuts = [0, *range(1, stretches.length + 1, 5), stretches.length + 1]
    portions = list(pairwise(cuts))
    rows = range(stretches.count)
    tokens = [np.concatenate([stretches.tokens(k, *portion) for portion in portions]) for k in rows]
    documents = [np.concatenate([stretches.documents(k, *portion) for portion in portions[1:]]) for k in rows]
    return np.array(tokens), stretches.numbers[np.array(documents)]


def test_joined_segments_are_consecutive_in_evaluation_order(text):
    order = Permutation(len(LENGTHS), *ORDER).all()
    stream = np.concatenate([text.documents[number] for number in order])
    belongs = np.concatenate([np.full(LENGTHS[number], number) for number in order])
    stretches = open_stretches(text, 40, isolated=False)
    tokens, documents = read(stretches)
    assert stretches.count == 4 == (sum(LENGTHS) - 1) // 40
    for k in range(4):
        np.testing.assert_array_equal(tokens[k], stream[40 * k : 40 * k + 41])
        np.testing.assert_array_equal(documents[k], belongs[40 * k + 1 : 40 * k + 41])
    np.testing.assert_array_equal(stretches.numbers, np.unique(belongs[1:161]))


def test_isolated_segments_come_from_documents_of_at_least_the_length(text):
    stretches = open_stretches(text, 16, isolated=True)
    tokens, documents = read(stretches)
    expected = {
        (n, 16 * k): text.documents[n][16 * k : 16 * k + 17]
        for n in (0, 2, 5, 6)
        for k in range((LENGTHS[n] - 1) // 16)
    }
    assert stretches.count == len(expected) == 1 + 4 + 1 + 2
    assert {tuple(row) for row in tokens.tolist()} == {tuple(row) for row in expected.values()}
    np.testing.assert_array_equal(stretches.numbers, [0, 2, 5, 6])
    for row, document in zip(tokens, documents[:, 0], strict=True):
        assert any((row == piece).all() for (n, _), piece in expected.items() if n == document)


@pytest.mark.parametrize("isolated", [False, True])
def test_token_limit_keeps_the_first_segments(text, isolated):
    whole, part = (open_stretches(text, 16, isolated, tokens) for tokens in (None, 50))
    assert part.count == 3
    np.testing.assert_array_equal(read(part)[0], read(whole)[0][:3])


@pytest.mark.parametrize(("isolated", "reason"), [(False, "have 166 tokens"), (True, "longest document has 70 tokens")])
def test_length_longer_than_the_text_is_refused(text, isolated, reason):
    most = longest(text, isolated)
    assert open_stretches(text, most, isolated).count == 1
    with pytest.raises(TooShortError, match=reason):
        open_stretches(text, most + 1, isolated)


def test_token_limit_below_the_longest_length_is_refused(text):
    with pytest.raises(TooShortError, match="limit of 31 tokens to read is less than the longest length, 32"):
        open_stretches(text, 32, isolated=False, tokens=31)
