"""Dry run of the script for a bare machine: a Python with only torch and numpy, and wheels of installed packages."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bst_dist.study.pack.wheels import HERE, gather

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    gather(folder, [HERE], runpy.run_path(str(ROOT / "tests/gpu/wheels.py"))["ALSO"])
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory, packed, link_packages):
    """``bare(results, *words)`` runs the script under a Python that has torch and numpy but none of the wheels."""
    packages = tmp_path_factory.mktemp("packages")
    done = link_packages(packages, ["torch", "numpy", "pip"])
    assert not done & {"deepspeed", "pytest", "pytest-xdist", "hypothesis", "pydantic", "bst-dist"}
    base = Path(sys.base_prefix) / "bin" / Path(sys.executable).name  # not that of the virtual environment
    python = tmp_path_factory.mktemp("bin") / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH="$PYTHONPATH:{packages}"\nexec {base} -s "$@"\n')
    python.chmod(0o755)

    def run(results: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [ROOT / "tests/gpu/bare.sh", packed, results, *words]
        return subprocess.run(
            command,
            env={**os.environ, "PYTHON": str(python), **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.mark.ranks
@pytest.mark.long
def test_results_are_written_to_one_folder_and_failures_are_reported(bare, tmp_path):
    chosen = {"BST_REHEARSE_GPU": "1", "OMP_NUM_THREADS": "1"}
    words = ["--only", "generation"]
    done = bare(tmp_path / "good", *words, PYTEST_ADDOPTS="-k 'fp32 and (pure or GSS)'", **chosen)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "2 passed" in (tmp_path / "good/tests.log").read_text()
    assert "2 passed" in done.stdout
    assert json.loads((tmp_path / "good/bench/generation.json").read_text())["rows"]
    assert "bst_dist" in (tmp_path / "good/versions.txt").read_text()

    words = ["--only", "resume", "--small"]
    failed = bare(tmp_path / "bad", *words, PYTEST_ADDOPTS="-k nothing_of_this_name", **chosen)
    assert failed.returncode == 1
    assert (tmp_path / "bad/bench/resume.json").is_file()


def test_with_a_missing_argument_the_usage_is_printed(tmp_path):
    done = subprocess.run([ROOT / "tests/gpu/bare.sh", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tests/gpu/bare.sh WHEELS RESULTS" in done.stderr
