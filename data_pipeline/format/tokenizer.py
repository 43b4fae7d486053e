"""Text to tokens and back, exactly: SentencePiece with byte fallback, applied one line at a time.

The canonical form of a text is the concatenation of its encoded lines with the newline symbol between them. A line
longer than `MAX_LINE` characters is encoded in pieces of that length, so time and memory stay linear for any text.
The ids of a line never depend on its neighbours: they are the same for any chunking, worker or thread count.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from pydantic import Field

from bst_base.errors import UserError
from bst_base.places import LocalPath
from bst_base.settings import Config

MAX_LINE = 16_384
"""Characters of a line that are encoded together; part of the corpus format."""

_BATCH = 1 << 18  # characters handed to SentencePiece at a time: bounds the lists of Python ints it returns
_TRAIN_THREADS = 8  # fixed: a unigram model's floating-point sums depend on it
_SPACE = "\u2581"  # SentencePiece writes a space as this character
_NEWLINE = "\n"


class TokenizerConfig(Config):
    """How the corpus's tokenizer is made."""

    vocab_size: int = Field(32_000, ge=300)
    """Number of ids, the 256 bytes, the newline and the four control symbols included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece's algorithm; bpe trains an order of magnitude faster."""
    sample_bytes: int = Field(64 << 20, ge=1024)
    """Bytes of training text, taken evenly over the train split, that the tokenizer is trained on."""
    reuse: LocalPath | None = None
    """A SentencePiece model, or a prepared corpus, whose tokenizer is used instead of training one."""


class Tokenizer:
    """A SentencePiece model with the canonical form above; `decode(encode(text)) == text` for every text."""

    def __init__(self, model: bytes, where: str = "the tokenizer") -> None:
        """`model`: the bytes of a SentencePiece model; raises UserError when this project cannot use it exactly."""
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{where}: not a SentencePiece model: {error}") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        self._pieces = [self._piece(i) for i in range(self.vocab_size)]
        self.newline_id: int = self._processor.piece_to_id(_NEWLINE)
        self._space_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self._check(where)

    @classmethod
    def read(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a model file; raises UserError when it is missing or unusable."""
        try:
            return cls(Path(path).read_bytes(), str(path))
        except FileNotFoundError:
            raise UserError(f"{path}: the tokenizer is missing; copy it from where the corpus was prepared") from None

    @property
    def token_bytes(self) -> np.ndarray:
        """(V,) int64: bytes of UTF-8 text that each id stands for; 0 for the control symbols."""
        return np.array([len(piece) for piece in self._pieces], np.int64)

    def encode(self, text: str) -> np.ndarray:
        """The text's ids, (n,) in `dtype`, without begin or end symbols."""
        parts = [np.empty(0, self.dtype)]
        for lines in _batches(text):
            ids: list[int] = []
            for line, line_ids in zip(lines, self._processor.encode(lines, num_threads=1), strict=True):
                ids += self._newline_or_space(line) or line_ids
            parts.append(np.array(ids, self.dtype))
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of any run of ids; a character cut by the run's ends becomes U+FFFD."""
        pieces = self._pieces
        return b"".join(pieces[i] for i in np.asarray(ids).tolist()).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes of text that one id stands for; a character may be spread over several ids."""
        return self._pieces[token]

    def piece(self, token: int) -> str:
        """The name of an id in the SentencePiece model; no other id has it."""
        return self._processor.id_to_piece(token)

    def _newline_or_space(self, line: str) -> list[int] | None:
        """Ids of the two characters that SentencePiece itself would not give back."""
        if line == _NEWLINE:
            return [self.newline_id]
        return self._space_ids if line == _SPACE else None

    def _piece(self, i: int) -> bytes:
        processor = self._processor
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if processor.is_control(i) or processor.is_unknown(i):
            return b""
        return piece.replace(_SPACE, " ").encode()

    def _check(self, where: str) -> None:
        missing = [n for n, i in {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}.items() if i < 0]
        if missing:
            raise UserError(f"{where}: the model has no {', '.join(missing)} symbol; train one with 'bst data prepare'")
        probe = "  Two  spaces,\ttab, \u00e9\u0301 \ufb01 \U0001f600 \x00 \u2581\r\nend \n\n"
        if self._pieces[self.newline_id] != b"\n" or self.decode(self.encode(probe)) != probe:
            raise UserError(
                f"{where}: the model does not give text back exactly (it needs byte fallback, a newline symbol, "
                "identity normalisation, no dummy prefix, and spaces kept); train one with 'bst data prepare'"
            )


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train a SentencePiece model on `texts` (the caller bounds them); the bytes depend on texts and config alone.

    Raises UserError when the texts are too small for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=config.vocab_size,
            model_type=config.model_type,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_unicode_script=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * MAX_LINE,  # in bytes; longer ones would be left out silently
            user_defined_symbols=[_NEWLINE],
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=_TRAIN_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise UserError(
            f"the tokenizer cannot be trained with tokenizer.vocab_size={config.vocab_size} on this text: {reason}"
        ) from None
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for lines in _batches(text.replace("\x00", "")):  # the trainer stops at a NUL
            yield from (line for line in lines if line not in (_NEWLINE, _SPACE))


def _batches(text: str) -> Iterator[list[str]]:
    """The text cut into what is encoded at a time, newlines and U+2581 apart, in lists of about _BATCH characters."""
    batch: list[str] = []
    size = start = 0
    while start < len(text):
        end = text.find(_NEWLINE, start)
        end = len(text) if end < 0 else end
        for piece_start in range(start, end, MAX_LINE):
            piece = text[piece_start : min(piece_start + MAX_LINE, end)]
            batch += _split_space(piece) if _SPACE in piece else [piece]
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        if end < len(text):
            batch.append(_NEWLINE)
            size += 1
        start = end + 1
    if batch:
        yield batch


def _split_space(line: str) -> list[str]:
    first, *others = line.split(_SPACE)
    pieces = [first]
    for other in others:
        pieces += [_SPACE, other]
    return [piece for piece in pieces if piece]
