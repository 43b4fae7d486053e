"""A run compiles its layers exactly where its plan counts compiled layers."""

from __future__ import annotations

import pytest

from bst_base.settings import parse
from bst_dist.config import Recipe
from bst_dist.plan.accelerators import accelerator
from bst_dist.plan.search import Planner
from bst_dist.plan.speed import Cluster
from bst_dist.train.building import compiles

SETTINGS = {
    "name": "small",
    "model": {
        "width": 64,
        "heads": 4,
        "ffn": 256,
        "block": 32,
        "depth": 2,
        "vocab_size": 100,
        "mixer": "bst",
        "ssm": {"state": 8, "chunk": 16},
    },
    "data": {"corpus": "none"},
    "train": {"steps": 100, "sequence_length": 256, "sequences": 16},
}
STREAMING = {"data": {"mode": "streaming"}, "train": {"carry": True}}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("change", "compiled_below_3", "compiled_in_3"),
    [
        ({}, True, False),
        ({"activation_checkpointing": {"policy": "every-kth-layer"}}, True, False),
        ({"activation_checkpointing": {"policy": "every-layer"}}, True, True),
        ({"train": {"slice_tokens": 256}}, True, False),  # one slice, which has no past
        ({"train": {"slice_tokens": 128}}, False, False),
        (STREAMING, False, False),
        ({"parallel": {"sp": 2}}, False, False),
        ({"compile": False}, False, False),
    ],
    ids=str,
)
def test_a_run_compiles_layers_where_its_plan_counts_them_compiled(change, compiled_below_3, compiled_in_3, stage):
    nested = {
        name: SETTINGS.get(name, {}) | value if isinstance(value, dict) else value for name, value in change.items()
    }
    recipe = parse(Recipe, SETTINGS | nested | {"deepspeed": f"zero{stage}"})
    planned = Planner(recipe, Cluster(1, 4, accelerator("h100-80gb"))).as_written().work.compiled
    assert compiles(recipe, "cuda", stage)[0] == planned == (compiled_in_3 if stage == 3 else compiled_below_3)
