"""The interface of every tokenizer of a corpus: exact conversion of text to ids and back."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from bst_base.errors import UserError

PROBE = "  Two  spaces,\ttab, A \u00e9\u0301 e\u0301 \ufb01 \U0001f600 \x00 \u2581\r\nend \n\n"
"""Test text. A tokenizer is only used if it gives this back exactly."""


class Tokenizer(ABC):
    """Converts text to ids and back; `decode(encode(text)) == text` for every text."""

    file: ClassVar[str]
    """Name of the model's file in a corpus or a run directory."""
    has_text: ClassVar[bool] = True
    """Whether ids stand for text. If not, `encode` raises UserError and `decode` returns the ids."""
    bos_id: int
    eos_id: int
    pad_id: int

    def __init__(self, model: bytes, pieces: Sequence[bytes]) -> None:
        """`model`: the file's bytes. `pieces`: for each id the UTF-8 bytes of its text, b"" if it has none."""
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = len(pieces)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self._pieces = pieces

    @property
    def token_bytes(self) -> np.ndarray:
        """(V,) int64: bytes of UTF-8 text that each id stands for; 0 for control symbols."""
        return np.array([len(piece) for piece in self._pieces], np.int64)

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the text's ids, (n,) in `dtype`, without begin or end symbols."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each of many texts; some tokenizers encode them faster together. Not thread-safe."""
        return list(map(self.encode, texts))

    @abstractmethod
    def piece(self, token: int) -> str:
        """Return the name of an id in the model. Names are unique."""

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of any run of ids. A character that is cut at the ends of the run becomes U+FFFD."""
        pieces = self._pieces
        return b"".join(pieces[i] for i in np.asarray(ids).tolist()).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of text that one id stands for. A character may consist of several ids."""
        return self._pieces[token]

    def require_exact(self, where: str, needs: str) -> None:
        """Raise UserError unless a difficult text is given back exactly.

        `needs`: what a model needs for that, for the message.
        """
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(
                f"{where}: the model does not give text back exactly (it needs {needs}); train one with "
                "'bst data prepare'"
            )
