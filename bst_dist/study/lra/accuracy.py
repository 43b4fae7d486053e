"""An accuracy with its uncertainty: the examples of a test split are a sample of all that could have been drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959963984540054
"""Standard deviations of a normal distribution on either side that hold 95 % of it."""


@dataclass(frozen=True)
class Accuracy:
    """So many of so many examples were right."""

    correct: int
    examples: int

    @property
    def value(self) -> float:
        """Share of correct answers."""
        return self.correct / self.examples

    @property
    def standard_error(self) -> float:
        """Of the share, the examples being independent."""
        return math.sqrt(self.value * (1 - self.value) / self.examples)

    def interval(self, z: float = Z95) -> tuple[float, float]:
        """Wilson's score interval (1927), 95 % by default: good also near 0 and 1, unlike value ± z standard errors."""
        n, p = self.examples, self.value
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)

    def report(self) -> dict[str, float]:
        """Entries of a machine-readable report."""
        low, high = self.interval()
        return {"accuracy": self.value, "accuracy_standard_error": self.standard_error, "accuracy_low_95": low,
                "accuracy_high_95": high, "correct": self.correct, "examples": self.examples}  # fmt: skip
