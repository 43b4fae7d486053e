"""The bytes that `bst plan` says a compiled layer keeps, compared with what autograd saves in a compiled layer.

The plan traces a layer without Dynamo and replaces FlexAttention by an operator. Here Dynamo and FlexAttention are
real.
"""

from __future__ import annotations

import pytest

from bst_dist.model.config import ModelConfig
from tests.cuda_path.kept import kept_by_graph, planned
from tests.cuda_path.models import BLOCK, LENGTH, MODELS

NAMES = ("sliding T5", "SH RoPE", "MH", "MF", "full RoPE")
LAYERS = {
    **{name: (MODELS[name], "joined") for name in NAMES},
    "Gated DeltaNet": ({"mixer": "gated-deltanet"}, "joined"),
    "SH of isolated documents": (MODELS["SH"], "isolated"),
    "SH of masked documents": (MODELS["SH"], "masked"),
}


def of(settings: dict) -> tuple[ModelConfig, str]:
    model = ModelConfig(width=256, heads=4, ffn=1024, block=BLOCK, depth=1, vocab_size=2, **settings)
    return model, model.mixers()[0]


@pytest.mark.parametrize("policy", ["none", "selective"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_keeps_the_planned_bytes(name, policy):
    layer = (*of(LAYERS[name][0]), policy, 2, LENGTH, LAYERS[name][1])
    assert planned(*layer) == pytest.approx(kept_by_graph(*layer), rel=0.02)  # some keep the softmax sums twice
