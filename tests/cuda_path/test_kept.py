"""`bst plan` counts the activations of uncompiled layers. Compiled ones keep fewer, so what it says fits does fit."""

from __future__ import annotations

import pytest

from bst_dist.model.config import ModelConfig
from tests.cuda_path.kept import kept_by_graph, planned

MODEL = ModelConfig(
    width=256, heads=4, ffn=1024, block=128, depth=1, vocab_size=2, mixer="bst", attention={"position": "rope"}
)


@pytest.mark.parametrize(
    ("mixer", "policy", "least"), [("bst", "none", 0.6), ("sliding", "none", 0.6), ("sliding", "selective", 0.9)]
)
def test_a_compiled_layer_keeps_no_more_than_is_planned(mixer, policy, least):
    of = (MODEL, mixer, policy, 2, 512)
    assert least < kept_by_graph(*of) / planned(*of) < 1.01
