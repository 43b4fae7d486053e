"""`bst bench recovery` with one real kill."""

from __future__ import annotations

import json

import pytest

from bst_dist.cli import main


@pytest.mark.ranks
def test_recovery_from_a_kill_is_timed_by_phase(tmp_path, capfd):
    report = tmp_path / "report.json"
    command = ["bench", "recovery", "--kills", "1", "--ranks", "2", "--directory", str(tmp_path)]
    assert main([*command, "--recovery", "30", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    (one,) = found["recoveries"]
    assert all(one[phase] >= 0 for phase in ("detect_s", "restart_s", "start_s", "first_step_s", "catch_up_s"))
    assert 0 < one["steps_lost"] < 1000
    assert [round(line["goodput"], 2) for line in found["model"]] == [0.99, 0.98]
    said = capfd.readouterr().out
    assert "assumed: failures at random; 30.0 s from a failure to the next step" in said
    assert list(tmp_path.iterdir()) == [report]  # nothing else is left behind
