from __future__ import annotations

from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bst_dist.evaluate.decoding import Decoder, SamplingConfig, TextStream, draw, generate, portions, printable
from bst_dist.model.layers import MIXERS


@pytest.mark.parametrize("prompt", [1, 3, 8, 21])
@pytest.mark.parametrize("changes", [
    {"variant": "SH"}, {"variant": "MH"}, {"variant": "MF"}, {"attention": {"position": "rope"}},
    {"ssm": {"kernel": "s4-dplr", "chunk": 4, "state": 4}}, *({"mixer": mixer} for mixer in MIXERS if mixer != "bst"),
], ids=str)  # fmt: skip
def test_generation_equals_the_parallel_forward_token_by_token(make_model, changes, prompt):
    model = make_model(**changes)
    text = torch.randint(0, 19, (40,)).tolist()
    decoder = Decoder(model)
    one_at_a_time = [decoder.read(text[:prompt]), *(decoder.read([token]) for token in text[prompt:])]
    # The parallel form gives losses only: of every possible label at every position, hence all probabilities.
    ids = torch.tensor([text]).expand(19, -1)
    labels = torch.arange(19).view(-1, 1).expand(-1, 40)
    parallel = -model(ids, labels).per_token.T  # (40, V) log-probabilities
    got = torch.stack(one_at_a_time).log_softmax(-1)
    torch.testing.assert_close(got, parallel[prompt - 1 :].double(), rtol=1e-9, atol=1e-9)


def test_greedy_tokens_are_the_likeliest_of_the_parallel_forward(make_model):
    model, prompt = make_model(), [4, 2, 7]
    text = prompt + list(islice(generate(Decoder(model), prompt, SamplingConfig(temperature=0)), 30))
    for end in range(3, 33):
        padded = text[:end] + [0] * (-end % 8)
        labels = torch.arange(19).view(-1, 1).expand(-1, len(padded))
        losses = model(torch.tensor([padded]).expand(19, -1), labels).per_token[:, end - 1]
        assert int(losses.argmin()) == text[end]


@given(position=st.integers(0, 200), count=st.integers(0, 700), chunk=st.sampled_from([1, 2, 8, 64]),
       block=st.sampled_from([8, 32]))  # fmt: skip
def test_portions_are_whole_blocks_or_within_one_and_whole_chunks_or_within_one(position, count, chunk, block):
    lengths = list(portions(position, count, block, chunk))
    assert sum(lengths) == count
    for length in lengths:
        offset, small = position % block, min(chunk, block)
        assert (offset == 0 and length % block == 0) or offset + length <= block
        assert length % small == 0 or length < small
        position += length


def test_the_same_seed_draws_the_same_tokens_and_another_does_not(make_model):
    model = make_model()

    def drawn(seed):
        return list(islice(generate(Decoder(model), [1], SamplingConfig(temperature=1, top_p=1, seed=seed)), 40))

    assert drawn(5) == drawn(5) != drawn(6)


def test_nucleus_keeps_the_fewest_tokens_that_reach_top_p():
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    draws = torch.Generator().manual_seed(0)
    seen = {draw(logits, SamplingConfig(temperature=1, top_p=0.7, seed=0), draws) for _ in range(200)}
    assert seen == {1, 2}
    assert draw(logits, SamplingConfig(temperature=1, top_p=1e-6), draws) == 1


def test_draws_follow_the_tempered_distribution():
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    draws = torch.Generator().manual_seed(0)
    sampling = SamplingConfig(temperature=0.5, top_p=1)
    counts = torch.bincount(torch.tensor([draw(probabilities.log(), sampling, draws) for _ in range(20000)]))
    expected = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(counts / 20000, expected, atol=0.012, rtol=0)


def test_forbidden_tokens_are_never_drawn(make_model):
    never = torch.ones(19, dtype=torch.bool)
    never[[2, 5]] = False
    assert set(islice(generate(Decoder(make_model()), [1], SamplingConfig(), never), 30)) <= {2, 5}


@given(text=st.text(), cuts=st.lists(st.integers(0, 50)))
def test_text_appears_whole_however_its_bytes_are_cut(text, cuts):
    data = text.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    written = []
    stream = TextStream(written.append)
    for start, stop in pairwise(places):
        stream.add(data[start:stop])
    stream.close()
    assert "".join(written) == text
    assert "�" not in "".join(written) or "�" in text


def test_an_unfinished_character_ends_as_a_replacement():
    written = []
    stream = TextStream(written.append)
    stream.add(b"a\xf0\x9f")
    assert written == ["a"]
    stream.close()
    assert written == ["a", "�"]


def test_control_characters_cannot_reach_the_terminal():
    assert printable("a\tb\n\x1b[2J\x07\x9b") == "a\tb\n␛[2J␇�"
