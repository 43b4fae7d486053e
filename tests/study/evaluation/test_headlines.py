"""Small versions of the two long measurements quoted in docs/evaluation.md and docs/export.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.study.evaluation import long_generation, streaming_65k

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["BST MF", "BST SH hyena"])
def test_streamed_losses_equal_those_of_one_pass(corpus, name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(streaming_65k, "LENGTH", 1024)
    monkeypatch.setattr(streaming_65k, "SLICE", 256)
    monkeypatch.setattr(sys, "argv", ["streaming_65k.py", str(corpus), name])
    streaming_65k.main()
    streamed, at_once = capsys.readouterr().out.splitlines()[1].removeprefix(name).split()[:2]
    assert float(streamed) == pytest.approx(float(at_once), rel=1e-5)


def test_carried_state_does_not_grow_during_generation(make_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["long_generation.py", str(make_run()), "--tokens", "96", "--every", "32"])
    long_generation.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tokens"] for line in lines] == [32, 64, 96]
    # At the same position in a block, so the window is equally full.
    assert lines[1]["state_bytes"] == lines[2]["state_bytes"] > 0
