"""The objects of one rank that the steps and the evaluations of a run have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from bst_dist.faults.signals import Stop
    from bst_dist.parallel.ranks import Ranks
    from bst_dist.parallel.sequence.group import SequenceGroup
    from bst_dist.train.engine import Engine


@dataclass(frozen=True)
class Context:
    """What one rank computes with. It is made once per start and stays the same in all steps and evaluations."""

    engine: Engine
    ranks: Ranks
    token_bytes: Tensor
    """(V,) bytes of text per token id, on the rank's device; zeros where labels are not text."""
    stop: Stop
    """Lets the ranks agree to stop."""
    sharing: SequenceGroup | None = None
    """The ranks that hold the other slices of this rank's sequences; None when it holds whole sequences."""

    @property
    def shares(self) -> int:
        """Number of ranks that each sequence is divided over."""
        return self.sharing.size if self.sharing else 1
