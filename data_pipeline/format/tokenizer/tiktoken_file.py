"""Converts a tiktoken file (Llama 3's tokenizer.model, cl100k_base, o200k_base) to a tokenizer.json.

Such a file lists each token's bytes, in base64, and its rank, which is its id. Of two neighbouring pairs, the one with
the lower rank is joined first. The pattern that splits text and the special tokens are part of tiktoken's code, so they
are settings here. A tokenizer.json lists pairs, not tokens. So each way to split a token into two tokens becomes a
pair, in the order of `TikTokenConverter` of transformers. If two overlapping places in a text can be joined to the same
token, tiktoken joins the left one, and a tokenizer.json the pair that is listed first.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from bst_base.errors import UserError
from data_pipeline.format.tokenizer.config import TiktokenConfig
from data_pipeline.format.tokenizer.huggingface import CHARACTERS

_LINE = re.compile(rb"[A-Za-z0-9+/=]+ \d+\s")
MOST_UNUSED = 10_000
"""Maximum number of unused ids between the file's ids and a special token's. More is probably a typing error; each
unused id becomes a token."""
_POSSESSIVE_COUNT = re.compile(r"\{\d*,?\d*\}\+")


def is_tiktoken(model: bytes) -> bool:
    return _LINE.match(model) is not None


def as_json(model: bytes, config: TiktokenConfig | None, where: str) -> bytes:
    """Return a tokenizer.json with the same tokens and ids.

    Raises UserError when the file or a setting does not allow it.
    """
    if config is None:
        raise UserError(
            f"{where}: a tiktoken file does not say how to split text: set tokenizer.tiktoken.pat_str (and "
            "special_tokens) as they are given to tiktoken.Encoding, or take the model's tokenizer.json"
        )
    if count := _POSSESSIVE_COUNT.search(config.pat_str):
        raise UserError(
            f"tokenizer.tiktoken.pat_str: {count[0]!r} means something else to the library that splits here: write "
            f"{count[0][:-1]!r}"
        )
    ranks = _ranks(model, where)
    special = _special(ranks, config.special_tokens)
    characters = {token: "".join(CHARACTERS[byte] for byte in token) for token in ranks}
    vocabulary = {characters[token]: rank for token, rank in ranks.items()}
    pairs = [(characters[left], characters[right]) for left, right in _pairs(ranks)]
    backend = Backend(BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    try:
        split = Split(Regex(config.pat_str), "isolated")
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"tokenizer.tiktoken.pat_str: not a regular expression: {error}") from None
    backend.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    for name, token in config.special_tokens.items():
        if (found := backend.token_to_id(name)) != token:
            raise UserError(f"tokenizer.tiktoken.special_tokens: {name!r} is the token {found} of {where} already")
    return backend.to_str().encode()


def _ranks(model: bytes, where: str) -> dict[bytes, int]:
    try:
        pairs = (line.split() for line in model.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise UserError(f"{where}: a damaged tiktoken file: {error}") from None
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{where}: a tiktoken file without a token for byte {missing[0]}: it cannot encode all texts")
    if gaps := set(range(len(ranks))) - set(ranks.values()):
        raise UserError(f"{where}: a tiktoken file without an id {min(gaps)}; take the model's tokenizer.json")
    return ranks


def _special(ranks: Mapping[bytes, int], named: Mapping[str, int]) -> list[str]:
    """Return the special tokens in order of id, with a filler for each unused id: a tokenizer.json has no gaps.

    They are not tokens of the BPE model. Otherwise text would be encoded into them if the pattern keeps their letters
    together.
    """
    by_id = {token: name for name, token in named.items()}
    if taken := sorted(token for token in by_id if token < len(ranks)):
        raise UserError(
            f"tokenizer.tiktoken.special_tokens: {by_id[taken[0]]!r}: id {taken[0]} is that of a token of the file, "
            f"which has ids up to {len(ranks) - 1}"
        )
    highest = max(by_id, default=-1)
    if highest > len(ranks) + MOST_UNUSED:
        raise UserError(
            f"tokenizer.tiktoken.special_tokens: {by_id[highest]!r}: id {highest} is too far above those of the file, "
            f"which has {len(ranks)}"
        )
    return [by_id.get(i, f"<|unused-{i}|>") for i in range(len(ranks), highest + 1)]


def _pairs(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return each way to split a token into two, in the order of the tokens' ranks."""
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        own = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs += sorted(own, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return pairs
