"""A tokenizer.json gives the same ids as the `tokenizers` library, and decodes every text exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from data_pipeline.format.tokenizer import (
    HuggingFaceTokenizer,
    TokenizerConfig,
    adopt_tokenizer,
    parse_tokenizer,
    read_tokenizer,
)

WORDS = [f"word{i} = other{i * 7 % 97} + {i}\n    return x{i} don't\n\n" for i in range(400)]
AWKWARD = [
    "\u2581",
    "\n",
    "\r\n",
    "\x00",
    "  ",
    "\t",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<0x0A>",
    "e\u0301",
    "\u00e9",
    "\ufb01",
    "\U0001f600",
    "\ufeff",
    "word1 = other2",
    "\u0130",
]
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=20)), max_size=30).map("".join)
encodable = texts.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))


def byte_level(specials=("<|endoftext|>",), prefix=False) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer like GPT-2's and Llama 3's."""
    found = tokenizers.Tokenizer(models.BPE())
    found.normalizer = normalizers.NFC()
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return found


def byte_fallback() -> tokenizers.Tokenizer:
    """Return a tokenizer with byte fallback like Llama 2's and Mistral's."""
    found = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    found.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False))
    settings = json.loads(found.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]  # bytes are only pieces of the vocabulary
    return tokenizers.Tokenizer.from_str(json.dumps(settings))


def unigram() -> tokenizers.Tokenizer:
    """Return a unigram tokenizer with byte fallback like llm-jp's: special tokens and bytes are in its vocabulary."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = ["\u2581word", "word", "other", "return", *"abcdefghijklmnopqrstuvwxyz0123456789<>/\u2581"]
    vocabulary = [*((name, 0.0) for name in names), *((piece, -3.0) for piece in pieces)]
    found = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    found.normalizer = normalizers.Replace(" ", "\u2581")
    found.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens(names[:3])
    return found


KINDS = {
    "byte-level": byte_level,
    "prefix": lambda: byte_level(prefix=True),
    "byte-fallback": byte_fallback,
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("published") / "tokenizer.json"
    KINDS[request.param]().save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(published) -> HuggingFaceTokenizer:
    return adopt_tokenizer(published, TokenizerConfig())


@settings(max_examples=200, deadline=None)
@given(text=encodable)
def test_every_text_decodes_exactly(tokenizer, text) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids.tolist())


def test_ids_equal_those_of_the_library(published, tokenizer) -> None:
    peer = tokenizers.Tokenizer.from_file(str(published))
    lead = " " if tokenizer.encode("x")[0] != peer.encode("x").ids[0] else ""  # the prefix that the library adds
    for text in ("word3 = other21 + 3", "word1\n\n    return x7", "naïve\ttab", "日本語 \U0001f600"):
        assert tokenizer.encode(lead + text).tolist() == peer.encode(text, add_special_tokens=False).ids


def test_stored_tokenizer_reads_back_equal(tokenizer, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.model)
    again = read_tokenizer(tmp_path / "tokenizer.json")
    assert again.sha256 == tokenizer.sha256
    assert adopt_tokenizer(tmp_path, TokenizerConfig()).sha256 == tokenizer.sha256
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_special_tokens_are_found_by_setting_config_file_or_common_name(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level(("<end>", "<|endoftext|>", "<begin>", "<fill>")).save(str(path))
    found = adopt_tokenizer(path, TokenizerConfig())
    assert [found.piece(i) for i in (found.bos_id, found.eos_id, found.pad_id)] == ["<|endoftext|>"] * 3
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<end>"}, "pad_token": "<fill>"})
    )
    found = adopt_tokenizer(path, TokenizerConfig(reuse=path, bos="<begin>"))
    assert [found.piece(i) for i in (found.bos_id, found.eos_id, found.pad_id)] == ["<begin>", "<end>", "<fill>"]


def test_unusable_tokenizers_are_refused_with_the_reason(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level(("<end>",)).save(str(path))
    with pytest.raises(UserError, match=r"which token ends a document.*name it with tokenizer\.eos"):
        adopt_tokenizer(path, TokenizerConfig())
    with pytest.raises(UserError, match=r"tokenizer\.eos: it has no token '<stop>'"):
        adopt_tokenizer(path, TokenizerConfig(reuse=path, eos="<stop>"))
    with pytest.raises(UserError, match="prepare a corpus with it"):
        parse_tokenizer(path.read_bytes())
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        parse_tokenizer(b"{}")
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    words.save(str(path))
    with pytest.raises(UserError, match="does not give text back exactly"):
        adopt_tokenizer(path, TokenizerConfig())
    with pytest.raises(ConfigError, match="meant for a published tokenizer"):
        parse(TokenizerConfig, {"eos": "</s>"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer\.model, tokenizer\.json or vocabulary\.json in it"):
        adopt_tokenizer(tmp_path / "empty", TokenizerConfig())


def test_text_is_not_encoded_into_names_in_the_vocabulary_of_a_unigram_model(tmp_path) -> None:
    unigram().save(str(tmp_path / "tokenizer.json"))
    tokenizer = adopt_tokenizer(tmp_path, TokenizerConfig())
    for text in ("a</s>b", "html <s>strike</s> x", "<0x61>", "x<unk>y", "<<s>", "</s></s>", "<0x0<0x09>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert [tokenizer.piece(i) for i in ids if len(tokenizer.piece(i)) > 1] == []
    assert tokenizer.encode("word</word").tolist() == [
        tokenizer.backend.token_to_id(piece) for piece in ("word", "<", "/", "word")
    ]


def test_special_name_that_a_model_reaches_and_that_cannot_be_cut_is_refused(tmp_path) -> None:
    settings = json.loads(unigram().to_str())
    settings["added_tokens"].append(
        settings["added_tokens"][0]
        | {"id": next(i for i, (p, _) in enumerate(settings["model"]["vocab"]) if p == "z")}
        | {"content": "z"}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="encodes text into 'z'"):
        adopt_tokenizer(tmp_path, TokenizerConfig())


@pytest.mark.parametrize("kind", [byte_level, unigram])
def test_vocabulary_that_lacks_a_byte_of_utf8_is_refused(kind, tmp_path) -> None:
    settings = json.loads(kind().to_str())
    vocabulary = settings["model"]["vocab"]
    if isinstance(vocabulary, dict):  # GPT-2 writes the byte 0xD0 as U+00D0
        vocabulary["gone"] = vocabulary.pop("\u00d0")
    else:
        vocabulary[3 + 0xD0][0] = "gone"
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"lacks 1 of the bytes of UTF-8 \(the first: 0xD0\)"):
        adopt_tokenizer(tmp_path, TokenizerConfig())


def saved(settings: dict, path: Path) -> Path:
    (path / "tokenizer.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("normalized", [False, True])
def test_runs_of_spaces_as_added_tokens_are_spaces_as_in_gemma(normalized, tmp_path) -> None:
    pieces = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581\u2581"]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [("\u2581", "\u2581")], unk_token="<unk>", byte_fallback=True
    )
    gemma = tokenizers.Tokenizer(model)
    gemma.normalizer = normalizers.Replace(" ", "\u2581")
    gemma.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    gemma.add_special_tokens(["<eos>", "<unk>"])
    gemma.add_tokens([tokenizers.AddedToken("\u2581\u2581", normalized=normalized)])
    tokenizer = adopt_tokenizer(saved(json.loads(gemma.to_str()), tmp_path), TokenizerConfig())
    assert tokenizer.encode("a  b").tolist() == gemma.encode("a  b", add_special_tokens=False).ids
    assert [tokenizer.piece(i) for i in tokenizer.encode("a  b")] == ["a", "\u2581\u2581", "b"]
    for text in ("a  b", "a \u2581\u2581 b", "\u2581", "   "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_piece_that_is_not_byte_level_stands_for_its_letters_as_in_the_library(tmp_path) -> None:
    settings = json.loads(byte_level().to_str())
    number = len(settings["model"]["vocab"])
    settings["model"]["vocab"]["\u4f60\u597d"] = number
    tokenizer = adopt_tokenizer(saved(settings, tmp_path), TokenizerConfig())
    assert tokenizer.decode([number]) == tokenizer.backend.decode([number]) == "\u4f60\u597d"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_tokenizer_config_is_named(content, tmp_path) -> None:
    saved(json.loads(byte_level().to_str()), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json.*move it away and set tokenizer\.eos"):
        adopt_tokenizer(tmp_path, TokenizerConfig())


@pytest.mark.parametrize("name", ["<eos:0>", "$eos", "<e os>", "a:1"])
def test_end_token_may_have_any_name(name, tmp_path) -> None:
    saved(json.loads(byte_level((name,)).to_str()), tmp_path)
    tokenizer = adopt_tokenizer(tmp_path, TokenizerConfig(reuse=tmp_path, eos=name))
    assert tokenizer.piece(tokenizer.eos_id) == name
    assert tokenizer.backend.encode("a").ids == [tokenizer.eos_id, *tokenizer.encode("a").tolist(), tokenizer.eos_id]


def test_dropout_of_merges_is_switched_off(tmp_path) -> None:
    settings = json.loads(byte_level().to_str())
    exact = adopt_tokenizer(saved(settings, tmp_path), TokenizerConfig())
    settings["model"]["dropout"] = 0.5
    assert adopt_tokenizer(saved(settings, tmp_path), TokenizerConfig()).sha256 == exact.sha256
