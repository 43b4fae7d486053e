from __future__ import annotations

import numpy as np
import pytest
import torch

from bst_base.settings import parse
from bst_dist.config import Recipe
from bst_dist.model.config import ModelConfig
from bst_dist.plan.memory.live import LiveBytes
from bst_dist.study.evaluation import scoring
from bst_dist.study.evaluation.trained import Trained
from bst_dist.study.lengths.measure import LengthError, how, measure, position_bins
from bst_dist.study.lengths.text import open_stretches
from bst_dist.study.statistics import ratio

TRAINED = 16
STREAMING = {
    "SH": ("bst", "SH", {}),
    "MH": ("bst", "MH", {}),
    "MF": ("bst", "MF", {}),
    "SH s4-dplr": ("bst", "SH", {"ssm": {"kernel": "s4-dplr", "state": 4, "chunk": 4}}),
    "MF s4-dplr": ("bst", "MF", {"ssm": {"kernel": "s4-dplr", "state": 4, "chunk": 4}}),
    "SH explicit": ("bst", "SH", {"ssm": {"kernel": "explicit", "length": 16}}),
    "MF hyena": ("bst", "MF", {"ssm": {"kernel": "hyena", "length": 16, "hidden": 4}}),
    "sliding": ("sliding", "SH", {}),
    "transformer-xl": ("transformer-xl", "SH", {"transformer_xl": {"window": 16}}),
    "block-recurrent": ("block-recurrent", "SH", {"block_recurrent": {"states": 4}}),
    "gss": ("gss", "SH", {}),
    "ssm": ("ssm", "SH", {}),
}


@pytest.fixture
def make_trained(make_model, tmp_path):
    """Makes a model, in double precision, that counts as trained on sequences of 16 tokens."""

    def make(mixer="bst", variant="SH", documents="joined", **changes) -> Trained:
        model = make_model(mixer, variant, **changes)
        recipe = parse(
            Recipe,
            {
                "name": "small",
                "model": model.config.model_dump(),
                "data": {"corpus": "none", "documents": documents},
                "train": {"steps": 1, "sequence_length": TRAINED, "sequences": 1, "precision": "fp32"},
            },
        )
        return Trained(tmp_path, recipe, 1, model)

    return make


@pytest.fixture
def make_text(in_memory):
    def make(lengths):
        corpus = in_memory(lengths, 19)
        corpus.where, corpus.tokens_total = "here", sum(lengths)
        corpus.token_bytes = lambda: np.arange(19)
        return corpus

    return make


def at_once(model, tokens) -> np.ndarray:
    """Return the nats of all tokens except the first, from one forward pass without a past."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        return model(ids[:, :-1], ids[:, 1:]).per_token[0].numpy()


def literal(trained, text, length, longest, isolated=False):
    """Return (document, position, nats) of every token, from one forward pass per sequence."""
    stretches = open_stretches(text, longest, isolated)
    rows = []
    for k in range(stretches.count):
        for start in range(0, longest, length):
            stop = min(start + length, longest)
            nats = at_once(trained.model, stretches.tokens(k, start, stop + 1))
            numbers = stretches.numbers[stretches.documents(k, start + 1, stop + 1)]
            rows += zip(numbers, range(1, stop - start + 1), nats, strict=True)
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_losses_at_each_length_equal_those_of_single_sequences(make_trained, make_text, documents):
    trained, text = make_trained(documents=documents), make_text([70, 3, 150, 90, 65, 20, 129])
    found = measure(trained, text, [8, 16, 64])
    for result in found:
        document, position, nats = literal(trained, text, result.length, 64, documents == "isolated")
        assert result.tokens == len(nats)
        np.testing.assert_array_equal(result.numbers, np.unique(document))
        sums = [nats[document == number].sum() for number in result.numbers]
        np.testing.assert_allclose(result.score.nats, sums, rtol=1e-10)
        np.testing.assert_array_equal(result.score.tokens, [(document == number).sum() for number in result.numbers])
        assert result.nats_per_token.value == pytest.approx(nats.mean())
        for at in result.positions:
            there = (position >= at.first) & (position <= at.last)
            assert at.tokens == there.sum()
            assert at.nats_per_token.value == pytest.approx(nats[there].mean())
        assert result.positions[-1].last == result.length


def test_lengths_are_compared_in_paired_differences(make_trained, make_text):
    trained, text = make_trained(), make_text([70, 3, 150, 90, 65, 20, 129])
    short, own, long = measure(trained, text, [8, TRAINED, 64])
    for result in (short, long):
        np.testing.assert_array_equal(result.score.tokens, own.score.tokens)
        np.testing.assert_array_equal(result.score.bytes, own.score.bytes)
        difference = result.nats_per_token.value - own.nats_per_token.value
        assert result.versus_trained.value == pytest.approx(difference)
        assert result.versus_trained == ratio(result.score.nats - own.score.nats, own.score.tokens)
        assert result.versus_trained.standard_error < own.nats_per_token.standard_error
    assert own.versus_trained[:2] == (0, 0)
    assert {at.versus_trained[:2] for at in own.positions} == {(0, 0)}
    assert measure(trained, text, [8])[0].versus_trained is None


def test_positions_are_compared_with_the_same_tokens_at_the_trained_length(make_trained, make_text):
    trained, text = make_trained(), make_text([70, 3, 150, 90, 65, 20, 129])
    trained.model.float()  # the reference's losses are kept in fp32
    _, long = measure(trained, text, [TRAINED, 64])
    _, position, nats = literal(trained, text, 64, 64)
    reference = literal(trained, text, TRAINED, 64)[2]
    for at in long.positions:
        there = (position >= at.first) & (position <= at.last)
        expected = nats[there].mean() - reference[there].mean()
        assert at.versus_trained.value == pytest.approx(expected, abs=1e-5)
        assert (at.versus_trained.standard_error > 0) == (at.last > TRAINED)


@pytest.mark.parametrize("name", STREAMING)
def test_streamed_losses_of_long_sequences_equal_those_of_one_pass(make_trained, make_text, name):
    mixer, variant, changes = STREAMING[name]
    trained, text = make_trained(mixer, variant, **changes), make_text([900, 800, 1300])
    for dtype, length, tolerance in ((torch.float64, 2048, 1e-9), (torch.float32, 1024, 2e-5)):
        trained.model.to(dtype)
        (result,) = measure(trained, text, [length], tokens=length)
        nats = at_once(trained.model, open_stretches(text, length, isolated=False).tokens(0, 0, length + 1))
        assert result.nats_per_token.value == pytest.approx(nats.mean(), rel=tolerance)
        last = result.positions[-1]
        assert last.nats_per_token.value == pytest.approx(nats[last.first - 1 :].mean(), rel=10 * tolerance)


@pytest.mark.parametrize("name", STREAMING)
def test_memory_does_not_grow_with_the_length(make_trained, make_text, name, monkeypatch):
    mixer, variant, changes = STREAMING[name]
    trained, text = make_trained(mixer, variant, **changes), make_text([700, 900])
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", TRAINED)  # one row at a time at every length
    peaks = []
    for length in (4 * TRAINED, 16 * TRAINED):
        with LiveBytes() as memory:
            measure(trained, text, [length], tokens=16 * TRAINED)
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1] > 0
    assert text.longest_read <= TRAINED + 1


def test_unsupported_lengths_of_a_model_are_refused(make_trained):
    def config(**changes) -> ModelConfig:
        return make_trained(**changes).recipe.model

    assert how(config(), 1024) == how(config(mixer="transformer-xl"), 1024) == "carried"
    explicit = config(ssm={"kernel": "explicit", "length": 16})
    assert [how(explicit, 16), how(explicit, 24)] == ["carried", "fir"]
    full = config(mixer="full", full={"longest": 64})
    assert how(full, 64) == "cache"
    with pytest.raises(LengthError, match="configured for at most 64 tokens"):
        how(full, 72)
    with pytest.raises(LengthError, match="length 20 is not a multiple of the model's block, 8: try 16"):
        how(config(), 20)


def test_full_attention_uses_a_growing_cache(make_trained, make_text):
    trained, text = make_trained("full"), make_text([100, 200])
    (result,) = measure(trained, text, [256])
    nats = at_once(trained.model, open_stretches(text, 256, isolated=False).tokens(0, 0, 257))
    assert (result.how, result.nats_per_token.value) == ("cache", pytest.approx(nats.mean()))


@pytest.mark.parametrize(
    ("length", "trained", "expected"),
    [
        (1, 16, [1]),
        (7, 16, [1, 2, 3, 4, 6, 7]),
        (16, 16, [1, 2, 3, 4, 6, 8, 11, 16]),
        (128, 16, [1, 2, 3, 4, 6, 8, 11, 16, 32, 64, 128]),
        (56, 16, [1, 2, 3, 4, 6, 8, 11, 16, 32, 56]),
        (48, 24, [1, 2, 3, 4, 6, 8, 11, 16, 23, 24, 48]),
    ],
)
def test_position_bins_for_lengths_below_and_above_the_trained_length(length, trained, expected):
    assert position_bins(length, trained).tolist() == expected
