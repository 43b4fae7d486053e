"""`bst bench gpu` with small sizes on a CPU: every part runs and writes its figures."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bst_dist.cli import main
from bst_dist.tools.bench import gpu
from bst_dist.tools.bench.gpu import PARTS
from bst_dist.tools.bench.gpu_sizes import LAYERS


@pytest.mark.parametrize("name", [name for name in PARTS if name != "resume"])
def test_a_benchmark_part_runs_at_small_size(name: str) -> None:
    found = PARTS[name](True, time.monotonic() + 3000)
    assert found["rows"]
    assert not found.get("left_out")
    if name == "layers":
        assert [row["layer"] for row in found["rows"]] == list(LAYERS)
    if name == "stack":
        assert all(0 < row["planned_mfu"] < 1 and row["of_plan"] > 0 for row in found["rows"])


@pytest.mark.ranks
def test_a_resumed_run_equals_a_whole_one() -> None:
    (row,) = PARTS["resume"](True, time.monotonic() + 3000)["rows"]
    assert row == {"steps": 6, "losses_equal": True, "weights_equal": True}


def test_a_failed_part_does_not_prevent_the_other_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    limits = []

    def part(name: str, small: bool, limit: float) -> dict[str, Any]:
        limits.append(limit)
        return {"failed": "Traceback\nout of memory"} if name == "stack" else {"rows": [{"of": name, "s": 1.25}]}

    monkeypatch.setattr(gpu, "_in_a_process", part)
    folder, report = tmp_path / "figures", tmp_path / "all.json"
    assert main(["bench", "gpu", "--small", "--output", str(folder), "--json", str(report)]) == 1
    assert {path.stem for path in folder.iterdir()} == {"machine", *PARTS}
    assert json.loads((folder / "longest.json").read_text())["rows"] == [{"of": "longest", "s": 1.25}]
    assert "stack: failed: out of memory" in capsys.readouterr().out
    assert json.loads((folder / "machine.json").read_text())["small"] is True
    expected = np.cumsum([gpu.REHEARSED * gpu.LIMITS_S[name] for name in PARTS])  # each took no time
    assert limits == pytest.approx(expected, abs=100)


@pytest.mark.parametrize(
    ("program", "where", "last"),
    [
        ("def inner(): raise ValueError('odd')\ninner()", "in inner", "ValueError: odd"),
        ("import sys; sys.exit(3)", "", "ended with status 3"),
        (
            "import faulthandler, threading, time\nfaulthandler.dump_traceback_later(2)\n"
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
            "def inner(depth): inner(depth - 1) if depth else time.sleep(60)\ninner(50)",
            "in inner",
            "not done after 8 s",
        ),
    ],
)
def test_a_part_that_fails_says_why_and_where(program: str, where: str, last: str) -> None:
    said = gpu._ended([sys.executable, "-c", program], 8)["failed"].splitlines()
    assert said[-1] == last
    assert len(said) <= 21
    assert any(where in line for line in said)


def test_all_parts_together_take_less_than_nine_minutes() -> None:
    assert gpu.AHEAD_S + sum(gpu.LIMITS_S.values()) < 9 * 60
    assert gpu.LIMITS_S.keys() == PARTS.keys()
