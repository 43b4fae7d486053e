"""Published tokenizers that write a space as U+2581, like Llama 2's and Mistral's: exports give the corpus's ids."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bst_dist.hub.fast_tokenizer import fast_tokenizer
from data_pipeline.format.tokenizer import TokenizerConfig, adopt_tokenizer, extended
from tests.hub.tokenizing import require_same_ids

SPACE = "\u2581"
WORDS = [f"word{i} =  other{i * 7 % 97} + {i}\n    return x{i} don't\n\n" for i in range(300)]
TEXT = st.lists(
    st.one_of(
        st.text(),
        st.sampled_from(
            [
                SPACE,
                f"{SPACE}{SPACE}",
                f" {SPACE}",
                " ",
                "   ",
                "\n",
                "\x00",
                "</s>",
                "<unk>",
                "<0x41>",
                "word1 = other2",
                "é",
                "<|x|>",
                "<mark>",
            ]
        ),
    ),
    max_size=8,
).map("".join)
METASPACE = {"replacement": SPACE, "prepend_scheme": "first"}
WRITING = {
    "normaliser": (normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]), None),
    "words": (None, pre_tokenizers.Metaspace(**METASPACE, split=True)),
    "whole texts": (None, pre_tokenizers.Metaspace(**METASPACE, split=False)),
    "both": (normalizers.Replace(" ", SPACE), pre_tokenizers.Metaspace(**METASPACE, split=True)),
}
"""How spaces are written: by the normaliser, the pre-tokenizer, or both."""
SPECIALS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


@pytest.fixture(scope="module", params=WRITING)
def both(request, tmp_path_factory):
    """An exported tokenizer, read again, and the corpus's."""
    found = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.normalizer, pre = WRITING[request.param]
    if pre is not None:
        found.pre_tokenizer = pre
    found.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIALS, show_progress=False))
    stored = json.loads(found.to_str())
    stored["added_tokens"] = stored["added_tokens"][:3]  # bytes are only pieces of the vocabulary
    folder = tmp_path_factory.mktemp("published")
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    config = TokenizerConfig(reuse=folder / "tokenizer.json", special_tokens=("<|x|>",), text_tokens=("<mark>",))
    ours = extended(adopt_tokenizer(folder / "tokenizer.json", config), config, "it")
    fast_tokenizer(ours, ours.eos_id).save_pretrained(folder / "exported")
    return PreTrainedTokenizerFast.from_pretrained(folder / "exported"), ours


@given(text=TEXT)
def test_every_text_has_our_ids_and_is_decoded_back(both, text):
    require_same_ids(*both, text)


def test_pieces_with_spaces_are_used(both):
    theirs, ours = both
    pieces = [theirs.convert_ids_to_tokens(token) for token in ours.encode("  word1 = other2").tolist()]
    assert any(piece.startswith(" ") and len(piece) > 1 for piece in pieces)
    assert len(theirs) == ours.vocab_size
