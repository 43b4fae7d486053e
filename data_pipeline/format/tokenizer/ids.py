"""A vocabulary without text: for token ids that came without their tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NoReturn

import numpy as np

from bst_base.errors import UserError
from data_pipeline.format.tokenizer.base import Tokenizer


class IdsOnly(Tokenizer):
    """The number of ids, and the id that ends a document. No id stands for any text."""

    file = "vocabulary.json"
    mark = b'{"ids_only": true,'
    """The first bytes of the file, by which it differs from a tokenizer.json."""
    has_text = False

    def __init__(self, model: bytes, where: str = "the vocabulary") -> None:
        """`model`: the bytes of the file, as `of` writes them. Raises UserError for any other content."""
        try:
            said = json.loads(model)
            size, end = int(said["vocab_size"]), int(said["eos_id"])
            if not 0 <= end < size:
                raise ValueError(f"eos_id {end} is not one of its {size} ids")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: not a vocabulary of ids ({error}); prepare the corpus again") from None
        super().__init__(model, [b""] * size)
        self.bos_id = self.eos_id = self.pad_id = end

    @classmethod
    def of(cls, vocab_size: int, eos_id: int) -> IdsOnly:
        """Return a vocabulary of `vocab_size` ids. `eos_id` is also the bos and the padding id."""
        return cls(cls.mark + f' "vocab_size": {vocab_size}, "eos_id": {eos_id}}}\n'.encode())

    def encode(self, text: str) -> NoReturn:
        raise UserError(
            "this corpus was made of token ids without their tokenizer, so text cannot be turned into tokens; prepare "
            "it again with tokenizer.reuse"
        )

    def piece(self, token: int) -> str:
        return f"<{token}>"

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the ids as text, separated by spaces."""
        return " ".join(map(str, np.asarray(ids).tolist()))
