"""The number of graphs that a run compiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bst_dist.model.attention import flex
from bst_dist.study.evaluation.scoring import score
from tests.cuda_path.models import BLOCK, VOCABULARY, build, tokens
from tests.generation.decoder import Decoder


class Documents:
    """Random documents of many lengths."""

    def __init__(self, count: int):
        random = np.random.default_rng(0)
        self.ids = [random.integers(0, VOCABULARY, n) for n in random.integers(20, 2000, count)]
        self.lengths = np.array([len(ids) for ids in self.ids])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.ids[document][start:stop]


@pytest.mark.parametrize("name", ["SH", "Transformer-XL", "full T5"])
def test_training_evaluation_and_generation_compile_four_graphs_of_attention_and_one_of_the_loss(name, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(flex, "BACKEND", counter)
    model = build(name, placement="all", full={"longest": 4096})  # one kind of attention
    model.fused_loss = True
    for _ in range(2):  # training; the backward pass is compiled together with the forward pass
        model(*tokens(4 * BLOCK))
    with torch.no_grad():  # evaluation during training, with another number of rows
        model(*tokens(4 * BLOCK, rows=3))
    decoder = Decoder(model)  # a short sample, then a longer one: a prompt longer than some blocks, then token by token
    for prompt in (10, 3 * BLOCK + 70):
        decoder = Decoder(model)
        decoder.read([1] * prompt)
        for token in range(5):
            decoder.read([token])
    found = Documents(12)
    monkeypatch.setattr("bst_dist.study.evaluation.scoring.TOKENS_AT_ONCE", 2048)
    score(model, found, found.lengths, np.ones(VOCABULARY, np.int64), begin=0, slice_length=512)
    assert counter.frame_count <= 5
