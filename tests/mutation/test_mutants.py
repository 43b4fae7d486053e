"""The mutants are the changes that are meant, each of them a program, and nothing that people read is changed."""

from __future__ import annotations

import ast
from pathlib import Path

from bst_base import settings
from tests.mutation.mutants import mutants

SOURCE = '''
def choose(values: list[int] = [], *, most: "int" = 3) -> str:
    """Docstring 7."""
    if not values or len(values) >= most:
        raise ValueError(f"{len(values) + 1} of {most}")
    for value in sorted(values):
        if value is None:
            continue
        values.count(value)
    return "é" + f"{min(values) - 0.5}"
'''.lstrip()


def test_each_mutant_makes_the_expected_change():
    found = [(each.line, str(each)) for each in mutants(SOURCE.encode())]
    assert found == [
        (1, "3 → (4)"),
        (3, "not values or len(values) >= most → (not (not values or len(values) >= most))"),
        (3, "not values or len(values) >= most → (not values and len(values) >= most)"),
        (3, "not values → (values)"),
        (3, "len(values) >= most → (len(values) > most)"),
        (3, "len(values) >= most → (len(values) < most)"),
        (4, 'raise ValueError(f"{len(values) + 1} of {most}") → pass'),
        (5, "sorted → (list)"),
        (6, "value is None → (value is not None)"),
        (7, "continue → break"),
        (8, "values.count(value) → pass"),
    ]


def test_each_mutant_is_a_valid_and_different_program():
    source = Path(settings.__file__).read_bytes()
    original = ast.dump(ast.parse(source))
    changed = [ast.dump(ast.parse(each.apply(source))) for each in mutants(source)]
    assert len(changed) > 50
    assert original not in changed
