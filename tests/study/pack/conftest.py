"""A small sweep, and the folder that it is packed into."""

from __future__ import annotations

import pytest
import yaml

from bst_base.settings import parse
from bst_dist.study.pack import folder
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.design import Designer


@pytest.fixture
def sweep(tmp_path, corpus):
    """A file with the settings of a small sweep on a small corpus."""
    base = {
        "model": {"block": 32},
        "data": {"corpus": str(corpus)},
        "deepspeed": "ds_configs/zero0.json",
        "ranks": 1,
        "train": {"sequence_length": 64, "sequences": 4, "micro_sequences": 4, "precision": "fp32"},
        "evaluation": {"every": 0, "sequences": 4},
        "log": {"tensorboard": False},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    settings = {
        "name": "t",
        "recipe": str(tmp_path / "base.yaml"),
        "directory": str(tmp_path / "out"),
        "architectures": {"sliding": {"model.mixer": "sliding"}, "bst": {"model.mixer": "bst"}},
        "baseline": "sliding",
        "sizes": [5e4, 8e4],
        "depths": [2],
        "tokens_per_parameter": [0.05, 0.1],
        "seeds": [0, 1],
        "arms": {"all": {}},
        "shape": {"head_width": 4},
        "budget": {"flops_per_s": 1e9},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    return settings


@pytest.fixture
def planned():
    """Function that returns the sweep of some settings and its runs."""

    def plan(settings, **others):
        config = parse(SweepConfig, {**settings, **others})
        designer = Designer(config)
        return config, designer.runs(designer.cells())

    return plan


@pytest.fixture
def packed(sweep, planned, tmp_path, monkeypatch):
    """The plan of a packed folder without wheels, its runs, and its path."""
    monkeypatch.setattr(folder, "gather", lambda *_: [])
    config, runs = planned(sweep)
    return folder.make(config, runs, tmp_path / "pack", 5, ["3.11"], 10**8), runs, tmp_path / "pack"
