"""Prompts: reading them from a file, and encoding them as tokens."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_dist.config import Recipe
from data_pipeline.format.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt and its origin, for error messages."""

    text: str
    where: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from a file (-: standard input), one per line. A .jsonl has a string or an object with "prompt".

    Raises UserError for a file that cannot be read, a .jsonl line that is neither, and a file without prompts.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read: {error}") from None
    found = [
        (f"{path}, line {number}", line.removesuffix("\r"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"--prompts {path}: has no prompt: write one per line")
    if path.suffix != ".jsonl":
        return [Prompt(line, where) for where, line in found]
    return [Prompt(_from_json(line, where), where) for where, line in found]


def begin_token(recipe: Recipe, tokenizer: Tokenizer) -> list[int]:
    """Return the token before a document's first token, the end of another document; [] for documents not joined."""
    return [] if recipe.data.documents != "joined" else [tokenizer.eos_id]


def encode(recipe: Recipe, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return the tokens of a document that begins with the prompt.

    If the tokenizer has no text, the prompt is ids, separated by spaces. Raises UserError if there are no tokens, or if
    the prompt is neither ids nor Unicode text.
    """
    begin = begin_token(recipe, tokenizer)
    if not (prompt.text if tokenizer.has_text else prompt.text.strip()) and not begin:
        kind = recipe.data.documents
        raise UserError(f"{prompt.where} is empty: this model was trained on {kind} documents and needs a beginning")
    if not tokenizer.has_text:
        return begin + _ids(prompt, tokenizer.vocab_size)
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8 arrive as lone surrogates
        raise UserError(
            f"{prompt.where} is not Unicode text (character {error.start} is {prompt.text[error.start]!r}): "
            "write it in UTF-8"
        ) from None
    return begin + tokenizer.encode(prompt.text).tolist()


def _ids(prompt: Prompt, vocab_size: int) -> list[int]:
    words = prompt.text.split()
    if not all(word.isdecimal() and int(word) < vocab_size for word in words):
        raise UserError(
            f"{prompt.where} is {prompt.text!r}, but this model was trained on token ids without their tokenizer: "
            f"write ids from 0 to {vocab_size - 1}, separated by spaces"
        )
    return [int(word) for word in words]


def _from_json(line: str, where: str) -> str:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    text = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise UserError(f'{where}: expected a string, or an object with a string "prompt"')
    return text
