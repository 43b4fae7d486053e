"""Measured losses: what laws are fitted to, and what verdicts are made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.law import Points


@dataclass(frozen=True)
class Observation:
    """One measured loss."""

    name: str
    architecture: str
    arm: str
    """The settings under which the grid was run; verdicts are within one."""
    block: str
    """What a pair shares: arm, size, depth, seed."""
    run: str
    """Observations of one run, or of a trunk and its branches, have the same value: they are not independent."""
    seed: int
    width: float
    depth: float
    parameters: float
    """N, training FLOPs per token / 6."""
    non_embedding: float
    """N, matrices without embedding and head."""
    tokens: float
    length: float
    """Tokens per parameter, as planned."""
    flops: float
    time_s: float
    loss: float
    """Nats per token."""
    by_block: tuple[float, ...] = ()
    """The loss by position in the sequence, a value a block of W tokens."""
    by_document: tuple[float, ...] = ()
    held_out: bool = False
    """Only predicted; neither fitted nor compared."""
    rate_factor: float = 1.0
    """The learning rate divided by the rule's; only the audit uses values other than 1."""
    slowed: float = math.nan
    """How much longer a median step took than the fastest tenth: what else ran on the machine. nan: not known."""

    @property
    def usable(self) -> bool:
        """Whether the loss is a number that has a logarithm."""
        return math.isfinite(self.loss) and self.loss > 0


def grid(observed: Sequence[Observation]) -> list[Observation]:
    """The observations that are fitted and compared."""
    return [o for o in observed if o.usable and not o.held_out and o.rate_factor == 1]


def points(observed: Sequence[Observation], count: str = "parameters") -> Points:
    """As points to fit; `count`: parameters or non_embedding. Raises UserError when there are none."""
    if not observed:
        raise UserError("no run has finished: there is nothing to fit")

    def column(name: str) -> np.ndarray:
        return np.array([getattr(o, name) for o in observed])

    return Points(column("loss"), column(count), column("tokens"), column("width"), column("depth"), column("run"),
                  column("architecture"))  # fmt: skip
