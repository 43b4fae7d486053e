"""The settings of sweeps and experiments are documented, and the pages in docs/ equal the commands' output."""

from __future__ import annotations

from pathlib import Path

import pytest

from bst_base.settings import fields
from bst_dist.cli import main
from bst_dist.study.experiment.config import ExperimentConfig
from bst_dist.study.sweep.config import SweepConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"
KINDS = {"sweep": SweepConfig, "experiment": ExperimentConfig}


@pytest.mark.parametrize("kind", KINDS)
def test_settings_page_in_docs_equals_the_command_output(kind, capsys):
    assert main([kind, "settings", "--markdown"]) == 0
    said = f"settings have changed: bst {kind} settings --markdown > docs/{kind}-settings.md"
    assert (DOCS / f"{kind}-settings.md").read_text() == capsys.readouterr().out, said


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_a_meaning(kind):
    assert [name for name, _, _, meaning in fields(KINDS[kind]) if not meaning] == []


def test_one_section_can_be_printed_and_unknown_sections_are_refused(capsys):
    assert main(["sweep", "settings", "rules"]) == 0
    told = capsys.readouterr().out
    assert "rules.warmup_fraction" in told and "budget" not in told
    assert main(["experiment", "settings", "budget"]) == 2
    assert "no setting begins with 'budget'; there are: name, recipe" in capsys.readouterr().err
