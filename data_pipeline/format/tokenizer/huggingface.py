"""A tokenizer.json of the `tokenizers` library (Llama 3, GPT-2, Qwen, Mistral and most published models).

Text is encoded a document at a time, as the library does. What is stored in a corpus is the model in a form of its own
right, which `tokenizers` and transformers read as well: nothing is added in front of a text or normalised, padding says
which token fills up, and the post-processor which tokens begin and end a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from bst_base.errors import UserError
from data_pipeline.format.tokenizer.base import Tokenizer
from data_pipeline.format.tokenizer.config import TokenizerConfig

COMMON = {
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>"),
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>"),
}
"""What published models call these tokens, the most common first."""
NEEDS = "a byte-level or byte-fallback BPE without a normaliser that changes text"
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json that `adopted` has made."""

    file = "tokenizer.json"

    def __init__(self, model: bytes, where: str = "the tokenizer") -> None:
        """`model`: the bytes of the file; raises UserError when it cannot be used exactly, or was not adopted."""
        self.backend = _backend(model, where)
        settings = json.loads(model)
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # text never becomes a special token, however it is spelt
        super().__init__(model, _pieces(self.backend, settings, where))
        self.bos_id, self.eos_id, self.pad_id = _roles(settings, where)
        # Where a space is written as U+2581, one of the text goes by its bytes, or it would come back as a space.
        self._space_ids = [self.backend.token_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self.require_exact(where, NEEDS)

    def encode(self, text: str) -> np.ndarray:
        apart = None not in self._space_ids
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE) if apart else (text,)):
            ids += self._space_ids if i else ()
            ids += self.backend.encode(part, add_special_tokens=False).ids
        return np.array(ids, self.dtype)

    def piece(self, token: int) -> str:
        return self.backend.id_to_token(token)


def adopted(model: bytes, path: Path, config: TokenizerConfig) -> bytes:
    """The tokenizer.json that was read from `path` in the form that corpora hold; raises UserError when a role has no
    token."""
    settings = json.loads(_backend(model, str(path)).to_str())
    settings["truncation"] = None
    settings["normalizer"] = next((part for part in _parts(settings["normalizer"]) if _writes_spaces(part)), None)
    for token in settings["added_tokens"]:
        if not token["special"]:  # text turns into it, and the spaces beside it must not go with it
            token.update(lstrip=False, rstrip=False)
    _set_everywhere(settings["pre_tokenizer"], {"add_prefix_space": False, "prepend_scheme": "never"})
    _set_everywhere(settings["decoder"], {"add_prefix_space": False, "prepend_scheme": "never"})
    backend = _backend(json.dumps(settings).encode(), str(path))
    beside = path.with_name("tokenizer_config.json")
    said = json.loads(beside.read_text()) if beside.is_file() else {}
    eos = _token(backend, "eos", config, said, path)
    if eos is None:
        raise UserError(
            f"{path}: which token ends a document? None of {', '.join(COMMON['eos'])} is in it: name it with "
            "tokenizer.eos"
        )
    bos, pad = (_token(backend, role, config, said, path) or eos for role in ("bos", "pad"))
    backend.enable_padding(pad_id=backend.token_to_id(pad), pad_token=pad)
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(name, backend.token_to_id(name)) for name in {bos: 0, eos: 0}]
    )
    return backend.to_str(pretty=True).encode()


def _backend(model: bytes, where: str) -> Backend:
    try:
        return Backend.from_buffer(model)
    except Exception as error:  # the library raises no narrower one
        raise UserError(f"{where}: not a tokenizer.json: {error}") from None


def _token(backend: Backend, role: str, config: TokenizerConfig, said: Mapping[str, Any], path: Path) -> str | None:
    """The token with a role: the setting's, that of tokenizer_config.json, or the first common name there is."""
    named = getattr(config, role)
    if named is not None and backend.token_to_id(named) is None:
        raise UserError(f"{path}: tokenizer.{role}: it has no token {named!r}")
    beside = said.get(f"{role}_token")
    beside = beside.get("content") if isinstance(beside, dict) else beside
    there = (name for name in (named, beside, *COMMON[role]) if name and backend.token_to_id(name) is not None)
    return next(there, None)


def _roles(settings: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """Ids of begin, end and padding, where `adopted` has put them."""
    template, padding = settings.get("post_processor") or {}, settings.get("padding") or {}
    tokens = [part["SpecialToken"]["id"] for part in template.get("single", ()) if "SpecialToken" in part]
    if template.get("type") != "TemplateProcessing" or len(tokens) != 2 or "pad_id" not in padding:
        raise UserError(
            f"{where}: not the tokenizer.json of a corpus (it does not name the begin, end and padding tokens): "
            "prepare a corpus with it (tokenizer.reuse)"
        )
    begin, end = (template["special_tokens"][token]["ids"][0] for token in tokens)
    return begin, end, padding["pad_id"]


def _pieces(backend: Backend, settings: Mapping[str, Any], where: str) -> list[bytes]:
    """The bytes of text that each id stands for; none for special tokens and for ids without a token."""
    kinds = {part["type"] for part in _parts(settings.get("decoder"))}
    if not kinds & {"ByteLevel", "ByteFallback"}:
        raise UserError(f"{where}: the model does not give text back exactly (it needs {NEEDS})")
    bytes_of = _byte_level if "ByteLevel" in kinds else _byte_fallback
    added = backend.get_added_tokens_decoder()
    pieces = []
    for i in range(max(backend.get_vocab().values()) + 1):
        name = backend.id_to_token(i)
        if i in added:
            pieces.append(b"" if added[i].special else added[i].content.encode())
        else:
            pieces.append(b"" if name is None else bytes_of(name))
    return pieces


def _byte_fallback(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode()


def _byte_level(name: str) -> bytes:
    return bytes(_BYTES[character] for character in name)


def _byte_characters() -> dict[int, str]:
    """The printable characters that byte-level BPE writes bytes as (GPT-2's table): themselves, or from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


CHARACTERS = _byte_characters()
"""Byte -> the character that stands for it in a byte-level BPE."""
_BYTES = {character: byte for byte, character in CHARACTERS.items()}


def _parts(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A component's parts: itself, or those of a sequence."""
    if part is None:
        return []
    inner = part.get("decoders") or part.get("pretokenizers") or part.get("normalizers")
    return [found for each in inner for found in _parts(each)] if inner else [part]


def _writes_spaces(normalizer: Mapping[str, Any]) -> bool:
    """Whether a normalizer only writes a space as U+2581, which its decoder takes back."""
    return normalizer["type"] == "Replace" and normalizer["content"] == _SPACE


def _set_everywhere(component: dict[str, Any] | None, values: Mapping[str, Any]) -> None:
    """Set what a component, or a part of it, has of `values`; and take away what strips the first space again."""
    if component is None:
        return
    for part in _parts(component):
        part.update({key: value for key, value in values.items() if key in part})
    if component.get("type") == "Sequence" and "decoders" in component:
        component["decoders"] = [part for part in component["decoders"] if part["type"] != "Strip"]
