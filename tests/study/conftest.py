from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bst_base.settings import parse
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import open_workers


class InMemory:
    """Corpus of random tokens in memory. Records the longest range of tokens that was read at once."""

    def __init__(self, lengths: list[int], vocabulary: int):
        random = np.random.default_rng(0)
        self.lengths = np.array(lengths, np.uint32)
        self.documents = [random.integers(0, vocabulary, n).astype(np.uint16) for n in lengths]
        self.longest_read = 0

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        self.longest_read = max(self.longest_read, stop - start)
        assert 0 <= start <= stop <= len(self.documents[document])
        return self.documents[document][start:stop]


@pytest.fixture
def in_memory():
    return InMemory


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """Documents by name, with characters of several bytes."""
    words = ["naïve", "café", "for", "x", "=", "(", ")", "\n", "    ", "return", "é", "😀", "12"]
    random = np.random.default_rng(0)
    return {f"{i:02}.txt": " ".join(random.choice(words, 40 + 10 * i)) for i in range(40)}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> Path:
    """A prepared corpus of the documents."""
    folder, output = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("prepared") / "corpus"
    for name, text in texts.items():
        (folder / name).write_text(text)
    settings = {
        "source": {"kind": "folder", "path": str(folder), "pattern": "*.txt"},
        "output": str(output),
        "tokenizer": {"vocab_size": 320},
        "validation_fraction": 0.2,
    }
    with open_workers(1) as workers:
        prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
    return output


@pytest.fixture(scope="session")
def corpus_of_ids(tmp_path_factory) -> Path:
    """A prepared corpus of token ids that came without a tokenizer; each document ends with the id 1."""
    folder, output = tmp_path_factory.mktemp("ids"), tmp_path_factory.mktemp("prepared") / "ids"
    random = np.random.default_rng(0)
    documents = [np.append(random.integers(2, 320, 40 + 10 * i), 1) for i in range(20)]
    np.concatenate(documents).astype(np.uint16).tofile(folder / "all.bin")
    source = {"kind": "nanogpt", "path": str(folder), "vocab_size": 320, "eos_id": 1}
    settings = {"source": source, "output": str(output), "validation_fraction": 0.4}
    with open_workers(1) as workers:
        prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
    return output


@pytest.fixture
def run_on_ids(make_run, corpus, corpus_of_ids) -> Path:
    """A run on the corpus of ids."""
    run_dir = make_run("ids")
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(corpus), str(corpus_of_ids)))
    return run_dir
