"""The table of launches in docs/gpu.md has every kind of layer, with the numbers that `make test-sm90` checks."""

import json
from pathlib import Path

from tests.sm90.layers import COUNTS, LAYERS, table

PAGE = Path(__file__).parents[2] / "docs/gpu.md"


def test_the_table_shows_the_counts_of_every_layer():
    counts = json.loads(COUNTS.read_text())
    assert list(counts) == list(LAYERS)
    assert table(counts) in PAGE.read_text()
