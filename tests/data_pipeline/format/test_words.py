"""Ids looked up word by word equal those that SentencePiece gives for the whole line."""

from __future__ import annotations

import io
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from data_pipeline.format.tokenizer import MAX_LINE, TokenizerConfig, parse_tokenizer, train_tokenizer, words
from data_pipeline.format.tokenizer import sentencepiece as sentencepiece_module
from data_pipeline.format.tokenizer.bpe import Merges
from data_pipeline.format.tokenizer.sentencepiece import SentencePieceTokenizer
from data_pipeline.format.tokenizer.table import Table
from data_pipeline.format.tokenizer.words import words_are_independent

LANGUAGES = [
    "The quick brown fox jumps over the lazy dog; it's 1,234.5 metres away (or so they say).",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを 我が世誰ぞ 常ならむ",
    "นายสังฆภัณฑ์ เฮงพิทักษ์ฝั่ง",
    "    for (int i = 0; i < n; ++i) { x[i] += y[i] * 0x1F; }\t// loop",
    "\t\treturn self._known.get(word,  None)   ",
]
SOURCES = [Path(module.__file__).read_text() for module in (re, statistics)]
AWKWARD = [
    " ",
    "  ",
    "   ",
    "\n",
    "\r\n",
    "\t",
    "\u2581",
    "\u2581 ",
    "\x00",
    "\x85",
    "\u00a0",
    "\u3000",
    "\u2028",
    "<0x0A>",
    "\U0001f600",
    "e\u0301",
    "\ufffd",
    "a",
    "self",
    "aaaa",
    "<|chat|>",
    *LANGUAGES,
]
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8)), max_size=40).map("".join)
encodable = texts.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))


def by_lines(tokenizer: SentencePieceTokenizer, text: str) -> list[int]:
    """Return the canonical ids by SentencePiece's processor: whole lines; newlines and U+2581 encoded separately."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    space = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    ids: list[int] = []
    for piece in re.findall(rf"\n|[^\n]{{1,{MAX_LINE}}}", text):
        for part in re.split("(\u2581)", piece):
            special = {"\n": [tokenizer.newline_id], "\u2581": space}
            ids += special.get(part) or processor.encode(part)
    return ids


@pytest.fixture(scope="module", params=["trained", "others"])
def tokenizer(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    """A tokenizer trained here, and one with its own symbols that splits by script."""
    lines = [*SOURCES, *LANGUAGES * 20]
    if request.param == "trained":
        model = train_tokenizer(lines, TokenizerConfig(vocab_size=1500))
    else:
        model = foreign(user_defined_symbols=["\n", "<|chat|>", "  ", "self"], split_by_unicode_script=True)
    tokenizer = parse_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer._words is not None
    assert tokenizer._words._merges is not None
    return tokenizer


@pytest.fixture(params=[1, 1 << 30], ids=["joined together", "by SentencePiece"])
def new_words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the number of new words from which on they are encoded together."""
    monkeypatch.setattr(words, "_MANY", request.param)


def in_bulk(tokenizer: SentencePieceTokenizer, *texts: str) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_all(texts)]


def foreign(**changes: object) -> bytes:
    model = io.BytesIO()
    options = {
        "vocab_size": 1200,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["\n"],
        "minloglevel": 2,
        "model_type": "bpe",
        "hard_vocab_limit": False,
        "allow_whitespace_only_pieces": True,
        **changes,
    }
    lines = [line for text in (*SOURCES, *LANGUAGES * 20) for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some=st.lists(encodable, max_size=4))
def test_ids_equal_those_of_whole_lines(tokenizer: SentencePieceTokenizer, new_words: None, some: list[str]) -> None:
    expected = [by_lines(tokenizer, text) for text in some]
    assert in_bulk(tokenizer, *some) == expected
    assert [tokenizer.encode(text).tolist() for text in some] == expected


LONG = ("word é " * MAX_LINE)[: 2 * MAX_LINE + 5] + "\nx "
REAL = [*SOURCES, "\n".join(LANGUAGES * 3), LONG, LONG.replace("\n", "\u2581"), "x" * 40_000]


def test_real_text_has_the_same_ids_as_whole_lines(
    tokenizer: SentencePieceTokenizer, new_words: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [by_lines(tokenizer, text) for text in REAL]
    assert in_bulk(tokenizer, *REAL) == expected
    monkeypatch.setattr(words, "_TOGETHER", 3000)
    monkeypatch.setattr(sentencepiece_module, "_BATCH_ALL", 2000)
    monkeypatch.setattr(sentencepiece_module, "_BATCH", 500)
    assert in_bulk(tokenizer, *REAL) == expected


def test_words_with_equal_hashes_are_distinguished(
    tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that differ only after the hashed part; and a hash of few bits, so that many words collide."""
    some = [*SOURCES, *("x" * n + end for n in (63, 64, 65, 200) for end in ("", "a", "b"))]
    expected = [by_lines(tokenizer, text) for text in some]
    assert in_bulk(tokenizer, " ".join(some[2:])) == [by_lines(tokenizer, " ".join(some[2:]))]
    monkeypatch.setattr(words, "_mixed", lambda values: values & np.uint64(7))
    monkeypatch.setattr(tokenizer._words, "_kept", words._Kept(tokenizer.dtype))
    for _ in range(2):
        assert in_bulk(tokenizer, *some) == expected


def test_number_of_cached_words_is_bounded(tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_WORDS", 100)
    for start in range(0, 3000, 7):
        own = " ".join(f"w{i}" for i in range(start, start + 7))
        assert in_bulk(tokenizer, own) == [by_lines(tokenizer, own)]
        assert tokenizer._words._kept.counts.size <= 100 + 8


def test_pieces_are_merged_as_in_sentencepiece(tokenizer: SentencePieceTokenizer) -> None:
    """Every word of some text, and words in which several pairs have the best score; few words are left out."""
    some = sorted({word for text in SOURCES for word in text.split()} | {"a" * n for n in range(1, 65)})
    characters = np.array([ord(character) for word in some for character in word])
    known, counts, ids = tokenizer._words._merges.encode(characters, np.array(list(map(len, some))))
    assert known.mean() > (0.95 if tokenizer.vocab_size > 1400 else 0.3)  # the other has symbols that begin with s, <
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    expected = [processor.encode(word) for word, own in zip(some, known, strict=True) if own]
    assert [own.tolist() for own in np.split(ids, np.cumsum(counts[known]))[:-1]] == expected


@pytest.mark.parametrize("change", ["scores", "unused", "characters"])
def test_models_with_other_merge_rules_are_encoded_by_sentencepiece(change: str) -> None:
    model = proto.ModelProto.FromString(foreign())
    assert Merges.of(model) is not None
    longer = [piece for piece in model.pieces if piece.type == piece.NORMAL and len(piece.piece) > 2]
    if change == "scores":
        longer[0].score = longer[1].score
    elif change == "unused":
        longer[0].type = longer[0].UNUSED
    else:
        model.pieces.add(piece="\u0df4\u0df4", score=-9999.0, type=longer[0].NORMAL)  # no piece for one of them
    assert Merges.of(model) is None
    tokenizer = parse_tokenizer(model.SerializeToString())
    assert in_bulk(tokenizer, *SOURCES) == [by_lines(tokenizer, text) for text in SOURCES]


def test_hash_table_finds_added_keys_and_grows() -> None:
    keys = np.random.default_rng(0).permutation(np.arange(1, 20_001)).astype(np.uint64)
    table = Table(10)
    for start in range(0, 10_000, 500):
        table.add(keys[start : start + 500], np.arange(start, start + 500, dtype=np.int32))
        found = table.find(keys)
        assert (found[: start + 500] == np.arange(start + 500)).all() and (found[start + 500 :] == -1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"split_by_whitespace": False},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["\n", "a b"]},
        {"user_defined_symbols": ["\n", "x\u2581="]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_models_with_dependent_words_encode_whole_lines(changes: dict) -> None:
    tokenizer = parse_tokenizer(foreign(**changes))
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer._words is None
    for text in (*SOURCES, "a b x = a b"):
        assert in_bulk(tokenizer, text) == [by_lines(tokenizer, text)]


@pytest.mark.parametrize("rule", ["add_dummy_prefix", "remove_extra_whitespaces", "charsmap"])
def test_words_are_not_independent_with_normalisation_rules(rule: str) -> None:
    model = proto.ModelProto.FromString(foreign())
    assert words_are_independent(model.SerializeToString())
    if rule == "charsmap":
        model.normalizer_spec.precompiled_charsmap = b"x"
    else:
        setattr(model.normalizer_spec, rule, True)
    assert not words_are_independent(model.SerializeToString())
