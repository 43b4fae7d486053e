"""`bst sweep compare` and `bst sweep report` on tables with runs that did not finish, and on tables of other sweeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bst_dist.cli import main
from bst_dist.study.sweep.table import TableError, observations, read, write

ROOT = Path(__file__).resolve().parents[3]
FIRST_STUDY = ROOT / "docs/study/table.csv"  # 48 runs of the grid, 16 of the audit

NOTHING = "bst-sh is not judged: no pair of bst-sh and sliding has finished in arm near"


@pytest.fixture
def sweep(tmp_path):
    """Function that runs a command of `bst sweep` on the table of the first study, with changed rows."""

    def go(command, changed=lambda row: {}, arm="near", *words):
        rows = [row.model_copy(update={"arm": arm, **changed(row)}) for row in read(FIRST_STUDY)]
        write(rows, tmp_path / "table.json")
        return main(["sweep", command, str(ROOT / "launch/sweeps/mini.yaml"), f"directory={tmp_path}", *words])

    return go


def lost(status="diverged", most=5, **of):
    """Return a function of a row with the changes that make the first `most` selected rows fail or diverge."""
    left = [most]

    def changes(row):
        if left[0] and all(getattr(row, name) == value for name, value in of.items()):
            left[0] -= 1
            return {"status": status, "reason": "the loss is nan", "loss_nats": math.nan}
        return {}

    return changes


def test_compare_counts_the_runs_and_says_whom_lost_runs_favour(sweep, tmp_path, capsys):
    assert (
        sweep(
            "compare", lost(architecture="bst-sh", role="grid", depth=8), "near", "--json", str(tmp_path / "found.json")
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "64 measurements were planned: 59 done, 5 diverged." in said
    assert "5 runs of bst-sh in arm near diverged; their pairs are left out, which favours bst-sh." in said
    assert said.count(": diverged: the loss is nan") == 5
    assert "The learning-rate audit failed" in said  # in a corner the rule's own rate diverged, and others did not
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["variants"]["bst-sh"]["gaps"]["left_out"]) == 5
    assert len(found["variants"]["bst-sh"]["gaps"]["gap"]) == 24 - 5


def test_compare_warns_of_unfinished_and_failed_runs(sweep, capsys):
    waiting = lost("waiting", 3, architecture="sliding", role="grid", depth=2)
    failed = lost("failed", 1, architecture="sliding", role="grid", depth=8)
    assert sweep("compare", lambda row: waiting(row) or failed(row)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 measurements have not finished. A verdict read before they finish is wrong more often" in said
    assert "1 run of sliding in arm near failed; its pairs are left out." in said
    assert "left out: 3 runs of bst-sh: the run of sliding in the same stratum is not done (waiting)" in said


def test_unfinished_audit_is_undecided_and_said(sweep, capsys):
    assert sweep("compare", lost("failed", 99, role="audit", rate_factor=2.0)) == 0
    assert "The learning-rate audit is undecided in some corners" in " ".join(capsys.readouterr().out.split())


def test_report_of_a_diverged_variant_names_it_and_counts_its_runs(sweep, tmp_path):
    assert sweep("report", lost(most=99, architecture="bst-sh"), "near", "--draws", "2") == 0
    text = (tmp_path / "report.md").read_text()
    assert f"{NOTHING}: of its runs 24 diverged\n" in text
    assert "24 runs of bst-sh in arm near diverged; their pairs are left out" in text
    assert "equal N" not in text
    assert "undecided: diverged at 0.5, 1, 2 times the rule's rate" in text  # the corners of bst-sh in the audit


def test_report_before_any_run_is_done(sweep, tmp_path):
    assert sweep("report", lost("waiting", 99)) == 0
    text = (tmp_path / "report.md").read_text()
    assert f"{NOTHING}: of its runs 24 waiting: run more of the sweep" in text
    assert "64 measurements have not finished" in text
    assert "No run has finished." in text


@pytest.mark.parametrize("command", ["compare", "report", "fit"])
def test_table_of_another_sweep_is_refused_with_its_arms(sweep, capsys, command):
    assert sweep(command, arm="old") == 2
    assert "near is not among its arms (old)" in capsys.readouterr().err
    assert sweep(command, lambda row: {"architecture": f"my-{row.architecture}"}) == 2
    assert "sliding is not among its architectures (my-sliding, my-bst-sh)" in capsys.readouterr().err


def test_tables_without_the_newer_columns_are_readable():
    rows = read(FIRST_STUDY)
    assert "corpora" not in FIRST_STUDY.read_text().splitlines()[0]
    assert {row.corpora for row in rows} == {""}
    assert all(o.usable for o in observations(rows))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda rows: [*rows, rows[0]], "has more than one row"),
        (lambda rows: [rows[0].model_copy(update={"flops": 0.0}), *rows[1:]], "is done, but its flops are not above 0"),
    ],
)
def test_table_with_repeated_runs_or_without_compute_is_refused(tmp_path, changed, message):
    rows = changed(read(FIRST_STUDY))
    write(rows, tmp_path / "table.json")
    with pytest.raises(TableError, match=f"the run {rows[0].run} {message}"):
        read(tmp_path / "table.json")
