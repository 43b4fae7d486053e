"""What the files of a run directory show about its earlier starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bst_dist.train.rundir import ENVIRONMENT, RECIPE
from bst_dist.train.start.directory import evidence_of_checkpoints

DEMO = Path(__file__).resolve().parents[3] / "launch/recipes/demo.yaml"


@pytest.mark.parametrize(
    ("starts", "shown"),
    [
        ([{"from_step": 0}], None),
        ([{"from_step": 0}, {"from_step": 80}], "a start that resumed from step 80"),
        ([{"from_step": 0}, {"from_step": 80}, {"from_step": 0}], None),
        ([{"from_step": 0}, {"from_step": 80}, {"from_step": 0}, {"from_step": 40}], "resumed from step 40"),
        ([{"from_step": 0}, {"from_step": 80}, {}], "resumed from step 80"),  # of another version
    ],
)
def test_starts_before_one_from_zero_show_no_steps(tmp_path, starts, shown):
    """A run that was killed before its first checkpoint is begun again without asking a second time."""
    (tmp_path / RECIPE).write_text(DEMO.read_text())
    (tmp_path / ENVIRONMENT).write_text(json.dumps({"starts": starts}))
    found = evidence_of_checkpoints(tmp_path)
    assert found is None if shown is None else shown in found
