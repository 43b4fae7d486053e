from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bst_dist.study.ablation.figure import draw
from bst_dist.study.ablation.interventions import Intervention, intervened
from bst_dist.study.ablation.measure import Text, ablate, block_bins, document_bins, summary
from bst_dist.study.evaluation import scoring

END, BLOCK = 3, 8
LENGTHS = [21, 1, 70, 16, 8, 17, 33]
PLANNED = [
    (Intervention("zero"), (1, 2)),
    (Intervention("noise", 1.0), (2,)),
    (Intervention("delay", 2), (1,)),
    (Intervention("own-block"), (0, 1, 2)),
]


def text_of(corpus, begin=END, lengths=None) -> Text:
    return Text(corpus, np.array(LENGTHS if lengths is None else lengths), np.arange(19), begin)


def literal(model, tokens, begin) -> np.ndarray:
    """Return each token's nats, with the document in one pass."""
    ids = tokens.astype(int).tolist()
    inputs = ([] if begin is None else [begin]) + ids[:-1]
    labels = ids[begin is None :]
    padding = [0] * (-len(inputs) % BLOCK)
    losses = model(torch.tensor([inputs + padding]), torch.tensor([labels + padding]))
    return losses.per_token[0, : len(inputs)].numpy()


@pytest.mark.parametrize("begin", [END, None], ids=["joined", "isolated"])
def test_increases_equal_paired_losses_of_whole_documents(make_model, in_memory, begin):
    model, corpus = make_model(), in_memory(LENGTHS, 19)
    untouched, found = ablate(model, text_of(corpus, begin), PLANNED, slice_length=2 * BLOCK)
    documents = [tokens for tokens in corpus.documents if begin is not None or len(tokens) > 1]
    before = [literal(model, tokens, begin) for tokens in documents]
    assert untouched.nats.sum() == pytest.approx(sum(nats.sum() for nats in before), rel=1e-9)
    for (intervention, layers), increase in zip(PLANNED, found, strict=True):
        with intervened(model, intervention, layers):
            after = [literal(model, tokens, begin) for tokens in documents]
        more = [a - b for a, b in zip(after, before, strict=True)]
        sums, counts = np.array([m.sum() for m in more]), np.array([len(m) for m in more])
        mean = sums.sum() / counts.sum()
        n = len(documents)
        error = math.sqrt(n / (n - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum()
        assert increase.loss.value == pytest.approx(mean, rel=1e-8, abs=1e-12)
        assert increase.loss.standard_error == pytest.approx(error, rel=1e-8)
        text_bytes = sum(tokens[begin is None :].astype(int).sum() for tokens in documents)
        assert increase.bits_per_byte.value == pytest.approx(sums.sum() / math.log(2) / text_bytes, rel=1e-8)
        for edges, values, place in (
            (document_bins(max(LENGTHS), BLOCK), increase.in_document, lambda at: at),
            (block_bins(BLOCK), increase.in_block, lambda at: at % BLOCK),
        ):
            for first, last, value in zip(edges, edges[1:], values, strict=False):
                inside = [m[(place(np.arange(len(m))) >= first) & (place(np.arange(len(m))) < last)] for m in more]
                assert value.value == pytest.approx(np.concatenate(inside).mean(), rel=1e-8, abs=1e-12)


def numbers(estimate) -> tuple[float, float]:
    return estimate.value, estimate.standard_error


def test_losses_do_not_depend_on_slices_batches_or_limits(make_model, in_memory, monkeypatch):
    model, corpus = make_model(variant="MF"), in_memory(LENGTHS, 19)
    _, whole = ablate(model, text_of(corpus), PLANNED, slice_length=128)
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 8)
    _, pieces = ablate(model, text_of(corpus), PLANNED, slice_length=BLOCK)
    _, first = ablate(model, text_of(corpus, lengths=np.minimum(LENGTHS, BLOCK)), PLANNED, slice_length=BLOCK)
    for one, other, beginning in zip(whole, pieces, first, strict=True):
        np.testing.assert_allclose(numbers(one.loss), numbers(other.loss), rtol=1e-9)
        for at, there in zip(one.in_block, other.in_block, strict=True):
            np.testing.assert_allclose(numbers(at), numbers(there), rtol=1e-8, atol=1e-14)
        np.testing.assert_allclose(numbers(one.in_document[0]), numbers(beginning.loss), rtol=1e-8, atol=1e-14)


def test_skipped_documents_are_not_samples(make_model, in_memory):
    model = make_model()
    some = [21, 0, 70, 0, 8]
    _, found = ablate(model, text_of(in_memory([21, 30, 70, 9, 8], 19), lengths=some), PLANNED, slice_length=BLOCK)
    assert all(increase.loss.standard_error > 0 for increase in found)
    corpus = in_memory([21, 30, 70, 9, 8], 19)
    corpus.documents = [corpus.documents[i] for i in (0, 2, 4)]
    _, alone = ablate(model, text_of(corpus, lengths=[21, 70, 8]), PLANNED, slice_length=BLOCK)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(numbers(one.loss), numbers(other.loss), rtol=1e-9)


def test_long_document_is_read_in_slices(make_model, in_memory):
    model, corpus, done = make_model(), in_memory([1000], 19), []
    planned = [(Intervention("shuffle", 3), (1, 2))]
    ablate(model, text_of(corpus, lengths=[1000]), planned, slice_length=32, progress=done.append)
    assert corpus.longest_read <= 33
    assert done[-1] == 2000 and done == sorted(done)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("begin", [END, None], ids=["joined", "isolated"])
@pytest.mark.parametrize("longest", [BLOCK - 2, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 2])
def test_bins_end_with_the_longest_text(make_model, in_memory, begin, longest):
    corpus = in_memory([longest, 5], 19)
    untouched, increases = ablate(make_model(), text_of(corpus, begin, [longest, 5]), PLANNED, slice_length=BLOCK)
    found = summary(untouched, increases, 1.0)
    predicted = longest - (begin is None)
    assert found.document_edges[-2] < predicted <= found.document_edges[-1]
    for values in (found.in_document, found.tokens_in_document, *(each.in_document for each in increases)):
        assert len(values) == len(found.document_edges) - 1
    assert found.block_edges[-1] == min(predicted, BLOCK)
    for values in (found.in_block, *(each.in_block for each in increases)):
        assert len(values) == len(found.block_edges) - 1
        assert all(math.isfinite(value.value) for value in values)
    draw(found, BLOCK)


def test_bins_of_positions_in_document_and_block():
    assert document_bins(70, 8).tolist() == [0, 8, 16, 32, 64, 128]
    assert block_bins(128).tolist() == list(range(0, 129, 8))
    assert block_bins(8).tolist() == list(range(9))
    assert block_bins(24).tolist()[:4] == [0, 1, 3, 4]
