"""Encoding line by line decodes to the same text, for any text and any cuts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from bst_base.errors import UserError
from data_pipeline.format.tokenizer import (
    MAX_LINE,
    Tokenizer,
    TokenizerConfig,
    adopt_tokenizer,
    parse_tokenizer,
    read_tokenizer,
    train_tokenizer,
)

# Strings that SentencePiece treats specially: its space, newlines of all kinds, NUL, the names of its symbols.
AWKWARD = [
    "\u2581",
    "\n",
    "\r\n",
    "\u2028",
    "\x85",
    "\x00",
    " ",
    "  ",
    "\t",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "\ufffd",
    "e\u0301",
    "\u00e9",
    "\U0001f600",
    "\ufeff",
    "word1 = other2",
]
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=20)), max_size=30).map("".join)
encodable = texts.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    words = "".join(f"word{i} = other{i * 7 % 97} + {i}\n    return x{i}\n" for i in range(400))
    return parse_tokenizer(train_tokenizer([words], TokenizerConfig(vocab_size=400, model_type=request.param)))


@settings(max_examples=300, deadline=None)
@given(text=encodable)
def test_every_text_decodes_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(first=encodable, second=encodable)
def test_ids_of_a_line_do_not_depend_on_other_lines(tokenizer: Tokenizer, first: str, second: str) -> None:
    apart = [*tokenizer.encode(first), tokenizer.newline_id, *tokenizer.encode(second)]
    assert tokenizer.encode(f"{first}\n{second}").tolist() == apart


@settings(max_examples=100, deadline=None)
@given(text=encodable)
def test_token_bytes_sum_to_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_plain_lines_have_the_same_ids_as_in_sentencepiece(tokenizer: Tokenizer) -> None:
    peer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    for line in ("word3 = other21 + 3", "    return x7  ", "naïve\ttab", "日本語"):
        assert tokenizer.encode(line).tolist() == peer.encode(line)
        assert tokenizer.decode(peer.encode(line)) == peer.decode(peer.encode(line)) == line


def test_incomplete_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\U0001f600")
    assert tokenizer.decode(ids[:-1]) == "a\ufffd"


@pytest.mark.parametrize("length", [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 3 * MAX_LINE + 7])
def test_a_long_line_is_encoded_in_pieces_of_fixed_length(tokenizer: Tokenizer, length: int) -> None:
    line = ("word1 é " * (length // 8 + 1))[:length]
    pieces = [tokenizer.encode(line[i : i + MAX_LINE]) for i in range(0, length, MAX_LINE)]
    assert np.array_equal(tokenizer.encode(line), np.concatenate(pieces))
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_control_symbols_decode_to_empty_text(tokenizer: Tokenizer) -> None:
    symbols = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert len(set(symbols)) == 3
    assert tokenizer.token_bytes[symbols].tolist() == [0, 0, 0]
    assert tokenizer.decode(symbols) == ""


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_twice_gives_the_same_bytes(model_type: str) -> None:
    config = TokenizerConfig(vocab_size=350, model_type=model_type)
    lines = [f"some text number {i * i} of many\n" for i in range(300)]
    assert train_tokenizer(lines, config) == train_tokenizer(iter(lines), config)


def test_vocabulary_size_that_does_not_fit_the_text_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"vocab_size=8000 is too high for this text: it gives 2\d\d ids;"):
        train_tokenizer(["a few words\n"], TokenizerConfig(vocab_size=8000))
    ideographs = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
    with pytest.raises(UserError, match=r"vocab_size=400 is too low for this text: its characters alone take 76\d ids"):
        train_tokenizer([ideographs], TokenizerConfig(vocab_size=400))


def test_small_vocabulary_takes_two_bytes_per_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.dtype == np.dtype("<u2")
    assert tokenizer.encode("").dtype == np.dtype("<u2")


OPTIONS = {
    "vocab_size": 350,
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "user_defined_symbols": ["\n"],
    "pad_id": 3,
    "minloglevel": 2,
    "hard_vocab_limit": False,
    "model_type": "bpe",
}


def foreign(**changes: object) -> bytes:
    """Return a SentencePiece model trained with other settings than ours."""
    model = io.BytesIO()
    lines = iter([f"some text number {i * i} of many" for i in range(300)])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**OPTIONS, **changes})
    return model.getvalue()


@pytest.mark.parametrize("change", [{"byte_fallback": False}, {"add_dummy_prefix": True}])
def test_tokenizer_that_does_not_decode_exactly_is_refused(change: dict) -> None:
    with pytest.raises(UserError, match="does not give text back exactly"):
        parse_tokenizer(foreign(**change), "other.model")


# Includes Llama's and Gemma's settings: a space in front, NFKC, merged spaces, no padding, no newline symbol.
FOREIGN = {
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": True,
    "normalization_rule_name": "nmt_nfkc",
    "user_defined_symbols": [],
    "pad_id": -1,
}


@pytest.mark.parametrize("changes", [FOREIGN, {"pad_id": -1, "bos_id": -1}, {"model_type": "unigram", **FOREIGN}])
@settings(max_examples=40, deadline=None)
@given(text=encodable)
def test_foreign_model_is_adopted_without_its_normalisation(tmp_path_factory, changes: dict, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"{abs(hash(str(changes)))}.model"
    if not path.exists():
        path.write_bytes(foreign(**changes))
    tokenizer = adopt_tokenizer(path, TokenizerConfig())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.pad_id == tokenizer.eos_id
    peer = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    assert [tokenizer.piece(i) for i in range(tokenizer.vocab_size)] == peer.id_to_piece(list(range(len(peer))))


def test_adopted_model_keeps_the_ids_of_words(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(foreign(**FOREIGN))
    tokenizer = adopt_tokenizer(tmp_path, TokenizerConfig())
    peer = sentencepiece.SentencePieceProcessor(model_proto=(tmp_path / "tokenizer.model").read_bytes())
    assert tokenizer.encode(" some text number 36 of many").tolist() == peer.encode("some text number 36 of many")


def test_file_that_is_not_a_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"x\.model: not a SentencePiece model"):
        read_tokenizer(tmp_path / "x.model")
    with pytest.raises(UserError, match=r"y\.model: the tokenizer is missing"):
        read_tokenizer(tmp_path / "y.model")


def test_directory_with_two_tokenizers_is_refused_until_one_is_named(tmp_path: Path) -> None:
    model = train_tokenizer([f"word {i} and other words {7 * i}" for i in range(99)], TokenizerConfig(vocab_size=300))
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert adopt_tokenizer(tmp_path, TokenizerConfig()).model == model
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds tokenizer\.model and tokenizer\.json: name the file to use"):
        adopt_tokenizer(tmp_path, TokenizerConfig())
    assert adopt_tokenizer(tmp_path / "tokenizer.model", TokenizerConfig()).model == model


def test_settings_of_roles_are_refused_where_they_have_no_effect(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        train_tokenizer([f"word {i} and other words {7 * i}" for i in range(99)], TokenizerConfig(vocab_size=300))
    )
    with pytest.raises(UserError, match=r"tokenizer\.eos, tokenizer\.pad: no effect here"):
        adopt_tokenizer(path, TokenizerConfig(reuse=path, eos="</s>", pad="<pad>"))
