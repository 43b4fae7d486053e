"""Differences between two runs on the same text. The difficulty of the text cancels in a difference.

Two reports count as being about the same text if they have the same number of tokens and of bytes. The bytes follow
from the report: loss in nats / bits per byte is proportional to the bytes per token. So the recipes are not needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bst_dist.study.comparison.run_summary import LAST_STEPS, Documents, RunSummary, Scored
from bst_dist.study.statistics import Estimate, mean, ratio


@dataclass(frozen=True)
class Differences:
    """One run's losses minus another's on the same text. A value is None if the two have not read the same text."""

    train_difference_steps: tuple[int, int] | None
    """The first and the last step compared."""
    train_difference_nats: Estimate | None
    """Nats per token, mean over the last steps that both took."""
    validation_difference_step: int | None
    """The last step after which both were evaluated."""
    validation_difference_nats: float | None
    """Nats per token. It has no error, because the metrics hold sums over sequences and no values per sequence."""
    scored_difference: dict[str, Scored] | None
    """Corpus -> difference over whole documents."""


def by_step(first: RunSummary, other: RunSummary) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the training steps at which both runs read the same text, in order; none if their data orders differ.

    With different orders some steps have the same number of bytes by chance, but never most of them.
    """
    lines = {line["step"]: line for line in first.result.train}
    both = [(lines[line["step"]], line) for line in other.result.train if line["step"] in lines]
    same = [(one, two) for one, two in both if same_text(one, two)]
    return same if 2 * len(same) > len(both) else []


def differences(first: RunSummary, other: RunSummary) -> Differences:
    """Return the losses of `other` minus those of `first`."""
    steps = by_step(first, other)[-LAST_STEPS:]
    found = {
        name: _by_document(first.documents[name], of) for name, of in other.documents.items() if name in first.documents
    }
    return Differences(
        (steps[0][0]["step"], steps[-1][0]["step"]) if steps else None,
        mean([two["loss_nats"] - one["loss_nats"] for one, two in steps]) if steps else None,
        *_validation(first, other),
        {name: Scored(None, difference) for name, difference in found.items() if difference} or None,
    )


def _validation(first: RunSummary, other: RunSummary) -> tuple[int, float] | tuple[None, None]:
    """Return the last step after which both were evaluated on the same text, and the difference in nats per token."""
    lines = {line["step"]: line for line in first.result.evaluations}
    for line in reversed(other.result.evaluations):
        before = lines.get(line["step"])
        if before is not None and same_text(before, line):
            return line["step"], line["loss_nats"] - before["loss_nats"]
    return None, None


def _by_document(one: Documents, other: Documents) -> Estimate | None:
    """Return the difference in bits per byte on the same documents, valid for different tokenizers too; else None."""
    if not any(one.bytes) or one.bytes != other.bytes:
        return None
    return ratio((np.array(other.nats) - np.array(one.nats)) / math.log(2), np.array(one.bytes))


def same_text(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two reports have the same number of tokens and of bytes per token."""
    bytes_ = [_bytes(line) for line in (one, other)]
    return one.get("tokens") == other.get("tokens") and math.isclose(*bytes_, rel_tol=1e-9)


def _bytes(line: dict[str, Any]) -> float:
    """Return a number proportional to the bytes per token of a report's text; NaN if the report lacks the values."""
    nats, bits = line.get("loss_nats"), line.get("bits_per_byte")
    return nats / bits if nats and bits else math.nan
