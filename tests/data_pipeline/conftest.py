"""Fixtures: small prepared corpora of known tokens, and a server that serves them with faults."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.format.manifest import Manifest, TokenizerInfo
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import ShardIndex, ShardWriter
from data_pipeline.format.tokenizer import TokenizerConfig, parse_tokenizer, train_tokenizer
from tests.data_pipeline.server import FaultyServer

MakeCorpus = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A small tokenizer. Its training text does not matter to tests that serve tokens."""
    words = [f"word{i} = other{i * 7 % 97} + {i}\n" for i in range(400)]
    return train_tokenizer(["".join(words)], TokenizerConfig(vocab_size=400))


@pytest.fixture
def make_corpus(tmp_path: Path, tokenizer_model: bytes) -> MakeCorpus:
    """`make_corpus(lengths, name=…, shards=…)` writes a corpus and returns its directory.

    Token j of document i is ``10 + (31 i + j) mod 380``, except the end-of-document token. So a test can tell which
    document and position a token comes from.
    """

    def make(
        lengths: Sequence[int], name: str = "corpus", shards: int = 2, start: int = 0, dtype: str = "uint16"
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        tokenizer = parse_tokenizer(tokenizer_model)
        (directory / "tokenizer.model").write_bytes(tokenizer_model)
        infos = [
            write_shard(directory, number, part.tolist(), lengths, start, tokenizer.eos_id, dtype)
            for number, part in enumerate(np.array_split(np.arange(len(lengths)), shards))
        ]
        keys = ("vocab_size", "bos_id", "eos_id", "pad_id", "sha256")
        Manifest(
            tokenizer=TokenizerInfo(file=tokenizer.file, **{key: getattr(tokenizer, key) for key in keys}),
            dtype=dtype,
            splits={"train": tuple(infos), "validation": ()},
            provenance={"name": name},
            licences={"none": len(lengths)},
        ).write(directory)
        return directory

    return make


def tokens_of(document: int, length: int, eos: int) -> np.ndarray:
    """Return the known tokens of a document."""
    tokens = (10 + (31 * document + np.arange(length)) % 380).astype("<u2")
    tokens[-1:] = eos
    return tokens


def write_shard(
    directory: Path,
    number: int,
    documents: list[int],
    lengths: Sequence[int],
    start: int,
    eos: int,
    dtype: str = "uint16",
) -> ShardInfo:
    """Write one tar and its index; `start` is added to document numbers before their tokens are made."""
    tar, idx = directory / f"train-{number:06d}.tar", directory / f"train-{number:06d}.idx"
    with tar.open("wb") as file:
        writer = ShardWriter(file)
        for document in documents:
            tokens = tokens_of(start + document, lengths[document], eos).astype(np.dtype(dtype).newbyteorder("<"))
            writer.add(f"{document:08d}", {"id": document, "n_tokens": len(tokens), "path": f"d{document}"}, tokens)
        writer.close()
    index = ShardIndex.build(tar)
    index.write(idx)
    return ShardInfo(
        file=tar.name,
        bytes=index.tar_bytes,
        sha256=index.tar_sha256,
        documents=len(documents),
        tokens=sum(lengths[document] for document in documents),
        text_bytes=0,
        index=idx.name,
        index_sha256=hashlib.sha256(idx.read_bytes()).hexdigest(),
    )


@pytest.fixture
def serve() -> Iterator[Callable[[Path], FaultyServer]]:
    """`serve(directory)` starts a `FaultyServer`, which is stopped after the test."""
    servers: list[FaultyServer] = []

    def start(directory: Path) -> FaultyServer:
        servers.append(FaultyServer(directory))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
