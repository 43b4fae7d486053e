"""Differences between two runs on the same text, which what the text is worth cancels from.

Two reports are of the same text when they are of as many tokens and of as many bytes: a step's loss in nats over its
bits per byte is the bytes of its text, so no recipe needs to be believed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bst_dist.study.comparison.outline import LAST_STEPS, Outline
from bst_dist.study.statistics import mean, ratio


def by_step(first: Outline, other: Outline) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The training steps at which both runs read the same text, in order; none when the order of their data differs.

    Then some steps have as many bytes by chance, but never most of them.
    """
    lines = {line["step"]: line for line in first.train}
    both = [(lines[line["step"]], line) for line in other.train if line["step"] in lines]
    same = [(one, two) for one, two in both if same_text(one, two)]
    return same if 2 * len(same) > len(both) else []


def differences(first: Outline, other: Outline) -> dict[str, Any]:
    """How much `other`'s loss is above the first's on the same text, in nats per token, with what the error is over.

    Training: over the last steps that both took; validation: at the last step after which both were evaluated, without
    an error, since the metrics hold sums over the sequences and not what each of them gave; documents that `bst eval`
    has scored: in bits per byte, over documents, a corpus an entry. Only what can be paired is there.
    """
    found: dict[str, Any] = {}
    if steps := by_step(first, other)[-LAST_STEPS:]:
        estimate = mean([two["loss_nats"] - one["loss_nats"] for one, two in steps])
        found |= {"train_difference_steps": [steps[0][0]["step"], steps[-1][0]["step"]],
                  **estimate.report("train_difference_nats")}  # fmt: skip
    lines = {line["step"]: line for line in first.evaluations}
    for line in reversed(other.evaluations):
        before = lines.get(line["step"])
        if before is not None and same_text(before, line):
            found |= {"validation_difference_step": line["step"],
                      "validation_difference_nats": line["loss_nats"] - before["loss_nats"]}  # fmt: skip
            break
    by_corpus = {
        name: _by_document(first.scored[name], of) for name, of in other.scored.items() if name in first.scored
    }
    by_corpus = {name: difference for name, difference in by_corpus.items() if difference}
    return found | ({"scored_difference": by_corpus} if by_corpus else {})


def _by_document(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The difference on the same documents, whatever their tokens are: bits per byte are of the text."""
    nats = [np.array(scored.get("document_nats", ())) for scored in (one, other)]
    bytes_ = [scored.get("document_bytes") for scored in (one, other)]
    if not bytes_[0] or bytes_[0] != bytes_[1]:
        return {}
    return ratio((nats[1] - nats[0]) / math.log(2), np.array(bytes_[0])).report("bits_per_byte")


def same_text(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two reports are of the same number of tokens and of bytes."""
    bytes_ = [_bytes(line) for line in (one, other)]
    return one.get("tokens") == other.get("tokens") and math.isclose(*bytes_, rel_tol=1e-9)


def _bytes(line: dict[str, Any]) -> float:
    """Bytes a token of a report's text, but for a factor; nan where the report does not say."""
    nats, bits = line.get("loss_nats"), line.get("bits_per_byte")
    return nats / bits if nats and bits else math.nan
