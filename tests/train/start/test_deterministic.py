"""`deterministic: true`: what it sets, what it refuses, and that a run with it trains (here on a CPU)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bst_base.settings import ConfigError
from bst_dist.train.run import train
from bst_dist.train.start.deterministic import make_deterministic
from bst_dist.train.start.request import Request


@pytest.fixture
def _as_before() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.usefixtures("_as_before")
def test_torch_and_cublas_are_set_to_deterministic() -> None:
    environ: dict[str, str] = {}
    make_deterministic(environ)
    assert environ == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    make_deterministic(kept := {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    assert kept == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


def test_a_non_deterministic_cublas_workspace_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, and .* has ':0:0'"):
        make_deterministic({"CUBLAS_WORKSPACE_CONFIG": ":0:0"})
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_run_trains_and_reports_it(
    recipe_file: Callable[..., Path], on_ranks: Callable[..., list[Any]], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    request = Request(recipe_file(deterministic=True), ["train.steps=2"], tmp_path / "run", False, None)
    assert on_ranks(1, lambda ranks: train(request, ranks)) == [0]
    assert "attention: fused-tiles, deterministic" in capfd.readouterr().out
