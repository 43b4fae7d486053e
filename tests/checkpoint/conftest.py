"""The whole program, started as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TIMEOUT_S = 240
BST = Path(sys.executable).with_name("bst")


@pytest.fixture
def bst(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``bst(*arguments, **environment)`` runs the command in `tmp_path`; output of both kinds is in `stdout`."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BST, *map(str, arguments)], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S,
        )  # fmt: skip

    return run
