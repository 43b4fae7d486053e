"""Fixtures of the tests of what is told before a launch."""

import pytest


@pytest.fixture
def plain_attention(monkeypatch):
    """Attention in plain tiles: torch's counter of FLOPs knows matmuls, and not the fused kernel of a CPU."""
    monkeypatch.setattr("bst_dist.model.attention.attention_path", lambda device: "tiles")
