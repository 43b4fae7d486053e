from __future__ import annotations

import pytest
import torch

from bst_dist.generation.decoding import Generation
from bst_dist.generation.sampling import SamplingConfig
from bst_dist.model.layers import MIXERS
from tests.generation.decoder import Decoder

GREEDY = SamplingConfig(temperature=0)


def continued(model, prompts, samples, sampling, count, never=None):
    """Generate `count` tokens of each sample; return them by (prompt, sample)."""
    generation = Generation(model, dict(enumerate(prompts)), samples, sampling, never)
    drawn = {sample: [] for sample in samples}
    while generation.running:
        for prompt, sample, token in generation.step():
            drawn[prompt, sample].append(token)
            if len(drawn[prompt, sample]) == count:
                generation.end(prompt, sample)
    return drawn


@pytest.mark.parametrize("prompt", [1, 3, 8, 21])
@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "SH"},
        {"variant": "MH"},
        {"variant": "MF"},
        {"attention": {"position": "rope"}},
        {"ssm": {"kernel": "s4-dplr", "chunk": 4, "state": 4}},
        {"ssm": {"kernel": "explicit", "length": 16}},
        {"ssm": {"kernel": "hyena", "length": 16}},
        *({"mixer": mixer} for mixer in MIXERS if mixer != "bst"),
    ],
    ids=str,
)
def test_generation_equals_the_parallel_forward_token_by_token(make_model, changes, prompt):
    model = make_model(**changes)
    text = torch.randint(0, 19, (40,)).tolist()
    decoder = Decoder(model)
    one_at_a_time = [decoder.read(text[:prompt]), *(decoder.read([token]) for token in text[prompt:])]
    parallel = model.logits(model.hidden(torch.tensor([text])))[0]  # (40, V)
    torch.testing.assert_close(torch.stack(one_at_a_time), parallel[prompt - 1 :], rtol=1e-9, atol=1e-9)


def test_a_long_prompt_is_read_in_slices(make_model):
    model = make_model()
    lengths = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    text = torch.randint(0, 19, (1003,)).tolist()
    logits = Decoder(model).read(text)
    assert max(lengths) == 16 * 8  # BLOCKS_AT_ONCE blocks
    parallel = model.logits(model.hidden(torch.tensor([text + [0] * 5])))[0, 1002]
    torch.testing.assert_close(logits, parallel, rtol=1e-9, atol=1e-9)


def test_greedy_tokens_are_the_likeliest_of_the_parallel_forward(make_model):
    model, prompt = make_model(), [4, 2, 7]
    (drawn,) = continued(model, [prompt], [(0, 0)], GREEDY, 30).values()
    text = prompt + drawn
    likeliest = model.logits(model.hidden(torch.tensor([text + [0] * (-len(text) % 8)]))).argmax(-1)
    assert likeliest[0, 2:32].tolist() == drawn


@pytest.mark.parametrize("changes", [{}, {"variant": "MF"}, {"mixer": "block-recurrent"}], ids=str)
def test_samples_drawn_together_equal_samples_drawn_alone(make_model, changes):
    """Prompts end in the first block, at a block's end, and after several blocks; some have a common prefix."""
    model = make_model(**changes)
    prompts = [torch.randint(0, 19, (n,)).tolist() for n in (1, 8, 9, 23, 16, 60)]
    samples = [(prompt, sample) for prompt in range(6) for sample in range(2)]
    sampling = SamplingConfig(temperature=1, top_p=0.9, top_k=9, repetition_penalty=1.3)
    together = continued(model, prompts, samples, sampling, 12)
    for sample in [(prompt, prompt % 2) for prompt in range(6)]:
        assert together[sample] == continued(model, prompts, [sample], sampling, 12)[sample]
    assert together[0, 0] != together[0, 1]


def test_whole_blocks_of_a_prompt_are_read_once_for_all_samples(make_model):
    model, read = make_model(), []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2].numel()))
    Generation(model, {0: [1] * 41}, [(0, sample) for sample in range(5)], GREEDY)
    assert sum(read) == 40


def test_the_seed_decides_the_tokens(make_model):
    def drawn(seed):
        return continued(make_model(), [[1]], [(0, 0)], SamplingConfig(temperature=1, top_p=1, seed=seed), 40)

    assert drawn(5) == drawn(5) != drawn(6)


def test_forbidden_tokens_are_never_drawn(make_model):
    never = torch.ones(19, dtype=torch.bool)
    never[[2, 5]] = False
    (drawn,) = continued(make_model(), [[1]], [(0, 0)], SamplingConfig(), 30, never).values()
    assert set(drawn) <= {2, 5}


def test_repetition_penalty_applies_to_prompt_and_drawn_tokens(make_model):
    """Compared with the formula of Keskar et al., token by token; prompts longer than two blocks and within a block."""
    model, penalty = make_model(), 1.5
    for prompt in ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [7, 7]):
        sampling = SamplingConfig(temperature=0, repetition_penalty=penalty)
        (drawn,) = continued(model, [prompt], [(0, 0)], sampling, 15).values()
        decoder, text = Decoder(model), list(prompt)
        logits = decoder.read(prompt)
        for token in drawn:
            for read in set(text):
                logits[read] = logits[read] * penalty if logits[read] < 0 else logits[read] / penalty
            assert int(logits.argmax()) == token
            text.append(token)
            logits = decoder.read([token])
        assert drawn != next(iter(continued(model, [prompt], [(0, 0)], GREEDY, 15).values()))
