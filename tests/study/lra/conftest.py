"""A small ListOps task and a recipe that learns it in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bst_base.settings import dump, parse
from bst_dist.config import Recipe
from bst_dist.study.lra.listops import ListOpsConfig
from bst_dist.study.lra.prepare import prepare
from data_pipeline.prepare.parallel import open_workers


@pytest.fixture(scope="session")
def listops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with prepared examples of ListOps of 8 to 32 symbols."""
    directory = tmp_path_factory.mktemp("lra") / "listops"
    config = ListOpsConfig(train=60, validation=20, test=20, max_depth=4, max_args=4, min_length=8, max_length=32)
    with open_workers(1) as workers:
        prepare(config, directory, workers, lambda *_: None)
    return directory


@pytest.fixture
def settings(listops: Path) -> dict[str, Any]:
    """A recipe as plain data."""
    return {
        "name": "small",
        "seed": 3,
        "model": {
            "vocab_size": 16,
            "width": 16,
            "heads": 2,
            "ffn": 32,
            "block": 8,
            "depth": 2,
            "mixer": "bst",
            "ssm": {"state": 4, "chunk": 4},
        },
        "data": {"task": "listops", "examples": str(listops)},
        "train": {"steps": 6, "sequence_length": 32, "sequences": 8, "micro_sequences": 2, "precision": "fp32"},
        "evaluation": {"every": 3, "sequences": 16},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 3},
        "log": {"tensorboard": False},
        "deepspeed": "ds_configs/zero1.json",
    }


@pytest.fixture
def recipe_file(tmp_path: Path, settings: dict[str, Any]) -> Callable[..., Path]:
    """``recipe_file(**changes)`` writes the recipe, with sections changed, and returns its path."""

    def write(**changes: Any) -> Path:
        changed = {
            key: {**settings.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in changes.items()
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(dump(parse(Recipe, settings | changed)))
        return path

    return write
