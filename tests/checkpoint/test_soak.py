"""A small soak test (`soak.py`). docs/checkpoints.md describes the large one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.mark.ranks
@pytest.mark.parametrize("local_every", [0, 1])
def test_a_repeatedly_killed_run_equals_an_uninterrupted_one(tmp_path, local_every):
    path = Path(__file__).with_name("soak.py")
    spec = importlib.util.spec_from_file_location("soak", path)
    soak = sys.modules["soak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    soak.endure(soak.Soak(tmp_path, ranks=2, steps=90, kills=5, local_every=local_every))
