"""Adds the user's own tokens to a tokenizer, with ids after the existing ones. No existing id changes.

A *special* token stands for no text: no document is encoded into it, even if it contains its letters. A *text* token
stands for its letters: a document that contains them is encoded into it. SentencePiece calls them control and
user-defined symbols. In a tokenizer.json, both are added tokens, with the flag `special` true or false.
"""

from __future__ import annotations

import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from bst_base.errors import UserError
from data_pipeline.format.tokenizer.base import Tokenizer
from data_pipeline.format.tokenizer.config import TokenizerConfig
from data_pipeline.format.tokenizer.huggingface import HuggingFaceTokenizer
from data_pipeline.format.tokenizer.ids import IdsOnly
from data_pipeline.format.tokenizer.sentencepiece import SentencePieceTokenizer

_PIECE = proto.ModelProto.SentencePiece


def extended(tokenizer: Tokenizer, config: TokenizerConfig, where: str) -> Tokenizer:
    """Return the tokenizer with `special_tokens` and `text_tokens` added.

    Raises UserError for a token that it has already. There is one exception: an existing special token may be named as
    a text token. It keeps its id, and text is then encoded into it.
    """
    if not config.added:
        return tokenizer
    if isinstance(tokenizer, IdsOnly):
        raise UserError(f"{where}: has ids but no tokenizer, so no tokens can be added: raise source.vocab_size")
    roles = {"begins": tokenizer.bos_id, "ends": tokenizer.eos_id, "fills up": tokenizer.pad_id}
    known = {tokenizer.piece(token): token for token in range(tokenizer.vocab_size)}
    for name in config.added:
        role = next((role for role, token in roles.items() if known.get(name) == token), None)
        if name in config.text_tokens and role:
            raise UserError(
                f"tokenizer.text_tokens: {name!r} {role} the documents of {where}, so no text may be encoded into it"
            )
        if name in known and (name in config.special_tokens or not _is_special(tokenizer, known[name])):
            raise UserError(
                f"tokenizer.{'special' if name in config.special_tokens else 'text'}_tokens: {where} has a token "
                f"{name!r} already (id {known[name]}): leave it out"
            )
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return HuggingFaceTokenizer(_of_json(tokenizer.model, config), where)
    return SentencePieceTokenizer(_of_sentencepiece(tokenizer.model, config), where)


def _is_special(tokenizer: Tokenizer, token: int) -> bool:
    """Whether an id is a special token: marked as such in a tokenizer.json, or a control symbol of SentencePiece."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        added = tokenizer.backend.get_added_tokens_decoder().get(token)
        return added is not None and added.special
    return proto.ModelProto.FromString(tokenizer.model).pieces[token].type == _PIECE.CONTROL


def _of_json(model: bytes, config: TokenizerConfig) -> bytes:
    settings: dict[str, Any] = json.loads(model)
    for token in settings["added_tokens"]:
        if token["content"] in config.text_tokens:
            token.update(special=False, normalized=False, lstrip=False, rstrip=False, single_word=False)
    backend = Backend.from_str(json.dumps(settings))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in config.special_tokens])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in config.text_tokens])
    return backend.to_str(pretty=True).encode()


def _of_sentencepiece(model: bytes, config: TokenizerConfig) -> bytes:
    found = proto.ModelProto.FromString(model)
    there = {piece.piece: piece for piece in found.pieces}
    for name in config.added:
        kind = _PIECE.CONTROL if name in config.special_tokens else _PIECE.USER_DEFINED
        if name in there:
            there[name].type = kind
        else:
            found.pieces.add(piece=name, score=0.0, type=kind)
    found.trainer_spec.vocab_size = len(found.pieces)
    return found.SerializeToString()
