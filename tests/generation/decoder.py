"""Reference decoder for one row, with which batched generation is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bst_dist.generation.rows import Rows
from bst_dist.model.lm import LanguageModel


class Decoder:
    """Reads tokens of one row in portions of any size, and returns the logits of the next token after each portion."""

    def __init__(self, model: LanguageModel):
        self.model = model.eval()
        self._rows = Rows(1)

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self._rows.positions[0]

    @property
    def state_bytes(self) -> int:
        """Bytes of the state carried from one token to the next."""
        return self._rows.state_bytes

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Read `ids` after all tokens read before; return the logits of the next token, (V,)."""
        if not ids:
            raise ValueError("no token to read: the logits are those after the last token")
        (hidden,) = self._rows.read(self.model, [torch.tensor(ids)])
        return self.model.logits(hidden)
