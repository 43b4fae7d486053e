"""A file of tiktoken's (Llama 3's tokenizer.model, cl100k_base, o200k_base) as a tokenizer.json.

Such a file lists each token's bytes, in base64, and its rank, which is its id: of two neighbours the pair with the
lowest rank is joined first. How text is split before, and the special tokens, are in tiktoken's code and are settings
here. A tokenizer.json names pairs and not tokens, so each way to cut a token into two others becomes a pair, in the
order of `TikTokenConverter` of transformers. Where one text offers two cuts of the same token that overlap, tiktoken
joins the left one and a tokenizer.json the one listed first.
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
"""Ids between the file's and a special token's; more is a slip of the pen, and each becomes a token."""
_POSSESSIVE_COUNT = re.compile(r"\{\d*,?\d*\}\+")


def is_tiktoken(model: bytes) -> bool:
    return _LINE.match(model) is not None


def as_json(model: bytes, config: TiktokenConfig | None, where: str) -> bytes:
    """The same tokens with the same ids; raises UserError where the file or a setting does not allow that."""
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
    except Exception as error:  # the library raises no narrower one
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
    """The special tokens by id, with one for each id that has none: those of a tokenizer.json follow each other.

    They are no tokens of the model, which would take text for one where the pattern leaves its letters together.
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
    """Each way to cut a token into two, by the rank of the token."""
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        own = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs += sorted(own, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return pairs
