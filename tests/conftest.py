"""What tests of several packages share."""

from __future__ import annotations

import pytest
import torch

from bst_dist.model.layers import MIXERS
from bst_dist.model.lm import LanguageModel, ModelConfig


@pytest.fixture
def make_model():
    """A small model in double precision whose every part has something to say."""

    def make(mixer: str = "bst", variant: str = "SH", **changes) -> LanguageModel:
        torch.manual_seed(0)
        sections = {"context": {"variant": variant, "states": 3}, "ssm": {"state": 4, "chunk": 4}} | changes
        settings = {
            "vocab_size": 19, "width": 16, "heads": 2, "ffn": 24, "block": 8, "depth": 3, "mixer": mixer,
            "placement": [1, 2], **{name: sections[name] for name in MIXERS[mixer].sections if name in sections},
        }  # fmt: skip
        model = LanguageModel(ModelConfig(**settings)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make
