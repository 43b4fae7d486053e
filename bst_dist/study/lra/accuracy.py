"""An accuracy with its uncertainty: the examples of a test split are a sample of all possible examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bst_dist.study.statistics import Z95, wilson


@dataclass(frozen=True)
class Accuracy:
    """The number of correct answers among a number of examples."""

    correct: int
    examples: int

    @property
    def value(self) -> float:
        """Share of correct answers."""
        return self.correct / self.examples

    @property
    def standard_error(self) -> float:
        """Standard error of the share, for independent examples."""
        return math.sqrt(self.value * (1 - self.value) / self.examples)

    def interval(self, z: float = Z95) -> tuple[float, float]:
        """Return Wilson's score interval, by default 95 %."""
        return wilson(self.value, self.examples, z)

    def report(self) -> dict[str, float]:
        """Return entries for a machine-readable report."""
        low, high = self.interval()
        return {
            "accuracy": self.value,
            "accuracy_standard_error": self.standard_error,
            "accuracy_low_95": low,
            "accuracy_high_95": high,
            "correct": self.correct,
            "examples": self.examples,
        }
