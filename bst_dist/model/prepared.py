"""What a compiled layer gets from outside of its graph: values that all layers of a call share, made beforehand."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from bst_dist.model.document_mask import Starts
from bst_dist.parallel.sequence.past import Past


@runtime_checkable
class Prepares(Protocol):
    """A module inside a layer whose `forward` asks its past for shared values, with `Past.once`."""

    def prepare(self, like: Tensor, past: Past, starts: Starts | None) -> None:
        """Ask `past` for what `forward` asks for with `Past.once`, for a whole sequence.

        A compiled layer gets it as an input of its graph. `like`: (B, l, D), in the dtype of the products. `starts`:
        as in `forward`.
        """
