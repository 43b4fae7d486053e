"""ListOps: labels by a second method, the published distribution, and examples that depend only on their index."""

from __future__ import annotations

import re
from statistics import median

import numpy as np
import pytest

from bst_base.errors import UserError
from bst_dist.study.lra.listops import OPERATORS, SYMBOLS, ListOpsConfig, example, text

SMALL = ListOpsConfig(max_depth=6, max_args=6, min_length=20, max_length=150)
FUNCTIONS = {
    "[MIN": min,
    "[MAX": max,
    "[SM": lambda values: sum(values) % 10,
    "[MED": lambda values: int(median(values)),
}


def by_rewriting(expression: str) -> int:
    """Return the value of an expression: replace innermost lists by their values until one digit is left."""
    innermost = re.compile(r"(\[\w+)((?: \d)+) \]")
    while "[" in expression:
        expression = innermost.sub(lambda m: str(FUNCTIONS[m[1]]([int(digit) for digit in m[2].split()])), expression)
    return int(expression)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5), ("[MED 1 2 ]", 1), ("[SM 9 9 9 ]", 7), ("[MED 3 9 1 8 ]", 5)],
)
def test_reference_evaluator_solves_known_examples(expression, value):
    assert by_rewriting(expression) == value


def test_labels_equal_those_of_the_reference_evaluator():
    for index in range(400):
        (symbols,), label = example(SMALL, "train", index)
        assert by_rewriting(text(symbols)) == label


def test_default_examples_have_the_published_lengths_depths_and_arguments():
    config = ListOpsConfig()
    for index in range(20):
        (symbols,), label = example(config, "train", index)
        written = text(symbols)
        assert 500 < len(symbols) < 2000
        assert by_rewriting(written) == label
        depth, counts, deepest = 0, [0], 0
        for symbol in written.split():
            if symbol in OPERATORS:
                counts[-1] += 1
                counts.append(0)
                depth += 1
            elif symbol == "]":
                assert 2 <= counts.pop() <= 10
                depth -= 1
            else:
                counts[-1] += 1
            deepest = max(deepest, depth)
        assert depth == 0
        assert deepest < 10  # a digit is one level deeper


def test_operators_and_digits_are_uniform_and_classes_are_balanced():
    drawn = [example(SMALL, "train", index) for index in range(1500)]
    symbols = np.concatenate([symbols for (symbols,), _ in drawn])
    counts = np.bincount(symbols, minlength=len(SYMBOLS))
    digits, operators = counts[:10], counts[10:14]
    assert counts[14] == operators.sum()
    for found in (digits, operators):  # uniform: within 5 standard deviations
        expected = found.sum() / len(found)
        assert np.abs(found - expected).max() < 5 * np.sqrt(expected)
    classes = np.bincount([label for _, label in drawn], minlength=10)
    assert classes.min() > 0.05 * len(drawn)  # no class is rare or dominates
    assert classes.max() < 0.2 * len(drawn)


def test_example_is_a_function_of_seed_split_index_and_attempt():
    (one,), _ = example(SMALL, "train", 7)
    (same,), _ = example(SMALL, "train", 7)
    assert np.array_equal(one, same)
    other_seed = SMALL.model_copy(update={"seed": 1})
    for others in ((SMALL, "test", 7), (SMALL, "train", 8), (SMALL, "train", 7, 1), (other_seed, "train", 7)):
        assert not np.array_equal(one, example(*others)[0][0])


def test_impossible_expression_lengths_are_refused(monkeypatch):
    monkeypatch.setattr("bst_dist.study.lra.listops.DRAWS", 100)
    with pytest.raises(UserError, match="of 100 expressions"):
        example(ListOpsConfig(max_depth=2, max_args=2, min_length=50), "train", 0)
