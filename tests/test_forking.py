"""Ranks can be forked from a test process after a backward pass, with any build of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
sys.path.insert(0, {folder!r})
import conftest
{before}
_setup_privateuseone_for_python_backend()  # counts as a device, as CUDA does after the first fake tensor
torch.ones((), requires_grad=True).backward()
if (child := os.fork()) == 0:
    torch.ones((), requires_grad=True).backward()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(("before", "forkable"), [("conftest.keep_forkable()", True), ("", False)])
def test_ranks_can_be_forked_after_a_backward_pass_with_keep_forkable(before: str, forkable: bool) -> None:
    program = PROGRAM.format(folder=str(Path(__file__).parent), before=before)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode == 0) == forkable, done.stderr
    assert ("fork-based multiprocessing" in done.stderr) != forkable
