"""A unigram tokenizer as a Hugging Face tokenizer, which transformers finds after `import bst_dist.hub`.

It uses SentencePiece, because `tokenizers` breaks ties between segmentations of a unigram model differently. BPE, the
default, is exported for the `tokenizers` library (`fast_tokenizer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from data_pipeline.format.tokenizer import read_tokenizer

FILE = "tokenizer.model"
CORPUS_FILE = "corpus-tokenizer.json"
"""The corpus's tokenizer, if it is a tokenizer.json. transformers' own file lacks the token that ends a document."""


class BSTTokenizer(PreTrainedTokenizer):
    """SentencePiece with the corpus's canonical form.

    Text is never parsed as a special token. The begin token is added in front of a text, if there is one: for models of
    joined documents it is the end of the previous document.
    """

    vocab_files_names = {"vocab_file": FILE}  # noqa: RUF012 (transformers' own form)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self._text = read_tokenizer(vocab_file)
        self._ids = {self._text.piece(token): token for token in range(self._text.vocab_size)}
        named = {"eos_token": self._text.eos_id, "pad_token": self._text.pad_id}
        kwargs |= {name: self._text.piece(token) for name, token in named.items()}
        kwargs.setdefault("padding_side", "left")
        kwargs["special_tokens_pattern"] = "bos" if kwargs.get("bos_token") else "none"
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self._text.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Return the pieces of a text."""
        return [self._text.piece(token) for token in self._text.encode(text).tolist()]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self._text.decode([self._ids[token] for token in tokens])

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self._text.piece(index)

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Return the text of the ids, including the names of special tokens unless they are skipped."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:
            return self._text.decode(ids)
        special = {token for token in ids if not self._text.bytes_of(token)}
        runs = ((named, list(run)) for named, run in groupby(ids, key=special.__contains__))
        return "".join("".join(map(self._text.piece, run)) if named else self._text.decode(run) for named, run in runs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        path = Path(save_directory) / (f"{filename_prefix}-{FILE}" if filename_prefix else FILE)
        path.write_bytes(self._text.model)
        return (str(path),)
