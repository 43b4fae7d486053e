"""The plan's time model compared with one H200 (docs/gpu/h200-fourth.json), later than the plan's constants."""

import json
from pathlib import Path

import pytest

from bst_dist.model.config import ModelConfig
from bst_dist.plan.accelerators import accelerator
from bst_dist.tools.bench.gpu_models import planned
from bst_dist.tools.bench.gpu_sizes import LAYERS, stack_sizes

MEASURED = Path(__file__).parents[3] / "docs" / "gpu" / "h200-fourth.json"


def measured() -> dict[tuple[str, int], float]:
    """Return the measured tokens per second by model and width."""
    rows = json.loads(MEASURED.read_text())["stack"]["rows"]
    return {(row["model"], row["width"]): row["tokens_per_s"] for row in rows}


def model(name: str, width: int) -> ModelConfig:
    return stack_sizes(width).config(**LAYERS[name], **({"placement": [1, 7, 9]} if name == "BST SH" else {}))


@pytest.mark.parametrize("name, width", [(name, width) for name in ("sliding", "BST SH") for width in (1024, 2048)])
def test_planned_seconds_are_within_a_twentieth_of_the_measured(name, width):
    sizes = stack_sizes(width)
    seconds = planned(model(name, width), sizes, accelerator("h200-141gb")).seconds
    assert seconds == pytest.approx(sizes.rows * sizes.length / measured()[name, width], rel=0.05)
