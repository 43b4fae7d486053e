"""What every exported tokenizer must do with any text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from data_pipeline.format.tokenizer import Tokenizer


def require_same_ids(theirs: PreTrainedTokenizerBase, ours: Tokenizer, text: str) -> None:
    """Check that an exported tokenizer, of joined documents, gives the corpus's ids and decodes them to the text."""
    ids = ours.encode(text).tolist()
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs(text).input_ids == [ours.eos_id, *ids]
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
