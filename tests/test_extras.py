"""Extras of the installation: the modules of every extra are known, and pins are within the declared bounds."""

from __future__ import annotations

import sys
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

from bst_dist.cli import main
from bst_dist.extras import EXTRAS, install_hint
from bst_dist.tools.doctor.software import requirements

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
DEV = Path(__file__).parents[1] / "requirements-dev.txt"


def test_every_dependency_is_pinned_within_its_bounds():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == set(EXTRAS)
    bounds = [Requirement(line) for line in [*PROJECT["dependencies"], *chain(*extras.values())]]
    pinned = requirements() | dict(
        line.partition("#")[0].strip().split("==") for line in DEV.read_text().splitlines() if "==" in line
    )
    for bound in bounds:
        assert pinned[bound.name] in bound.specifier, bound
    assert requirements().keys() <= {bound.name for bound in bounds}


def test_a_missing_package_names_its_extra(monkeypatch, capsys):
    assert install_hint("deepspeed.ops") == "deepspeed is not installed: pip install 'bst-dist[train]'"
    assert install_hint("no_such_module") is None
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("bst_dist.hub")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["export", "runs/demo", "out"]) == 2
    assert "bst export: transformers is not installed: pip install 'bst-dist[hub]'" in capsys.readouterr().err
