"""The project works (trains, resumes, reports) if it is only copied and on the path, not installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from bst_dist import version
from bst_dist.tools.doctor import software
from bst_dist.tools.doctor.finding import LACKING

ROOT = Path(__file__).parents[1]
PARTS = ("bst_base", "bst_dist", "data_pipeline", "ds_configs", "launch")


@pytest.fixture
def bst(tmp_path, link_packages):
    """``bst(*arguments)`` runs `bst` from a copy of the project, under a Python where the project is not installed."""
    copy, packages = tmp_path / "copy", tmp_path / "packages"
    for name in PARTS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    packages.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    link_packages(packages, [*project["dependencies"], *project["optional-dependencies"]["train"]])
    base = Path(sys.base_prefix) / "bin" / Path(sys.executable).name  # not that of the virtual environment
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{packages}", "OMP_NUM_THREADS": "1"}

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [base, "-s", "-m", "bst_dist", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.ranks
def test_a_checkout_that_is_not_installed_trains_and_resumes(bst, recipe_file, tmp_path):
    words = ["train", recipe_file(ranks=2, deepspeed="zero1"), "--run-dir", tmp_path / "run"]
    bst(*words, "--until", 2)
    assert "resumed from step 2" in bst(*words, "--resume")
    bst("eval", tmp_path / "run", "--json", tmp_path / "eval.json")
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    reports = [*starts, json.loads((tmp_path / "eval.json").read_text())]
    assert [one["versions"]["bst_dist"] for one in reports] == ["not installed"] * 3


@pytest.fixture
def not_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    for name in ("version", "requires"):
        monkeypatch.setattr(metadata, name, absent)


@pytest.mark.usefixtures("not_installed")
def test_a_checkout_takes_its_version_only_from_its_own_pyproject(monkeypatch, tmp_path):
    stated = re.search('^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert version.own_version() == f"{stated} (not installed)"
    monkeypatch.setattr(version, "_root", lambda: tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "7"\n')
    assert version.own_version() == "not installed"


@pytest.mark.usefixtures("not_installed")
def test_the_doctor_reports_unknown_extras_in_a_checkout():
    (found,) = software.extras()
    assert found.mark == LACKING
    assert "not installed" in found.text
