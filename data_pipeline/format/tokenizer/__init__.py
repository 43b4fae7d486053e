"""Exact conversion of text to tokens and back: tokenizers trained here, and published ones."""

from __future__ import annotations

from pathlib import Path

from bst_base.errors import UserError
from data_pipeline.format.tokenizer.added import extended
from data_pipeline.format.tokenizer.base import Tokenizer
from data_pipeline.format.tokenizer.config import TokenizerConfig
from data_pipeline.format.tokenizer.huggingface import HuggingFaceTokenizer, adopted
from data_pipeline.format.tokenizer.ids import IdsOnly
from data_pipeline.format.tokenizer.sentencepiece import (
    MAX_LINE,
    SentencePieceTokenizer,
    train_tokenizer,
    without_changes,
)
from data_pipeline.format.tokenizer.tiktoken_file import as_json, is_tiktoken

__all__ = [
    "MAX_LINE",
    "HuggingFaceTokenizer",
    "IdsOnly",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "adopt_tokenizer",
    "extended",
    "parse_tokenizer",
    "read_tokenizer",
    "require_own_roles",
    "train_tokenizer",
]

FILES = (SentencePieceTokenizer.file, HuggingFaceTokenizer.file, IdsOnly.file)
"""File names of a tokenizer in a corpus, a run directory or a published model."""


def parse_tokenizer(model: bytes, where: str = "the tokenizer") -> Tokenizer:
    """Return the tokenizer from the content of its file; raises UserError when it does not give text back exactly."""
    if model.startswith(IdsOnly.mark):
        return IdsOnly(model, where)
    return (HuggingFaceTokenizer if _is_json(model) else SentencePieceTokenizer)(model, where)


def read_tokenizer(path: str | Path, sha256: str | None = None) -> Tokenizer:
    """Read the tokenizer in a file.

    Raises UserError when it is missing, cannot be used, or has a SHA-256 other than `sha256`.
    """
    try:
        tokenizer = parse_tokenizer(Path(path).read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: the tokenizer is missing; copy it from where the corpus was prepared") from None
    if sha256 not in (None, tokenizer.sha256):
        raise UserError(f"{path}: not the tokenizer that the corpus was made with; copy it from where it was prepared")
    return tokenizer


def adopt_tokenizer(path: Path, config: TokenizerConfig) -> Tokenizer:
    """Return any tokenizer, adapted for use in a corpus. `path` is its file, or a directory with one.

    Everything that changes text before it is encoded is switched off: normalisation, and a space added in front.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: no {', '.join(FILES[:-1])} or {FILES[-1]} in it")
        if len(found) > 1:
            names = " and ".join(each.name for each in found)
            raise UserError(f"{path}: holds {names}: name the file to use, such as tokenizer.reuse={found[-1]}")
        path = found[0]
    try:
        model = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer (tokenizer.reuse)") from None
    if model.startswith(IdsOnly.mark):
        require_own_roles(config, path)
        return IdsOnly(model, str(path))
    if is_tiktoken(model):
        return HuggingFaceTokenizer(adopted(as_json(model, config.tiktoken, str(path)), path, config), str(path))
    if config.tiktoken:
        raise UserError(f"tokenizer.tiktoken: {path} is not a tiktoken file: leave it out")
    if _is_json(model):
        return HuggingFaceTokenizer(adopted(model, path, config), str(path))
    require_own_roles(config, path)
    return SentencePieceTokenizer(without_changes(model, str(path)), str(path))


def require_own_roles(config: TokenizerConfig, path: Path) -> None:
    """Raise UserError when the settings name begin, end or padding tokens of a tokenizer that has its own in `path`."""
    named = [f"tokenizer.{role}" for role in ("bos", "eos", "pad") if getattr(config, role) is not None]
    if named:
        raise UserError(
            f"{', '.join(named)}: no effect here, because {path} says itself which tokens these are: leave it out, or "
            "take the model's tokenizer.json"
        )


def _is_json(model: bytes) -> bool:
    return model.lstrip()[:1] == b"{"
