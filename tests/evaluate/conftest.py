from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bst_dist.config import Recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.train.checkpoint import FORMAT, MANIFEST, WEIGHTS, directory, shard_file
from bst_dist.train.metrics import FILE
from bst_dist.train.rundir import RECIPE
from data_pipeline.config import dump, parse
from data_pipeline.parallel import open_workers
from data_pipeline.prepare import PrepareConfig, prepare


class InMemory:
    """Documents of random tokens; like a corpus, gives any run of one, and remembers the longest it gave."""

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
        "source": {"kind": "folder", "path": str(folder), "pattern": "*.txt"}, "output": str(output),
        "tokenizer": {"vocab_size": 320}, "validation_fraction": 0.2,
    }  # fmt: skip
    with open_workers(1) as workers:
        prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
    return output


@pytest.fixture
def make_run(tmp_path, corpus):
    """A run directory as training leaves it: recipe, metrics and checkpoints with random weights."""

    def make(name: str = "run", steps: tuple[int, ...] = (4,), seed: int = 0, documents: str = "joined") -> Path:
        settings = {
            "name": "small", "seed": 0, "data": {"corpus": str(corpus), "documents": documents},
            "model": {"vocab_size": 320, "width": 16, "heads": 2, "ffn": 16, "block": 8, "depth": 2, "mixer": "bst",
                      "ssm": {"chunk": 4}},
            "train": {"steps": 4, "sequence_length": 32, "sequences": 2, "precision": "fp32"},
        }  # fmt: skip
        run_dir = tmp_path / name
        run_dir.mkdir(parents=True, exist_ok=True)
        recipe = parse(Recipe, settings)
        for step in steps:
            torch.manual_seed(seed + step)
            write_checkpoint(directory(run_dir, step), LanguageModel(recipe.model))
        (run_dir / RECIPE).write_text(dump(recipe))
        keys = ("loss_nats", "bits_per_byte", "gradient_norm", "learning_rate", "tokens_per_s")
        lines = [{"kind": "train", "step": i, "tokens": 64 * i, **dict.fromkeys(keys, 1 / i)} for i in range(1, 5)]
        lines.append(
            {"kind": "eval", "split": "validation", "step": 4, "tokens": 9, "loss_nats": 2, "bits_per_byte": 3}
        )
        (run_dir / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run_dir

    return make


def write_checkpoint(path: Path, model: LanguageModel) -> None:
    path.mkdir(parents=True)
    save_file(model.state_dict(), path / shard_file(WEIGHTS, 0))
    data = (path / shard_file(WEIGHTS, 0)).read_bytes()
    files = {shard_file(WEIGHTS, 0): {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rank": 0}}
    (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}))
