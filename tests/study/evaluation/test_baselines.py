from __future__ import annotations

import json
import lzma
import math
import shutil
import subprocess

import numpy as np
import pytest

from bst_dist.cli import main
from bst_dist.study.evaluation.baselines import END, Order2, order2_bits_per_byte, xz_bytes
from bst_dist.study.evaluation.baselines import texts as read_texts
from data_pipeline.serve.reader import Corpus

TRAINING = [b"abracadabra", b"", b"banana\xff\x00", b"abba"]


def witten_bell(training: list[bytes], context: tuple[int, ...], symbol: int) -> float:
    """Return the probability by its definition, with new counts for each context."""
    following = []
    for text in training:
        padded = (END, END, *text, END)
        for i in range(2, len(padded)):
            if padded[i - len(context) : i] == context:
                following.append(padded[i])
    shorter = witten_bell(training, context[1:], symbol) if context else 1 / 257
    kinds = len(set(following))
    return (following.count(symbol) + kinds * shorter) / (len(following) + kinds) if following else shorter


@pytest.fixture(scope="module")
def model():
    return Order2(TRAINING)


@pytest.mark.parametrize("text", [b"", b"abra", b"banana", b"zz\x80ab", bytes(range(256))])
def test_bits_of_the_order_2_model_equal_the_definition(model, text):
    padded = (END, END, *text, END)
    expected = -sum(math.log2(witten_bell(TRAINING, padded[i - 2 : i], padded[i])) for i in range(2, len(padded)))
    assert model.bits(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("context", [(END, END), (ord("a"), ord("b")), (7, 9), (7, ord("a"))])
def test_probabilities_after_any_context_sum_to_one(context):
    assert sum(witten_bell(TRAINING, context, symbol) for symbol in range(257)) == pytest.approx(1)


def test_text_similar_to_training_text_costs_fewer_bits(model):
    assert model.bits(b"abrabanana") < model.bits(b"qrxvtzwkjp")


def test_bits_per_byte_is_over_all_held_out_text(model):
    held_out = [b"abab", b"cadabra"]
    estimate = order2_bits_per_byte(TRAINING, held_out)
    assert estimate.value == pytest.approx(sum(model.bits(text) for text in held_out) / 11)


def test_random_bytes_cost_at_least_eight_bits():
    random = np.random.default_rng(0).bytes(20_000)
    assert order2_bits_per_byte([random[:10_000]], [random[10_000:]]).value > 8


def test_xz_is_one_stream_over_all_documents():
    documents = [b"the same line again\n" * 50, b"the same line again\n" * 50]
    size = xz_bytes(documents)
    assert len(lzma.decompress(lzma.compress(b"".join(documents), preset=9))) == 2000
    assert size == len(lzma.compress(b"".join(documents), preset=9)) < 2 * xz_bytes(documents[:1])


@pytest.mark.skipif(shutil.which("xz") is None, reason="the xz program is not installed")
def test_xz_size_equals_that_of_the_xz_program():
    data = b"".join(b"line %d\n" % i for i in range(5000))
    made = subprocess.run(["xz", "-9", "-c"], input=data, capture_output=True, check=True).stdout
    assert abs(xz_bytes([data]) - len(made)) <= 16


def test_texts_are_decoded_exactly_from_their_tokens(corpus, texts):
    stored = [text for split in ("train", "validation") for text in read_texts(Corpus.open(str(corpus), split))]
    assert sorted(stored) == sorted(text.encode() for text in texts.values())


def test_baselines_command_reports_xz_and_order_2(corpus, tmp_path):
    path = tmp_path / "report.json"
    assert main(["baselines", str(corpus), "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    held_out = list(read_texts(Corpus.open(str(corpus), "validation")))
    assert report["xz9_bits_per_byte"] == 8 * len(lzma.compress(b"".join(held_out), preset=9)) / report["bytes"]
    assert 0 < report["order2_bits_per_byte"] < 8
