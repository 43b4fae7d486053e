from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bst_base.errors import UserError
from bst_base.settings import ConfigError
from bst_dist.study.evaluation.trained import open_run, tokenizer_of

pytest.importorskip("lm_eval")
from bst_dist.study.harness import model as harness_model
from bst_dist.study.harness.model import HarnessModel


@pytest.fixture
def make_harness(make_run):
    """Makes the harness's model of a run, with noise added to all weights."""

    def make(documents: str = "joined") -> HarnessModel:
        run_dir = make_run(documents=documents)
        trained = open_run(run_dir)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trained.model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return HarnessModel(trained, tokenizer_of(run_dir, trained.recipe))

    return make


def literal(model, tokens: list[int]) -> torch.Tensor:
    """Return the log-probabilities (n, V) of the token after each token, from one forward pass with padding."""
    padded = torch.tensor([tokens + [0] * (-len(tokens) % 8)])
    with torch.no_grad():
        x = model.norm(model.hidden(padded))[0, : len(tokens)]
        return (x @ model.embedding.weight.T * model.config.width**-0.5).log_softmax(-1)


def expected(harness, context: list[int], continuation: list[int], uniform: bool = False) -> tuple[float, bool]:
    nats, greedy = 0.0, True
    for number, token in enumerate(continuation):
        before = context + continuation[:number]
        if not before:
            nats, greedy = nats + math.log(harness.text.vocab_size), False
            continue
        after = literal(harness.model, before)[-1]
        nats, greedy = nats - float(after[token]), greedy and int(after.argmax()) == token
    return -nats, greedy


def instances(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


WORDS = "naïve café for x = ( ) return é 😀 12 "


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_empty_continuation_has_probability_one(make_harness, documents):
    assert make_harness(documents)._loglikelihood_tokens([(("x", ""), [5, 6], [])]) == [(0, True)]


@pytest.mark.parametrize("at_once", [1024, 3])
@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_loglikelihoods_equal_those_computed_token_by_token(make_harness, monkeypatch, documents, at_once):
    monkeypatch.setattr(harness_model, "LOGITS_AT_ONCE", at_once)
    harness = make_harness(documents)
    asked = [("", "for x"), ("for", " x"), (WORDS * 3, "return"), (WORDS * 3, "x = " * 8), (WORDS, "(x"), ("x ", "y")]
    found = harness.loglikelihood(instances(*asked), disable_tqdm=True)
    begin = [] if documents == "isolated" else [harness.text.eos_id]
    for (context, continuation), got in zip(asked, found, strict=True):
        stripped = context.rstrip()
        whole = harness.text.encode(context + continuation).tolist()
        cut = len(harness.text.encode(stripped)) if context else 0
        value, greedy = expected(harness, begin + whole[:cut], whole[cut:])
        assert got == (pytest.approx(value, rel=1e-5), greedy)


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_continuation_that_merges_with_its_context_has_probability_below_one(make_harness, documents):
    harness = make_harness(documents)
    context, choices = merging_choices(harness)
    found = [value for value, _ in harness.loglikelihood(instances(*[(context, choice) for choice in choices]))]
    assert 0 not in found
    begin = [] if documents == "isolated" else [harness.text.eos_id]
    texts = [expected(harness, begin, harness.text.encode(context + choice).tolist())[0] for choice in choices]
    # Choices are ranked like the whole texts, because the likelihood of the context is the same for all.
    assert np.diff(found) == pytest.approx(np.diff(texts), rel=1e-4, abs=1e-5)


def merging_choices(harness) -> tuple[str, list[str]]:
    """Return a context, one continuation that merges with its last token, and one that does not."""
    encode = harness.text.encode
    for token in range(harness.text.vocab_size):
        piece = harness.text.bytes_of(token).decode(errors="ignore")
        context = f"x {piece[:-1]}".rstrip()
        if (
            len(piece) > 2
            and context.endswith(piece[:-1].strip())
            and len(encode(context + piece[-1])) <= len(encode(context))
        ):
            return context, [piece[-1], "="]
    raise AssertionError("no token of this vocabulary begins with another")


def test_greedy_continuations_are_marked_as_greedy(make_harness):
    harness = make_harness()
    context = [harness.text.eos_id, *harness.text.encode(WORDS * 2).tolist()]
    written = []
    for _ in range(12):
        written.append(int(literal(harness.model, context + written)[-1].argmax()))
    other = [*written[:-1], (written[-1] + 1) % 320]
    found = harness._loglikelihood_tokens([(("c", str(i)), context, each) for i, each in enumerate([written, other])])
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] == pytest.approx(expected(harness, context, written)[0], rel=1e-5)


def test_context_is_computed_once_for_all_continuations(make_harness, monkeypatch):
    harness = make_harness()
    read = []
    hidden = type(harness.model).hidden

    def counted(self, ids, *args, **kwargs):
        read.append(ids.numel())
        return hidden(self, ids, *args, **kwargs)

    monkeypatch.setattr(type(harness.model), "hidden", counted)
    context = WORDS * 20
    harness.loglikelihood(instances(*[(context, f" {i}") for i in range(4)]), disable_tqdm=True)
    length = len(harness.tok_encode(context))
    assert length <= sum(read) < length + 4 * 16
    monkeypatch.setattr(harness_model, "TOKENS_AT_ONCE", 8)
    one_by_one = harness.loglikelihood(instances(*[(context, f" {i}") for i in range(4)]), disable_tqdm=True)
    monkeypatch.undo()
    together = harness.loglikelihood(instances(*[(context, f" {i}") for i in range(4)]), disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in one_by_one], [v for v, _ in together], rtol=1e-5)


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_rolling_loglikelihoods_equal_those_of_whole_texts(make_harness, documents):
    harness = make_harness(documents)
    texts = [WORDS * 5, "x", WORDS]
    found = harness.loglikelihood_rolling(instances(*[(text,) for text in texts]))
    begin = [] if documents == "isolated" else [harness.text.eos_id]
    for text, got in zip(texts, found, strict=True):
        assert got == pytest.approx(expected(harness, begin, harness.text.encode(text).tolist())[0], rel=1e-5)
    with pytest.raises(UserError, match="empty text"):
        harness.loglikelihood_rolling(instances(("",)))


def test_texts_are_generated_greedily_until_a_stop_string(make_harness):
    harness = make_harness()
    contexts = [WORDS, WORDS * 2, "x", ""]
    free = harness.generate_until(instances(*[(context, {"max_gen_toks": 24, "until": []}) for context in contexts]))
    for context, got in zip(contexts, free, strict=True):
        ids, written = [harness.text.eos_id, *harness.text.encode(context).tolist()], []
        while len(written) < 24:
            after = literal(harness.model, ids + written)[-1]
            after[
                torch.from_numpy(harness.text.token_bytes == 0) & (torch.arange(320) != harness.text.eos_id)
            ] = -torch.inf
            written.append(int(after.argmax()))
            if written[-1] == harness.text.eos_id:
                break
        assert got == harness.text.decode(written)
    stop = free[0][3:5]
    (cut,) = harness.generate_until(instances((contexts[0], {"max_gen_toks": 24, "until": [stop]})))
    assert cut == free[0][: free[0].index(stop)]


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0),
        ({"do_sample": False}, 0),
        ({"do_sample": True}, 1),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True, "temperature": 0.0}, 0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": False, "temperature": 0.7}, 0),
    ],
)
def test_do_sample_alone_samples_at_temperature_one(given, temperature):
    assert harness_model._settings({"until": [], **given})[0].temperature == temperature


def test_unknown_generation_settings_of_a_task_are_refused(make_harness):
    with pytest.raises(ConfigError, match="num_beams"):
        make_harness().generate_until(instances(("x", {"until": [], "num_beams": 4})))


def test_model_of_isolated_documents_refuses_an_empty_context(make_harness):
    with pytest.raises(UserError, match="empty context"):
        make_harness("isolated").generate_until(instances(("", {"until": []})))
