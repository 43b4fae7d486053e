"""The fault table of docs/operations.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
TABLE = (TESTS.parent / "docs" / "operations.md").read_text().partition("## Faults")[2]
NAMED = re.findall(r"`((?:cluster|train|checkpoint|faults|report)/\w+\.py)(?:::(\w+))?", TABLE)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda value: value[-40:])
def test_the_test_that_proves_it_exists(file, name):
    assert f"def {name}" in (TESTS / file).read_text()


def test_every_fault_has_a_test():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    assert all(".py" in row.split("|")[4] for row in rows if not row.startswith("| ---"))
