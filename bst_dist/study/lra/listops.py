"""ListOps: nested operations on lists of digits. The class is the value of the expression, a digit.

Nangia and Bowman 2018 (arXiv 1804.06028), in the version of the Long Range Arena. The operators MIN, MAX, MED (the
median, rounded down) and SM (the sum modulo 10) have 2 to `max_args` arguments. A node is an operator with probability
1/4, else a digit; at `max_depth` it is always a digit. Expressions outside of the length range are drawn again.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]   is 5

An example is a pure function of the settings, the split, its index and the attempt.
"""

from __future__ import annotations

from random import Random
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from bst_base.errors import UserError
from bst_base.settings import Config

DIGITS = range(10)
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*map(str, DIGITS), *OPERATORS, "]")
"""Symbol number -> text. The number of a digit is the digit itself."""
OPERATOR_SHARE = 0.25
MIN, MAX, MED, SM, CLOSE = range(len(DIGITS), len(SYMBOLS))
DRAWS = 1_000_000
"""Number of expressions drawn for one example before it fails."""


class ListOpsConfig(Config):
    """Settings of generated expressions. The defaults are those of the Long Range Arena."""

    task: Literal["listops"] = "listops"
    train: int = Field(96_000, ge=1)
    """Examples of the training split."""
    validation: int = Field(2_000, ge=1)
    """Examples of the validation split."""
    test: int = Field(2_000, ge=1)
    """Examples of the test split."""
    max_depth: int = Field(10, ge=2)
    """Maximum number of levels of a tree. A single digit has one level."""
    max_args: int = Field(10, ge=2)
    """Maximum number of arguments of an operator."""
    min_length: int = Field(501, ge=1)
    """Minimum number of symbols of an expression (the original asks for more than 500)."""
    max_length: int = Field(1_999, ge=4)
    """Maximum number of symbols of an expression (the original asks for less than 2000)."""
    seed: int = 0
    """Seed of the generated examples."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> ListOpsConfig:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is more than max_length {self.max_length}")
        return self


def example(config: ListOpsConfig, split: str, index: int, attempt: int = 0) -> tuple[list[np.ndarray], int]:
    """Return one example: a list with its only sequence, symbols (n,) uint8, and its class.

    Raises UserError if DRAWS expressions have no allowed length.
    """
    random = Random(f"listops/{config.seed}/{split}/{index}/{attempt}")
    for _ in range(DRAWS):
        symbols: list[int] = []
        value = _draw(random, config, 1, symbols)
        if value is not None and len(symbols) >= config.min_length:
            return [np.array(symbols, np.uint8)], value
    raise UserError(
        f"listops: of {DRAWS:,} expressions of at most {config.max_depth} levels and {config.max_args} arguments none "
        f"has {config.min_length} to {config.max_length} symbols: widen that range, or allow larger trees"
    )


def _draw(random: Random, config: ListOpsConfig, depth: int, symbols: list[int]) -> int | None:
    """Append a random tree to `symbols`; return its value, or None as soon as it is too long."""
    if len(symbols) >= config.max_length:
        return None
    if depth == config.max_depth or random.random() >= OPERATOR_SHARE:
        digit = int(random.random() * len(DIGITS))
        symbols.append(digit)
        return digit
    operator = MIN + int(random.random() * len(OPERATORS))
    symbols.append(operator)
    arguments = []
    for _ in range(2 + int(random.random() * (config.max_args - 1))):
        value = _draw(random, config, depth + 1, symbols)
        if value is None:
            return None
        arguments.append(value)
    symbols.append(CLOSE)
    return None if len(symbols) > config.max_length else apply(operator, arguments)


def apply(operator: int, arguments: list[int]) -> int:
    """Return the value of an operator, given by its symbol number, for the values of its arguments."""
    if operator == MIN:
        return min(arguments)
    if operator == MAX:
        return max(arguments)
    if operator == SM:
        return sum(arguments) % 10
    ordered, half = sorted(arguments), len(arguments) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) // 2


def text(symbols: np.ndarray) -> str:
    """Return an expression as text."""
    return " ".join(SYMBOLS[symbol] for symbol in symbols)
