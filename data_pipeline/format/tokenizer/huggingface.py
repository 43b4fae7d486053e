"""A tokenizer.json of the `tokenizers` library (Llama 3, GPT-2, Qwen, Mistral and most published models).

Text is encoded one document at a time, like in the library. A corpus stores an adapted form of the model, which
`tokenizers` and transformers can read too. It does not normalise text or add anything in front. Its padding entry names
the padding token, and its post-processor names the tokens that begin and end a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from bst_base.errors import UserError
from data_pipeline.format.tokenizer.base import Tokenizer
from data_pipeline.format.tokenizer.config import TokenizerConfig

COMMON = {
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>"),
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>"),
}
"""Names of these tokens in published models, the most common first."""
NEEDS = "a byte-level or byte-fallback BPE without a normaliser that changes text"
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NOT_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json that was made by `adopted`."""

    file = "tokenizer.json"

    def __init__(self, model: bytes, where: str = "the tokenizer") -> None:
        """`model`: the bytes of the file.

        Raises UserError when it does not give text back exactly, or was not adopted.
        """
        self.backend = _backend(model, where)
        settings = json.loads(model)
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # text is never encoded into a special token
        super().__init__(model, _pieces(self.backend, settings, where))
        self.bos_id, self.eos_id, self.pad_id = _roles(settings, where)
        # If the model writes a space as U+2581, a U+2581 in the text is encoded as bytes: else it would become a space.
        self._space_ids = [self.backend.token_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        hidden = self._hidden_names()
        self._cut_names = _starts_of(name for name in hidden if self._is_found(name))
        self.require_exact(where, NEEDS)
        for name in hidden:
            if self.decode(self.encode(f"a{name}b {name}")) != f"a{name}b {name}":
                raise UserError(f"{where}: the model encodes text into {name!r}, so it does not give that text back")

    def encode(self, text: str) -> np.ndarray:
        apart = None not in self._space_ids
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE) if apart else (text,)):
            ids += self._space_ids if i else ()
            for piece in self._cut(part):
                ids += self.backend.encode(piece, add_special_tokens=False).ids
        return np.array(ids, self.dtype)

    def _hidden_names(self) -> list[str]:
        """Return the names that the model can find in a text although their ids do not stand for their letters.

        They are those of special tokens and of bytes (`<0x41>`) in the model's own vocabulary. The library hides only
        added tokens from a text. A BPE has no merges that lead to them, but a unigram model takes every entry.
        """
        own = self.backend.get_vocab(with_added_tokens=False)
        return sorted(
            name
            for name, token in own.items()
            if self.bytes_of(token) == b"" or (_BYTE.fullmatch(name) and len(self.bytes_of(token)) == 1)
        )

    def _is_found(self, name: str) -> bool:
        return self.backend.token_to_id(name) in self.backend.encode(name, add_special_tokens=False).ids

    def _cut(self, text: str) -> list[str]:
        """Cut a text after the first character of each name that the model must not find."""
        if self._cut_names is None:
            return [text]
        places = [0, *(found.start() + 1 for found in self._cut_names.finditer(text)), len(text)]
        return [text[begin:end] for begin, end in pairwise(places)]

    def piece(self, token: int) -> str:
        return self.backend.id_to_token(token)


def adopted(model: bytes, path: Path, config: TokenizerConfig) -> bytes:
    """Return the tokenizer.json read from `path` in the form that corpora store.

    Raises UserError when no token ends a document, or a token named in the settings does not exist.
    """
    settings = json.loads(_backend(model, str(path)).to_str())
    settings["truncation"] = None
    if "dropout" in settings["model"]:
        settings["model"]["dropout"] = None  # it would choose ids at random
    settings["normalizer"] = next((part for part in _parts(settings["normalizer"]) if _writes_spaces(part)), None)
    for token in settings["added_tokens"]:
        if not token["special"]:  # text is encoded into it, and must keep the spaces next to it
            token.update(lstrip=False, rstrip=False)
    _keep_text_as_it_is(settings["pre_tokenizer"])
    _keep_text_as_it_is(settings["decoder"])
    backend = _backend(json.dumps(settings).encode(), str(path))
    said = _config_beside(path)
    eos = _token(backend, "eos", config, said, path)
    if eos is None:
        first = "" if config.tiktoken is None else "define it in tokenizer.tiktoken.special_tokens and "
        raise UserError(
            f"{path}: which token ends a document? None of {', '.join(COMMON['eos'])} is in it: {first}name it with "
            "tokenizer.eos"
        )
    bos, pad = (_token(backend, role, config, said, path) or eos for role in ("bos", "pad"))
    backend.enable_padding(pad_id=backend.token_to_id(pad), pad_token=pad)
    settings = json.loads(backend.to_str())
    settings["post_processor"] = _template(bos, eos, backend)
    return _backend(json.dumps(settings).encode(), str(path)).to_str(pretty=True).encode()


def _template(bos: str, eos: str, backend: Backend) -> dict[str, Any]:
    """Return the post-processor that names the tokens around a text. `TemplateProcessing(single=…)` cannot name all."""
    alone, first, second = (
        {"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("A", 0), ("B", 1))
    )
    begin, end = ({"SpecialToken": {"id": name, "type_id": 0}} for name in (bos, eos))
    ids = {name: {"id": name, "ids": [backend.token_to_id(name)], "tokens": [name]} for name in (bos, eos)}
    return {
        "type": "TemplateProcessing",
        "single": [begin, alone, end],
        "pair": [first, second],
        "special_tokens": ids,
    }


def _config_beside(path: Path) -> dict[str, Any]:
    """Return the content of the tokenizer_config.json beside a tokenizer.json; empty if there is none."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return {}
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{beside}: not JSON ({error}): mend it, or move it away and set tokenizer.eos") from None
    if not isinstance(said, dict):
        raise UserError(f"{beside}: a JSON object is expected: mend it, or move it away and set tokenizer.eos")
    return said


def _backend(model: bytes, where: str) -> Backend:
    try:
        return Backend.from_buffer(model)
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{where}: not a tokenizer.json: {error}") from None


def _token(backend: Backend, role: str, config: TokenizerConfig, said: Mapping[str, Any], path: Path) -> str | None:
    """Return the token for a role: from the settings, tokenizer_config.json, or the first common name that exists."""
    named = getattr(config, role)
    if named is not None and backend.token_to_id(named) is None:
        raise UserError(f"{path}: tokenizer.{role}: it has no token {named!r}")
    beside = said.get(f"{role}_token")
    beside = beside.get("content") if isinstance(beside, dict) else beside
    there = (name for name in (named, beside, *COMMON[role]) if name and backend.token_to_id(name) is not None)
    return next(there, None)


def _roles(settings: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """Return the ids of begin, end and padding, from where `adopted` put them."""
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
    """Return the bytes of text that each id stands for; b"" for special tokens and for ids without a token."""
    kinds = {part["type"] for part in _parts(settings.get("decoder"))}
    if not kinds & {"ByteLevel", "ByteFallback"}:
        raise UserError(f"{where}: the model does not give text back exactly (it needs {NEEDS})")
    bytes_of = _byte_level if "ByteLevel" in kinds else _byte_fallback
    _require_all_bytes(backend, CHARACTERS.__getitem__ if "ByteLevel" in kinds else "<0x{:02X}>".format, where)
    added = backend.get_added_tokens_decoder()
    pieces = []
    for i in range(max(backend.get_vocab().values()) + 1):
        name = backend.id_to_token(i)
        if name is None or (i in added and added[i].special):
            pieces.append(b"")
        elif i in added:  # with byte fallback, U+2581 is a space in added tokens too (Gemma's runs of spaces)
            pieces.append((name if "ByteLevel" in kinds else name.replace(_SPACE, " ")).encode())
        else:
            pieces.append(bytes_of(name))
    return pieces


def _require_all_bytes(backend: Backend, name_of: Callable[[int], str], where: str) -> None:
    """Raise UserError unless each byte that occurs in UTF-8 is in the model's vocabulary, by its name there."""
    own = backend.get_vocab(with_added_tokens=False)
    missing = [f"0x{byte:02X}" for byte in range(256) if name_of(byte) not in own and byte not in _NOT_IN_UTF8]
    if missing:
        raise UserError(
            f"{where}: its vocabulary lacks {len(missing)} of the bytes of UTF-8 (the first: {missing[0]}), so texts "
            "with them would not be given back exactly; use another tokenizer, or train one with 'bst data prepare'"
        )


def _starts_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches the empty text before each of the names; None without names."""
    found = "|".join(map(re.escape, names))
    return re.compile(f"(?={found})") if found else None


def _byte_fallback(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode()


def _byte_level(name: str) -> bytes:
    """Return the bytes of a piece. A piece with other characters stands for its letters, as in the library."""
    try:
        return bytes(_BYTES[character] for character in name)
    except KeyError:
        return name.encode()


def _byte_characters() -> dict[int, str]:
    """Return the printable character that byte-level BPE uses for each byte: the byte's own, or one from U+0100 on.

    This is GPT-2's table.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


CHARACTERS = _byte_characters()
"""Byte -> its character in a byte-level BPE."""
_BYTES = {character: byte for byte, character in CHARACTERS.items()}


def _parts(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return a component's parts: itself, or those of a sequence."""
    if part is None:
        return []
    inner = part.get("decoders") or part.get("pretokenizers") or part.get("normalizers")
    return [found for each in inner for found in _parts(each)] if inner else [part]


def _writes_spaces(normalizer: Mapping[str, Any]) -> bool:
    """Whether a normalizer only writes a space as U+2581, which the decoder reverses."""
    return normalizer["type"] == "Replace" and normalizer["content"] == _SPACE


_NO_SPACE = {"add_prefix_space": False, "prepend_scheme": "never"}


def _keep_text_as_it_is(component: dict[str, Any] | None) -> None:
    """Let no part of a component add a space before a text, and remove decoders that strip the first space."""
    if component is None:
        return
    for part in _parts(component):
        part.update({key: value for key, value in _NO_SPACE.items() if key in part})
    if component.get("type") == "Sequence" and "decoders" in component:
        component["decoders"] = [part for part in component["decoders"] if part["type"] != "Strip"]
