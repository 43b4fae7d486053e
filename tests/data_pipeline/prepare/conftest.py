"""Small folders of text, prepared in this process."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bst_base.settings import parse
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import Workers


def text(i: int, words: int = 200) -> str:
    """Return a text that is different for each `i`, with several lines and special characters."""
    rng = random.Random(i)
    lines = (" ".join(f"w{rng.randrange(900)}" for _ in range(8)) for _ in range(words // 8))
    return f"Text {i} \u2581 é\r\n" + "\n".join(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty text files in two directories."""
    for i in range(30):
        file = tmp_path / "text" / ("a", "b")[i % 2] / f"{i:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text(i).encode())
    return tmp_path / "text"


Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings_of(tmp_path: Path, folder: Path) -> Settings:
    """`settings_of(output, **changes)` returns settings to prepare the folder into several small shards."""

    def settings(output: str = "corpus", **changes: Any) -> dict[str, Any]:
        return {
            "source": {"kind": "folder", "path": str(folder)},
            "output": str(tmp_path / output),
            "tokenizer": {"vocab_size": 600},
            "validation_fraction": 0.2,
            "shard_bytes": 8000,
            **changes,
        }

    return settings


Run = Callable[..., tuple[Manifest, dict[str, Any]]]


@pytest.fixture
def run(settings_of: Settings) -> Run:
    """`run(output, **changes)` prepares the folder in this process."""

    def go(output: str = "corpus", progress: Callable = lambda *_: None, **changes: Any) -> tuple[Manifest, dict]:
        config = parse(PrepareConfig, settings_of(output, **changes))
        return prepare(config, Workers(None, 1), progress)

    return go


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """`files_of(corpus)` returns the content of every file of a corpus directory, without hidden files."""
    return lambda corpus: {f.name: f.read_bytes() for f in corpus.iterdir() if f.is_file() and f.name[0] != "."}
