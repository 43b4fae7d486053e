"""A word's ids are looked up, and are those that SentencePiece gives the whole line."""

from __future__ import annotations

import io
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from data_pipeline.format.tokenizer import MAX_LINE, TokenizerConfig, parse_tokenizer, train_tokenizer, words
from data_pipeline.format.tokenizer.sentencepiece import SentencePieceTokenizer
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
AWKWARD = [" ", "  ", "   ", "\n", "\r\n", "\t", "\u2581", "\u2581 ", "\x00", "\x85", "\u00a0", "\u3000", "\u2028",
           "<0x0A>", "\U0001f600", "e\u0301", "\ufffd", "a", "self", "aaaa", "<|chat|>", *LANGUAGES]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8)), max_size=40).map("".join)
encodable = texts.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))


def by_lines(tokenizer: SentencePieceTokenizer, text: str) -> list[int]:
    """The canonical ids, by the stock processor: whole lines, with newlines and U+2581 apart."""
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
    """One trained here, and one with symbols of its own and scripts apart."""
    lines = [*SOURCES, *LANGUAGES * 20]
    if request.param == "trained":
        model = train_tokenizer(lines, TokenizerConfig(vocab_size=1500))
    else:
        model = foreign(user_defined_symbols=["\n", "<|chat|>", "  ", "self"], split_by_unicode_script=True)
    tokenizer = parse_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer._words is not None
    return tokenizer


def foreign(**changes: object) -> bytes:
    model = io.BytesIO()
    options = {
        "vocab_size": 1200, "byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity", "user_defined_symbols": ["\n"], "minloglevel": 2, "model_type": "bpe",
        "hard_vocab_limit": False, "allow_whitespace_only_pieces": True, **changes,
    }  # fmt: skip
    lines = [line for text in (*SOURCES, *LANGUAGES * 20) for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


@settings(max_examples=300, deadline=None)
@given(text=encodable)
def test_the_ids_are_those_of_whole_lines(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert tokenizer.encode(text).tolist() == by_lines(tokenizer, text)


LONG = ("word é " * MAX_LINE)[: 2 * MAX_LINE + 5] + "\nx "


@pytest.mark.parametrize("text", [*SOURCES, "\n".join(LANGUAGES * 3), LONG])
def test_real_text_has_the_ids_of_whole_lines(
    tokenizer: SentencePieceTokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_lines(tokenizer, text)
    assert tokenizer.encode(text).tolist() == expected
    monkeypatch.setattr(words, "_ROOM", 3000)  # so that what is kept is forgotten again and again
    for _ in range(2):
        assert tokenizer.encode(text).tolist() == expected


def test_kept_words_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_ROOM", 10_000)
    kept = words.WordIds(lambda each: [[len(word)] for word in each], np.dtype("<u2"), {})
    for start in range(0, 10_000, 7):
        own = [f"w{i}" for i in range(start, start + 7)]
        assert np.frombuffer(kept.ids(own), "<u2").tolist() == [len(word) for word in own]
        assert sum(len(word) + 200 for word in kept._known) <= 10_000


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
def test_a_model_whose_words_depend_on_each_other_encodes_whole_lines(changes: dict) -> None:
    tokenizer = parse_tokenizer(foreign(**changes))
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer._words is None
    for text in (*SOURCES, "a b x = a b"):
        assert tokenizer.encode(text).tolist() == by_lines(tokenizer, text)


@pytest.mark.parametrize("rule", ["add_dummy_prefix", "remove_extra_whitespaces", "charsmap"])
def test_what_changes_text_first_keeps_words_from_being_looked_up(rule: str) -> None:
    model = proto.ModelProto.FromString(foreign())
    assert words_are_independent(model.SerializeToString())
    if rule == "charsmap":
        model.normalizer_spec.precompiled_charsmap = b"x"
    else:
        setattr(model.normalizer_spec, rule, True)
    assert not words_are_independent(model.SerializeToString())
