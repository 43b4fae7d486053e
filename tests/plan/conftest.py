"""Fixtures of the tests of the plan."""

import pytest


@pytest.fixture
def plain_attention(monkeypatch):
    """Compute attention in plain tiles, because torch's FLOP counter does not know the fused CPU kernel."""
    monkeypatch.setattr("bst_dist.model.attention.sliding.attention_path", lambda device: "tiles")
