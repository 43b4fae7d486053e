"""The trace is written where its window ends, or where the run ends before."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bst_dist.report.metrics import StepReport
from bst_dist.report.profiling import DIRECTORY, Profile

STEP = StepReport(0, 100, 1.0, 0.5, 1.0, 1e-3, 1e-3, 2.0, 50.0, 0.5)


@pytest.mark.parametrize("end", ["window", "last step", "no more data"])
def test_trace_is_written_however_the_run_ends(tmp_path: Path, end: str) -> None:
    said: list[str] = []
    profile = Profile((2, 3 if end == "window" else 9), tmp_path, 0, done=0, say=said.append)
    for step in (1, 2, 3):
        torch.ones(3).sum()
        profile.after_step(replace(STEP, step=step), last=end == "last step" and step == 3)
    if end == "no more data":
        assert not said
        profile.after_interruption()
    (trace,) = (tmp_path / DIRECTORY).iterdir()
    assert len(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]) > 2
    assert len(said) == 1 and str(trace) in said[0]
    profile.after_interruption()
    assert len(said) == 1
