"""Real training: an experiment that is killed and started again gives the same table as an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
TIMED = ("tokens_per_s", "tokens_per_s_fastest", "memory_mib", "seconds_to_loss")


@pytest.fixture
def experiment(tmp_path):
    """An experiment's file, and a corpus prepared for it."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text("".join(f"line {number * k} of a text, {k % 7}\n" for k in range(300)))
    prepared = {
        "source": {"kind": "folder", "path": str(text)},
        "output": str(tmp_path / "corpus"),
        "tokenizer": {"vocab_size": 300},
        "validation_fraction": 0.3,
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(prepared))
    assert _bst("data", "prepare", tmp_path / "data.yaml").wait() == 0
    base = {
        "ranks": 1,
        "model": {"width": 16, "heads": 2, "ffn": 32, "block": 16, "depth": 2, "mixer": "bst"},
        "data": {"corpus": str(tmp_path / "corpus"), "mode": "streaming"},
        "train": {"steps": 40, "sequence_length": 32, "sequences": 2, "precision": "fp32", "carry": True},
        "evaluation": {"every": 10, "sequences": 4},
        "checkpoint": {"every": 4},
        "log": {"every": 10},
        "deepspeed": "ds_configs/zero0.json",
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    data = {
        "name": "t",
        "question": "Does it carry?",
        "recipe": "base.yaml",
        "reference": "anew",
        "seeds": [0],
        "arms": {"anew": {"train.carry": False}, "on": {}},
        "measure": {"lengths": [32, 128], "tokens": 1024, "speed": True, "time_to": 4.5},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.mark.ranks
@pytest.mark.long
def test_killed_and_restarted_experiment_gives_the_same_table(experiment, tmp_path):
    assert _bst("experiment", "run", experiment, f"directory={tmp_path / 'whole'}", "--workers", "2").wait() == 0
    process = _bst("experiment", "run", experiment, f"directory={tmp_path / 'cut'}")
    _wait_for(lambda: list((tmp_path / "cut/runs").glob("*/checkpoints/step-????????")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "cut").glob("t/table.json"))
    assert _bst("experiment", "run", experiment, f"directory={tmp_path / 'cut'}", "--workers", "2").wait() == 0
    starts = [json.loads(path.read_text())["starts"] for path in (tmp_path / "cut/runs").glob("*/environment.json")]
    assert sorted(len(found) for found in starts) == [1, 2]
    assert max(found[-1]["from_step"] for found in starts) > 0  # it was resumed, not restarted from step 0
    whole, cut = ((tmp_path / name / "t/table.json").read_text() for name in ("whole", "cut"))
    assert _untimed(json.loads(whole)) == _untimed(json.loads(cut))
    row = json.loads(cut)["rows"][1]
    assert ("bits_per_byte_at_128" in row["difference"], row["seeds"]) == (True, {"0": "done"})


def _untimed(table):
    for row in table["rows"]:
        for part in ("measured", "difference"):
            row[part] = {key: value for key, value in row[part].items() if key not in TIMED}
    return table


def _wait_for(condition, process):
    end = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, "the command has come to its end before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)


def _bst(*words):
    bst = Path(sys.executable).with_name("bst")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.Popen([bst, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
