"""The settings of a corpus's tokenizer."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bst_base.places import LocalPath
from bst_base.settings import Config

_UNFIT = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2581\ud800-\udfff]")  # U+2581: many models write a space like this
_OF_TRAINED = re.compile(r"<pad>|<unk>|<s>|</s>|<0x[0-9A-F]{2}>")


class TiktokenConfig(Config):
    """Data that a tiktoken file does not contain: arguments of `tiktoken.Encoding` with the same names."""

    pat_str: str
    """Regular expression that splits the text; each match is encoded by itself."""
    special_tokens: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Special token -> its id."""

    @model_validator(mode="after")
    def _check(self) -> TiktokenConfig:
        for name, token in self.special_tokens.items():
            if list(self.special_tokens.values()).count(token) > 1:
                raise ValueError(f"special_tokens: id {token} of {name!r} is given twice")
        return self


class TokenizerConfig(Config):
    """How the corpus's tokenizer is made."""

    vocab_size: int = Field(32_000, ge=300)
    """Number of ids, including the 256 bytes, the newline and the four control symbols."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece's algorithm; bpe trains an order of magnitude faster."""
    sample_bytes: int = Field(64 << 20, ge=1024)
    """Bytes of text to train the tokenizer on, taken evenly from the train split."""
    reuse: LocalPath | None = None
    """Use this tokenizer instead of training one: a prepared corpus, a SentencePiece model, a Hugging Face
    tokenizer.json, a tiktoken file, or a directory with one of these."""
    tiktoken: TiktokenConfig | None = None
    """When `reuse` is a tiktoken file: what the file does not contain."""
    bos: str | None = None
    """When `reuse` is a tokenizer.json or a tiktoken file: the token that begins a text. null: from its
    tokenizer_config.json, or a common name, or the end token."""
    eos: str | None = None
    """Likewise: the token that ends each document."""
    pad: str | None = None
    """Likewise: the padding token."""

    special_tokens: tuple[str, ...] = ()
    """Your own tokens that no text is ever encoded into, even if it spells them: ids for later training."""
    text_tokens: tuple[str, ...] = ()
    """Your own tokens that a text is encoded into wherever it spells them. With `reuse`, you may also name special
    tokens of that tokenizer; then text is encoded into those too."""

    @property
    def added(self) -> tuple[str, ...]:
        """The tokens of both kinds."""
        return (*self.special_tokens, *self.text_tokens)

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        named = [name for name in ("bos", "eos", "pad", "tiktoken") if getattr(self, name) is not None]
        if named and self.reuse is None:
            raise ValueError(f"{', '.join(named)}: meant for a published tokenizer; give it with reuse")
        for kind in ("special_tokens", "text_tokens"):
            for name in getattr(self, kind):
                self._check_added(kind, name)
        return self

    def _check_added(self, kind: str, name: str) -> None:
        if not name:
            raise ValueError(f"{kind}: an empty token")
        if _UNFIT.search(name):
            raise ValueError(f"{kind}: {name!r} holds a space or a control character: write a token without")
        if self.added.count(name) > 1:
            raise ValueError(f"{kind}: {name!r} is named twice (special_tokens, text_tokens)")
        if self.reuse is None and _OF_TRAINED.fullmatch(name):
            raise ValueError(f"{kind}: {name!r} is a token of every tokenizer that is trained here: leave it out")
