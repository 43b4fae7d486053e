"""Added tokens get the ids that SentencePiece and `tokenizers` give, and no other ids change."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from bst_dist.hub.fast_tokenizer import fast_tokenizer, is_bpe
from bst_dist.hub.tokenization import BSTTokenizer
from data_pipeline.format.tokenizer import (
    MAX_LINE,
    IdsOnly,
    Tokenizer,
    TokenizerConfig,
    adopt_tokenizer,
    extended,
    parse_tokenizer,
    train_tokenizer,
)

WORDS = "".join(f"word{i} = other{i * 7 % 97} + {i}\n    return x{i} <tool> | user\n" for i in range(400))
SPECIAL, TEXT = ("<|user|>", "[INST]"), ("<|code|>", "<tool>", "<tool>s")
CONFIG = TokenizerConfig(vocab_size=420, special_tokens=SPECIAL, text_tokens=TEXT)
spelt = st.lists(
    st.one_of(st.sampled_from([*SPECIAL, *TEXT, "<|co", "\n", " ", "\u2581", "word1 = other2"]), st.text(max_size=8)),
    max_size=20,
).map("".join)
encodable = spelt.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))


def trained(kind: str, config: TokenizerConfig = CONFIG) -> Tokenizer:
    return parse_tokenizer(train_tokenizer([WORDS], config.model_copy(update={"model_type": kind})))


def published(folder: Path) -> Path:
    """Write a byte-level tokenizer.json with special tokens to a folder; return its path."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator([WORDS], trainer)
    found.add_special_tokens([AddedToken("<|stripping|>", special=True, lstrip=True, rstrip=True)])
    found.add_tokens([AddedToken("<own>", special=False, lstrip=True, rstrip=True)])
    found.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=["bpe", "unigram", "reused", "json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    if request.param in ("bpe", "unigram"):
        return trained(request.param)
    if request.param == "json":
        return extended(adopt_tokenizer(published(folder), CONFIG), CONFIG, "it")
    plain = trained("bpe", TokenizerConfig(vocab_size=400))
    return extended(plain, CONFIG, "it")


def ids_of(tokenizer: Tokenizer) -> dict[str, int]:
    return {tokenizer.piece(token): token for token in range(tokenizer.vocab_size)}


@settings(max_examples=150, deadline=None)
@given(text=encodable)
def test_text_never_encodes_to_special_tokens_and_decodes_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids, named = tokenizer.encode(text).tolist(), ids_of(tokenizer)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {named[name] for name in SPECIAL} & set(ids)
    left, found = text, []  # the leftmost token, and of several the longest
    while starts := [(left.find(name), -len(name), name) for name in TEXT if name in left]:
        start, _, name = min(starts)
        found.append(named[name])
        left = left[start + len(name) :]
    assert [token for token in ids if token in {named[name] for name in TEXT}] == found


def test_ids_equal_those_of_sentencepiece(tokenizer: Tokenizer) -> None:
    if tokenizer.file != "tokenizer.model":
        pytest.skip("of a SentencePiece model")
    peer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    for text in ("word1<|code|>word2 <tool>s<tool> x", "<|user|> [INST]word3 = other21", "<|code|><|code|>"):
        assert tokenizer.encode(text).tolist() == peer.encode(text)
    assert [peer.is_control(peer.piece_to_id(name)) for name in (*SPECIAL, *TEXT)] == [True] * 2 + [False] * 3


def test_ids_equal_those_of_the_tokenizers_library(tmp_path: Path) -> None:
    path = published(tmp_path)
    found, peer = extended(adopt_tokenizer(path, CONFIG), CONFIG, "it"), tokenizers.Tokenizer.from_file(str(path))
    before = peer.get_vocab_size()
    peer.add_special_tokens(list(SPECIAL))
    peer.add_tokens([AddedToken(name, normalized=False) for name in TEXT])
    peer.encode_special_tokens = True
    for text in ("word1<|code|>word2 <tool>s<tool> x", "<|user|> [INST]word3 <|im_start|>", "<|code|><|code|>"):
        assert found.encode(text).tolist() == peer.encode(text, add_special_tokens=False).ids
    assert [found.piece(before + i) for i in range(5)] == [*SPECIAL, *TEXT]
    assert found.vocab_size == before + 5


def test_added_tokens_get_ids_after_those_of_a_reused_tokenizer() -> None:
    plain = trained("bpe", TokenizerConfig(vocab_size=400))
    more = extended(plain, CONFIG, "it")
    assert [more.piece(i) for i in range(400)] == [plain.piece(i) for i in range(400)]
    assert [more.piece(i) for i in range(400, 405)] == [*SPECIAL, *TEXT]
    assert more.encode("word7 = other49").tolist() == plain.encode("word7 = other49").tolist()
    assert extended(plain, TokenizerConfig(), "it") is plain


def test_long_lines_are_not_split_inside_an_added_token() -> None:
    found = trained("bpe")
    text = "x" * (MAX_LINE - 3) + "<|code|>" + "y" * MAX_LINE
    ids = found.encode(text).tolist()
    assert ids.count(ids_of(found)["<|code|>"]) == 1
    assert found.decode(ids) == text


def test_special_token_of_a_model_can_become_a_text_token(tmp_path: Path) -> None:
    path = published(tmp_path)
    plain = adopt_tokenizer(path, TokenizerConfig())
    own = plain.backend.token_to_id("<|im_start|>")
    asked = extended(plain, TokenizerConfig(reuse=path, text_tokens=("<|im_start|>",)), "it")
    assert own not in plain.encode("<|im_start|>user")
    assert asked.encode("<|im_start|>user")[0] == own
    assert asked.vocab_size == plain.vocab_size
    assert asked.decode([own]) == "<|im_start|>"
    for name in ("<|stripping|>", "<own>"):  # in the library these also remove surrounding spaces
        asked = extended(plain, TokenizerConfig(reuse=path, text_tokens=("<|stripping|>",)), "it")
        assert asked.backend.token_to_id(name) in asked.encode(f"a  {name}  b")
        assert asked.decode(asked.encode(f"a  {name}  b")) == f"a  {name}  b"
    with_control = trained("bpe", TokenizerConfig(vocab_size=400, special_tokens=("<x>",)))
    own = ids_of(with_control)["<x>"]
    asked = extended(with_control, TokenizerConfig(text_tokens=("<x>",)), "it")
    assert own not in with_control.encode("<x>")
    assert asked.encode("<x>").tolist() == [own]


def test_exported_tokenizers_contain_added_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / tokenizer.file).write_bytes(tokenizer.model)
    unigram = tokenizer.file == "tokenizer.model" and not is_bpe(tokenizer)
    exported = BSTTokenizer(str(tmp_path / tokenizer.file)) if unigram else fast_tokenizer(tokenizer, None)
    exported.save_pretrained(tmp_path / "exported")
    exported = type(exported).from_pretrained(tmp_path / "exported")
    for text in ("word1<|code|>word2 <tool>s\n<tool> x", "<|user|> [INST]word3", "\u2581<|code|> y\n\n"):
        assert exported.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
    named = ids_of(tokenizer)
    for name in (*SPECIAL, *TEXT):
        assert exported.convert_tokens_to_ids(name) == named[name]
    ids = [named["<|user|>"], *tokenizer.encode("a<tool>"), named["[INST]"]]
    assert exported.decode(ids) == "<|user|>a<tool>[INST]"
    assert exported.decode(ids, skip_special_tokens=True) == "a<tool>"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"special_tokens": [""]}, "special_tokens: an empty token"),
        ({"text_tokens": ["a b"]}, "text_tokens: 'a b' holds a space or a control character"),
        ({"special_tokens": ["a\u2581"]}, "holds a space"),
        ({"special_tokens": ["<x>", "<x>"]}, r"special_tokens: '<x>' is named twice"),
        ({"special_tokens": ["<x>"], "text_tokens": ["<x>"]}, "'<x>' is named twice"),
        ({"text_tokens": ["</s>"]}, "'</s>' is a token of every tokenizer that is trained here"),
        ({"special_tokens": ["<0x0A>"]}, "'<0x0A>' is a token of every tokenizer"),
    ],
)
def test_invalid_added_tokens_are_refused(settings: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(TokenizerConfig, settings)


def test_added_tokens_that_the_tokenizer_already_has_are_refused(tmp_path: Path) -> None:
    path = published(tmp_path)
    for found in (adopt_tokenizer(path, TokenizerConfig()), trained("bpe", TokenizerConfig(vocab_size=400))):
        eos, piece = found.piece(found.eos_id), found.piece(found.vocab_size - 1)
        for asked, told in (
            ({"special_tokens": [eos]}, rf"special_tokens: it has a token .* already \(id {found.eos_id}\)"),
            ({"special_tokens": [piece]}, r"special_tokens: it has a token .* already"),
            ({"text_tokens": [piece]}, r"text_tokens: it has a token .* already"),
            ({"text_tokens": [eos]}, r"text_tokens: .* the documents of it, so no text may be encoded into it"),
        ):
            with pytest.raises(UserError, match=told):
                extended(found, TokenizerConfig(reuse=path, **asked), "it")
    with pytest.raises(UserError, match=r"raise source\.vocab_size"):
        extended(IdsOnly.of(10, 0), TokenizerConfig(reuse=path, special_tokens=("<x>",)), "it")


def test_tokens_are_added_to_a_foreign_sentencepiece_model(tmp_path: Path) -> None:
    """A SentencePiece model with its own symbols, not trained by this project."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.splitlines()),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["<|own|>"],
        user_defined_symbols=["<|mark|>"],
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    found = extended(adopt_tokenizer(path, CONFIG), CONFIG, "it")
    named = ids_of(found)
    ids = found.encode("<|own|><|mark|>x<|code|>").tolist()
    assert named["<|own|>"] not in ids
    assert [token for token in ids if token in (named["<|mark|>"], named["<|code|>"])] == [
        named["<|mark|>"],
        named["<|code|>"],
    ]
    assert sorted(named.values()) == list(range(405))
