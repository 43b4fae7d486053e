"""Every row of the fault table of docs/operations.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
TABLE = (TESTS.parent / "docs" / "operations.md").read_text().partition("## Faults")[2]
ROWS = [line.split("|") for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| ---")][1:]


def test_the_table_of_faults_is_found_with_six_columns():
    assert len(ROWS) >= 40
    assert {len(row) for row in ROWS} == {6}, "a row has too many columns, or too few"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1].strip()[:60])
def test_every_fault_has_a_test_that_exists(row):
    named = re.findall(r"`([^`:]+)(?:::(\w+))?[^`]*`", row[4])
    assert named, f"no test holds: {row[1]}"
    for file, name in named:
        found = re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), re.MULTILINE)
        assert any(one.startswith(name) for one in found), f"{file} has no test {name}"
