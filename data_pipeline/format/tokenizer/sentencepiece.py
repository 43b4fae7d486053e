"""SentencePiece with byte fallback, applied to one line at a time.

A text is encoded as its lines, with the newline symbol between them. A line longer than `MAX_LINE` characters is
encoded in pieces of that length, so time and memory stay linear for any text. The ids of a line do not depend on other
lines: they are the same for any chunk size, worker or thread count. In a BPE model, the ids of a word do not depend on
other words either (`words`). Then many texts are encoded word by word, each distinct word once.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as proto

from bst_base.errors import UserError
from data_pipeline.format.tokenizer.base import Tokenizer
from data_pipeline.format.tokenizer.config import TokenizerConfig
from data_pipeline.format.tokenizer.words import WordIds, words_are_independent

MAX_LINE = 16_384
"""Maximum characters of a line that are encoded together. Part of the corpus format, so it must not change."""

_BATCH = 1 << 18  # characters passed to SentencePiece at a time: limits the lists of Python ints that it returns
_BATCH_ALL = 1 << 21  # maximum characters of a text that are encoded word by word in one part
_TRAIN_THREADS = 8  # fixed, since the floating-point sums of a unigram model depend on it
_SPACE = "\u2581"  # SentencePiece writes a space as this character
_SPACES = re.compile(rf"\s|{_SPACE}")
_NEWLINE = "\n"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model that encodes text line by line, as described above."""

    file = "tokenizer.model"

    def __init__(self, model: bytes, where: str = "the tokenizer") -> None:
        """`model`: the bytes of a SentencePiece model. Raises UserError when it does not give text back exactly."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{where}: not a SentencePiece model: {error}") from None
        super().__init__(model, [self._bytes(i) for i in range(self._processor.vocab_size())])
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{where}: the model has no end token (eos); train one with 'bst data prepare'")
        self.bos_id = _or(self._processor.bos_id(), self.eos_id)
        self.pad_id = _or(self._processor.pad_id(), self.eos_id)
        self.newline_id = self._newline()
        self._space_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._whole = _text_tokens(model)
        self.require_exact(where, "byte fallback, identity normalisation, no dummy prefix, and spaces kept")

    def encode(self, text: str) -> np.ndarray:
        if self._whole is None:
            return self._between(text)
        parts = self._whole.split(text)  # alternates between text and text tokens
        ids = [self._of_token(part) if i % 2 else self._between(part) for i, part in enumerate(parts)]
        return np.concatenate(ids)

    def _of_token(self, token: str) -> np.ndarray:
        return np.array([self._processor.piece_to_id(token)], self.dtype)

    def _between(self, text: str) -> np.ndarray:
        """Return the ids of text that contains no text tokens."""
        parts = [np.empty(0, self.dtype)]
        for lines in _batches(text):
            ids: list[int] = []
            for line, line_ids in zip(lines, self._encoded(lines), strict=True):
                ids += self._newline_or_space(line) or line_ids
            parts.append(np.array(ids, self.dtype))
        return np.concatenate(parts)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._words is None:
            return super().encode_all(texts)
        cut = [list(self._cut(text)) for text in texts]
        found = iter(self._words.ids([part for each in cut for part in each if isinstance(part, str)]))
        ids = [[next(found) if isinstance(part, str) else part for part in each] for each in cut]
        return [each[0] if len(each) == 1 else np.concatenate(each) for each in ids]

    def _cut(self, text: str) -> Iterator[str | np.ndarray]:
        """Yield the parts of a text, cut between words, at least one.

        A part is a string made of words, or the ids of what is between them: a text token or U+2581.
        """
        space = np.array(self._space_ids, self.dtype)
        for i, between in enumerate([text] if self._whole is None else self._whole.split(text)):
            if i % 2:
                yield self._of_token(between)
            else:
                yield from (space if part == _SPACE else part for part in _parts(between))

    @cached_property
    def _words(self) -> WordIds | None:
        """The encoder of single words; None if the ids of a line are not those of its words."""
        independent = words_are_independent(self.model)
        return WordIds(self.model, self._encoded, self.dtype, self.newline_id) if independent else None

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        """Return SentencePiece's own ids for each of the texts."""
        return self._processor.encode(texts, num_threads=1)

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def _newline(self) -> int:
        """Return the id of a newline: its own symbol if there is one, else its byte."""
        own = self._processor.piece_to_id(_NEWLINE)
        return own if self._pieces[own] == b"\n" else self._processor.piece_to_id("<0x0A>")

    def _newline_or_space(self, line: str) -> list[int] | None:
        """Return the ids of a newline or a U+2581, which SentencePiece itself would not give back."""
        if line == _NEWLINE:
            return [self.newline_id]
        return self._space_ids if line == _SPACE else None

    def _bytes(self, i: int) -> bytes:
        processor = self._processor
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if processor.is_control(i) or processor.is_unknown(i):
            return b""
        return piece.replace(_SPACE, " ").encode()


def _text_tokens(model: bytes) -> re.Pattern[str] | None:
    """Return a pattern that finds the text tokens. They are cut out first, so that no long line is cut inside one."""
    pieces = proto.ModelProto.FromString(model).pieces
    symbols = [piece.piece for piece in pieces if piece.type == proto.ModelProto.SentencePiece.USER_DEFINED]
    whole = [symbol for symbol in symbols if len(symbol) > 1 and not _SPACES.search(symbol)]
    longest_first = sorted(whole, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if whole else None


def without_changes(model: bytes, where: str) -> bytes:
    """Return the model without the steps that change text before it is encoded.

    These are normalisation, a space added in front, and the removal of spaces. A model without them is returned
    unchanged. Raises UserError when it is not a model.
    """
    try:
        found = proto.ModelProto.FromString(model)
    except DecodeError:
        raise UserError(f"{where}: not a SentencePiece model, a tokenizer.json or a tiktoken file") from None
    rules = found.normalizer_spec
    if not (rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces):
        return model
    rules.name, rules.precompiled_charsmap = "identity", b""
    rules.add_dummy_prefix = rules.remove_extra_whitespaces = False
    return found.SerializeToString()


def _or(found: int, other: int) -> int:
    return found if found >= 0 else other


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train a SentencePiece model on `texts`; the caller limits their size. The bytes depend only on texts and config.

    Raises UserError when the vocabulary size does not fit the texts.
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
            max_sentence_length=4 * MAX_LINE,  # in bytes; longer lines would be left out silently
            control_symbols=list(config.special_tokens),
            user_defined_symbols=[_NEWLINE, *config.text_tokens],
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=_TRAIN_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"tokenizer.vocab_size={config.vocab_size}{_why_not(str(error))}") from None
    return model.getvalue()


def _why_not(told: str) -> str:
    """Turn SentencePiece's message about a vocabulary into one that names this project's options."""
    if least := re.search(r"required_chars\. \d+ vs (\d+)", told):
        return f" is too low for this text: its characters alone take {least[1]} ids"
    if most := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", told):
        return f" is too high for this text: it gives {most[1]} ids; give more text, or take a tokenizer.reuse"
    return f": the tokenizer cannot be trained on this text: {told.rpartition('] ')[2] or told}"


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for lines in _batches(text.replace("\x00", "")):  # the trainer stops at a NUL
            yield from (line for line in lines if line not in (_NEWLINE, _SPACE))


def _parts(text: str) -> list[str]:
    """Return parts of a text, cut where neither a word nor an encoded line continues. A U+2581 is a part of its own."""
    if len(text) <= _BATCH_ALL and _SPACE not in text and max(map(len, text.split(_NEWLINE))) <= MAX_LINE:
        return [text]
    parts = []
    for lines in _batches(text):
        part: list[str] = []
        for line, following in zip(lines, [*lines[1:], _SPACE], strict=True):
            part.append(line)
            if line == _SPACE or following == _SPACE or _NEWLINE not in (line, following):
                parts.append("".join(part))
                part = []
    return parts


def _batches(text: str) -> Iterator[list[str]]:
    """Yield lists of about _BATCH characters of the pieces that are encoded together.

    Newlines and U+2581 stand alone.
    """
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
