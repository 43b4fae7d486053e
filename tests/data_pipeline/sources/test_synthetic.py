"""Synthetic tasks as text: the text equals the task's rows, is the same on every machine, and mixes with other text."""

from __future__ import annotations

import pytest

from bst_base.settings import ConfigError, parse
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.sources import SOURCES
from data_pipeline.sources.synthetic import word

COPY = {"task": "copy", "lag": 7, "symbols": 30}


def source(**changes):
    return parse(SOURCES["synthetic"], {"task": COPY, "words": 40, "documents": 2500, **changes})


def test_numbers_are_words_in_base_26():
    assert [word(i) for i in (0, 25, 26, 51, 52, 26 * 26)] == ["a", "z", "ba", "bz", "ca", "baa"]
    assert len({word(i) for i in range(2000)}) == 2000


def test_synthetic_documents_equal_task_rows_and_parts_are_independent(read_all):
    documents, skipped = read_all("synthetic", task=COPY, words=40, documents=2500)
    assert (len(documents), skipped) == (2500, {})
    assert len({d.path for d in documents}) == len({d.content for d in documents}) == 2500
    for document in documents[::400]:
        words = document.content.split()
        assert len(words) == 40
        assert words[7:] == words[:-7]  # the task's own rule, on the words
        assert set(words) <= {word(i) for i in range(30)}
    made = source()
    second = made.listing().parts[1]
    assert [d.content for d in made.read(second)] == [d.content for d in documents[1000:2000]]
    other = next(source(seed=1).read(made.listing().parts[0]))
    assert other.content != documents[0].content


def test_synthetic_documents_are_pinned():
    """For this version of the tasks, so that a corpus made of them can be reproduced."""
    first = next(
        source(task={"task": "associative-recall", "pairs": 2, "keys": 4, "symbols": 4}, words=12).read(
            source().listing().parts[0]
        )
    )
    assert first.content == "d g b i d g a a a a b i\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": 7}, "words 7: lag 7 leaves nothing to copy in rows of 6 inputs"),
        ({"task": {"task": "copy"}}, "lag"),
        ({"task": {"task": "copi", "lag": 3}}, "copi"),
        ({"documents": 0}, "documents"),
    ],
)
def test_invalid_synthetic_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        source(**changes)


def test_synthetic_source_can_be_set_in_prepare_settings():
    made = parse(PrepareConfig, {"source": {"kind": "synthetic", "task": COPY, "words": 40}, "output": "x"})
    assert made.model_dump(mode="json")["source"]["task"] == COPY
