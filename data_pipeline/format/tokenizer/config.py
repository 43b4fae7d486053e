"""The settings of a corpus's tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bst_base.places import LocalPath
from bst_base.settings import Config


class TokenizerConfig(Config):
    """How the corpus's tokenizer is made."""

    vocab_size: int = Field(32_000, ge=300)
    """Number of ids, the 256 bytes, the newline and the four control symbols included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece's algorithm; bpe trains an order of magnitude faster."""
    sample_bytes: int = Field(64 << 20, ge=1024)
    """Bytes of training text, taken evenly over the train split, that the tokenizer is trained on."""
    reuse: LocalPath | None = None
    """A tokenizer that is used instead of training one: a prepared corpus, a SentencePiece model, a Hugging Face
    tokenizer.json, or a directory with one of these."""
    bos: str | None = None
    """With `reuse` of a tokenizer.json: the token that begins a text; None: as its tokenizer_config.json says, or a
    common name, or the end token."""
    eos: str | None = None
    """Likewise: the token that ends each document."""
    pad: str | None = None
    """Likewise: the token that fills up what holds no text."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        named = [name for name in ("bos", "eos", "pad") if getattr(self, name) is not None]
        if named and self.reuse is None:
            raise ValueError(f"{', '.join(named)}: meant for a tokenizer.json; give it with reuse")
        return self
