from __future__ import annotations

import numpy as np
import pytest
import torch

from bst_dist.model.lm import LanguageModel, ModelConfig


class InMemory:
    """Documents of random tokens; like a corpus, gives any run of one, and remembers the longest it gave."""

    def __init__(self, lengths: list[int], vocabulary: int):
        random = np.random.default_rng(0)
        self.lengths = np.array(lengths, np.uint32)
        self.documents = [random.integers(0, vocabulary, n).astype(np.uint16) for n in lengths]
        self.longest_read = 0

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        self.longest_read = max(self.longest_read, stop - start)
        assert 0 <= start <= stop <= len(self.documents[document])
        return self.documents[document][start:stop]


@pytest.fixture
def in_memory():
    return InMemory


@pytest.fixture
def make_model():
    """A small model in double precision whose every part has something to say."""

    def make(variant: str = "SH", **changes) -> LanguageModel:
        torch.manual_seed(0)
        settings = {
            "vocab_size": 19, "width": 16, "heads": 2, "ffn": 24, "block": 8, "depth": 3, "mixer": "bst",
            "placement": [1, 2], "context": {"variant": variant, "states": 3}, "ssm": {"state": 4, "chunk": 4},
        }  # fmt: skip
        model = LanguageModel(ModelConfig(**settings | changes)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make
