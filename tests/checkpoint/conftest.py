"""The whole program, started as a user starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data" / "format-2"
TIMEOUT_S = 240
BST = Path(sys.executable).with_name("bst")


@pytest.fixture
def bst(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``bst(*arguments, under=…, **environment)`` runs the command in `tmp_path`, all output in `stdout`.

    `under`: a command that runs it in turn, like `unshare --mount`.
    """

    def run(*arguments: object, under: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*under, str(BST), *map(str, arguments)],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S,
        )  # fmt: skip

    return run


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A run of two ranks that was stopped after step 4 of 6, with its corpus in `tmp_path` (see test_older)."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"
