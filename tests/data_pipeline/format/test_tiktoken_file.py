"""tiktoken files, compared with tiktoken itself."""

from __future__ import annotations

import base64
import sysconfig
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from data_pipeline.format.tokenizer import TokenizerConfig, adopt_tokenizer, parse_tokenizer
from data_pipeline.format.tokenizer.config import TiktokenConfig
from data_pipeline.format.tokenizer.huggingface import _BYTES

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LIBRARY = Path(sysconfig.get_path("stdlib"))
END, GAP = "<|endoftext|>", 3
"""The end token, and the gap between the last rank and its id, as in cl100k_base."""


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Return the ranks, in merge order, of a byte-level BPE that `tokenizers` has trained on some code."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train([str(LIBRARY / "argparse.py"), str(LIBRARY / "typing.py")], trainer)
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return {bytes(_BYTES[character] for character in name): token for name, token in vocabulary}


@pytest.fixture(scope="module")
def path(ranks, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiktoken") / "code.tiktoken"
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())
    path.write_bytes(b"".join(lines))
    return path


def config(ranks, **changes) -> TokenizerConfig:
    said = {"pat_str": PATTERN, "special_tokens": {END: len(ranks) + GAP}} | changes
    return TokenizerConfig(reuse="x", tiktoken=TiktokenConfig(**said))


@pytest.fixture(scope="module")
def both(ranks, path):
    peer = tiktoken.Encoding("code", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks) + GAP})
    return adopt_tokenizer(path, config(ranks)), peer


@pytest.mark.parametrize("name", ["ast.py", "json/decoder.py", "this.py", "encodings/cp932.py"])
def test_real_text_has_the_same_ids_as_in_tiktoken(both, name):
    ours, peer = both
    text = (LIBRARY / name).read_text()
    assert ours.encode(text).tolist() == peer.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60)
    | st.text("aeself. _'1\n", max_size=60)
)
def test_any_text_has_the_same_ids_as_in_tiktoken(both, text):
    ours, peer = both
    assert ours.encode(text).tolist() == peer.encode_ordinary(text)


def test_end_token_has_its_id_and_text_never_encodes_to_it(both, ranks):
    ours, peer = both
    assert ours.eos_id == len(ranks) + GAP == peer.eot_token
    assert ours.vocab_size == peer.n_vocab
    assert ours.encode(END).tolist() == peer.encode_ordinary(END)
    assert parse_tokenizer(ours.model).encode("x y").tolist() == peer.encode_ordinary("x y")


def test_pattern_matching_a_whole_special_token_does_not_encode_text_to_it(path, ranks):
    ours = adopt_tokenizer(path, config(ranks, pat_str=r"\S+|\s+"))
    assert ours.eos_id not in ours.encode(f"{END} {END}")
    assert ours.decode(ours.encode(f"{END} {END}")) == f"{END} {END}"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"pat_str": "("}, "tokenizer.tiktoken.pat_str: not a regular expression"),
        ({"pat_str": r"\p{N}{1,3}+|."}, r"'\{1,3\}\+' means something else .* write '\{1,3\}'"),
        (
            {"special_tokens": {END: 5}},
            f"special_tokens: '{END.replace('|', '[|]')}': id 5 is that of a token of the file",
        ),
        ({"special_tokens": {}}, r"which token ends a document\?.*: define it in tokenizer\.tiktoken\.special_tok"),
        ({"special_tokens": {END: 2_000_000_000}}, "id 2000000000 is too far above those of the file"),
        ({"special_tokens": {"self": 3000, END: 3001}}, r"'self' is the token \d+ of \S+ already"),
    ],
)
def test_invalid_tiktoken_settings_are_refused(path, ranks, changes, says):
    with pytest.raises(UserError, match=says):
        adopt_tokenizer(path, config(ranks, **changes))


def test_duplicate_special_token_ids_are_refused():
    with pytest.raises(ConfigError, match=r"special_tokens: id 7 of '<a>' is given twice"):
        parse(TiktokenConfig, {"pat_str": ".", "special_tokens": {"<a>": 7, "<b>": 7}}, where="settings")


def test_unusable_tiktoken_files_are_refused_by_name(path, ranks, tmp_path):
    with pytest.raises(UserError, match=r"code\.tiktoken: a tiktoken file does not say how to split text: set tok"):
        adopt_tokenizer(path, TokenizerConfig(reuse="x"))
    damaged = tmp_path / "damaged.tiktoken"
    damaged.write_bytes(path.read_bytes() + b"no base64\n")
    with pytest.raises(UserError, match=r"damaged\.tiktoken: a damaged tiktoken file"):
        adopt_tokenizer(damaged, config(ranks))
    few = tmp_path / "few.tiktoken"
    few.write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match=r"few\.tiktoken: .* without a token for byte 0"):
        adopt_tokenizer(few, config(ranks))
    gap = tmp_path / "gap.tiktoken"
    gap.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]) + b"bm93aGVyZQ== 2999\n")
    with pytest.raises(UserError, match=r"gap\.tiktoken: .* without an id 2998"):
        adopt_tokenizer(gap, config(ranks))
    gap.write_bytes(path.read_bytes().replace(b"IQ== 0\n", b"IQ== 3000\n"))
    with pytest.raises(UserError, match=r"gap\.tiktoken: .* without an id 0"):
        adopt_tokenizer(gap, config(ranks))
    (tmp_path / "tokenizer.json").write_bytes(adopt_tokenizer(path, config(ranks)).model)
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken: .* is not a tiktoken file: leave it out"):
        adopt_tokenizer(tmp_path / "tokenizer.json", config(ranks))
