"""The common base of sources of token ids: the range of valid ids, and the id that ends a document."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.format.tokenizer import Tokenizer
from data_pipeline.sources.base import Document, Skipped
from data_pipeline.sources.tree import FileSource

RANGE = 64 << 20
"""Bytes of a file that make up one part, so that several workers share a large file."""


class TokenSource(FileSource):
    """Base of sources whose files hold token ids."""

    tokenized: ClassVar[bool] = True

    vocab_size: int | None = Field(None, ge=2, le=2**31)
    """Number of ids, if no tokenizer (tokenizer.reuse) gives it."""
    eos_id: int | None = Field(None, ge=0, lt=2**31)
    """The id between documents in the files; by default the tokenizer's."""
    licence: str = "unknown"
    """Licence to record for every document."""

    @model_validator(mode="after")
    def _end_is_an_id(self) -> Self:
        if None not in (self.vocab_size, self.eos_id) and self.eos_id >= self.vocab_size:
            raise ValueError(
                f"eos_id: {self.eos_id} is not below vocab_size, {self.vocab_size}: ids count from 0, so vocab_size is "
                f"at least {self.eos_id + 1}"
            )
        return self

    def with_tokenizer(self, tokenizer: Tokenizer) -> Self:
        """Return the same source, with missing settings taken from the tokenizer."""
        end = tokenizer.eos_id if self.eos_id is None else self.eos_id
        return self.model_copy(update={"vocab_size": tokenizer.vocab_size, "eos_id": end})

    def document_of(self, tokens: np.ndarray, where: str, split: str) -> Document | Skipped:
        """Return a document of these ids, (n,), without the end id; or the reason why they are not valid."""
        if not len(tokens):
            return Skipped(where, "empty")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            reason = f"an id outside the vocabulary ({wrong}, of {self.vocab_size:,} ids)"
            return Skipped(where, reason, bad=True, remedy="give the tokenizer or source.vocab_size of these ids")
        return Document(where, tokens, licence=self.licence, split=split)


def read_tokens(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """Return (count,) ids from byte `offset` on; fewer at the end of the file."""
    return np.fromfile(path, dtype, count, offset=offset)
