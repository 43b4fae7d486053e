from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import bst_dist.hub
from data_pipeline.format.tokenizer import read_tokenizer
from tests.hub.tokenizing import require_same_ids

TEXT = st.lists(
    st.one_of(
        st.text(), st.sampled_from(["</s>", "<pad>", "<unk>", " ", "  ", "\n", "\t", "\x00", "▁", "for", "\r\n"])
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def both(tmp_path_factory, sentencepiece_model):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(sentencepiece_model)
    return bst_dist.hub.BSTTokenizer(str(path), bos_token="</s>"), read_tokenizer(path)


@settings(deadline=None)
@given(text=TEXT)
def test_every_text_has_our_ids_and_is_decoded_back(both, text):
    theirs, ours = both
    require_same_ids(theirs, ours, text)
    ids = ours.encode(text).tolist()
    assert theirs.decode(ids) == text
    assert theirs.decode([ours.eos_id, *ids, ours.eos_id, ours.pad_id], skip_special_tokens=True) == text
    assert theirs.convert_tokens_to_string(theirs.tokenize(text)) == text


@given(ids=st.lists(st.integers(0, 319)))
def test_any_ids_decode_to_the_same_text_as_ours(both, ids):
    theirs, ours = both
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_special_tokens_are_decoded_by_name_unless_skipped(both):
    theirs, ours = both
    ids = [ours.eos_id, *ours.encode("é"), ours.pad_id]
    assert theirs.decode(ids) == "</s>é<pad>"
    assert theirs.batch_decode([ids, ids], skip_special_tokens=True) == ["é", "é"]


def test_a_saved_tokenizer_is_unchanged(both, tmp_path):
    theirs, _ = both
    theirs.save_pretrained(tmp_path)
    again = bst_dist.hub.BSTTokenizer.from_pretrained(tmp_path)
    texts = ["a", "naïve\n\n  </s>"]
    assert again(texts, padding=True).data == theirs(texts, padding=True).data
    assert again.get_vocab() == theirs.get_vocab()
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (3, 3, 0)


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_texts_start_with_the_end_token_only_for_joined_documents(exported, documents):
    tokenizer = AutoTokenizer.from_pretrained(exported(documents=documents)[1])
    begin = [3] if documents == "joined" else []
    assert tokenizer("for").input_ids == begin + tokenizer.encode("for", add_special_tokens=False)
