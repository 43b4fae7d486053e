from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as processors

from bst_dist.generation.sampling import SamplingConfig, draw, draws_of, filtered, without_text

ALL = SamplingConfig(temperature=1, top_p=1)


def test_draws_follow_the_tempered_distribution():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(20_000, -1)
    one = draws_of(0, 0, 0)
    tokens = draw(logits, SamplingConfig(temperature=0.5, top_p=1), [one] * 20_000, None)
    expected = torch.tensor([0.36, 0.09, 0.01]) / 0.46
    torch.testing.assert_close(torch.bincount(tokens) / 20_000, expected, atol=0.012, rtol=0)


def test_each_prompt_and_sample_has_its_own_random_numbers():
    seeds = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    drawn = [tuple(torch.rand(4, generator=draws_of(*seed)).tolist()) for seed in seeds]
    assert len(set(drawn)) == 4
    assert drawn[0] == tuple(torch.rand(4, generator=draws_of(0, 0, 0)).tolist())


def test_temperature_zero_takes_the_likeliest_of_each_row():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    sampling = SamplingConfig(temperature=0)
    assert draw(logits, sampling, [draws_of(0, 0, 0)] * 2, None).tolist() == [1, 0]
    penalised = sampling.model_copy(update={"repetition_penalty": 4.0})
    seen = torch.tensor([[False, True, False], [False, True, False]])
    assert draw(logits, penalised, [draws_of(0, 0, 0)] * 2, seen).tolist() == [2, 0]


def test_nucleus_keeps_the_fewest_tokens_that_reach_top_p():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.3, 0.1]]))
    kept = filtered(logits, ALL.model_copy(update={"top_p": 0.7})) > -torch.inf
    assert kept.tolist() == [[False, True, True, False]]
    assert (filtered(logits, ALL.model_copy(update={"top_p": 1e-6})) > -torch.inf).sum() == 1


@settings(deadline=None)  # the first call imports
@given(
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    penalty=st.floats(0.5, 2),
    seed=st.integers(0, 99),
)
def test_sampling_filters_equal_those_of_transformers(temperature, top_k, top_p, min_p, penalty, seed):
    torch.manual_seed(seed)
    logits, read = torch.randn(3, 25), torch.randint(0, 25, (3, 7))
    seen = torch.zeros(3, 25, dtype=torch.bool).scatter_(1, read, True)
    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    chain = [processors.RepetitionPenaltyLogitsProcessor(penalty), processors.TemperatureLogitsWarper(temperature)]
    chain += [processors.TopKLogitsWarper(top_k)] if top_k else []
    chain += [processors.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [processors.MinPLogitsWarper(min_p)] if min_p else []
    expected = logits.clone()
    for processor in chain:
        expected = processor(read, expected)
    torch.testing.assert_close(filtered(logits, sampling, seen), expected)


def test_sampling_defaults_are_valid():
    assert SamplingConfig.model_validate(SamplingConfig().model_dump()) == SamplingConfig()


def test_min_p_of_one_keeps_the_likeliest_token():
    kept = filtered(torch.tensor([[0.0, 2.0, 1.0]]), ALL.model_copy(update={"min_p": 1.0})) > -torch.inf
    assert kept.tolist() == [[False, True, False]]


def test_ids_without_text_are_not_drawn_but_the_end_of_a_document_is():
    """The model has seven ids, the tokenizer five: 0 is the end of a document, 3 has no text."""
    tokenizer = SimpleNamespace(vocab_size=5, token_bytes=np.array([0, 1, 4, 0, 2]), eos_id=0, has_text=True)
    assert without_text(7, tokenizer).tolist() == [False, False, False, True, False, True, True]
    tokenizer.has_text, tokenizer.token_bytes = False, np.zeros(5, int)
    assert without_text(7, tokenizer).tolist() == [False] * 5 + [True] * 2
