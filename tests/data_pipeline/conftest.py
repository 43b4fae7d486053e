"""Small prepared corpora made of known tokens, and a server that hands them out badly."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.format.manifest import Manifest, TokenizerInfo
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import ShardIndex, ShardWriter
from data_pipeline.format.tokenizer import TokenizerConfig, parse_tokenizer, train_tokenizer

MakeCorpus = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A small tokenizer; what it was trained on does not matter to those who serve tokens."""
    words = [f"word{i} = other{i * 7 % 97} + {i}\n" for i in range(400)]
    return train_tokenizer(["".join(words)], TokenizerConfig(vocab_size=400))


@pytest.fixture
def make_corpus(tmp_path: Path, tokenizer_model: bytes) -> MakeCorpus:
    """`make_corpus(lengths, name=…, shards=…)` writes a corpus and returns its directory.

    Token j of document i is ``10 + (31 i + j) mod 380``, but for the end-of-document token, so a test can tell where a
    token comes from.
    """

    def make(lengths: Sequence[int], name: str = "corpus", shards: int = 2, start: int = 0) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        tokenizer = parse_tokenizer(tokenizer_model)
        (directory / "tokenizer.model").write_bytes(tokenizer_model)
        infos = [
            write_shard(directory, number, part.tolist(), lengths, start, tokenizer.eos_id)
            for number, part in enumerate(np.array_split(np.arange(len(lengths)), shards))
        ]
        keys = ("vocab_size", "bos_id", "eos_id", "pad_id", "sha256")
        Manifest(
            tokenizer=TokenizerInfo(file=tokenizer.file, **{key: getattr(tokenizer, key) for key in keys}),
            dtype="uint16",
            splits={"train": tuple(infos), "validation": ()},
            provenance={"name": name},
            licences={"none": len(lengths)},
        ).write(directory)
        return directory

    return make


def tokens_of(document: int, length: int, eos: int) -> np.ndarray:
    """The known tokens of a document."""
    tokens = (10 + (31 * document + np.arange(length)) % 380).astype("<u2")
    tokens[-1:] = eos
    return tokens


def write_shard(
    directory: Path, number: int, documents: list[int], lengths: Sequence[int], start: int, eos: int
) -> ShardInfo:
    """Write one tar and its index; `start` is added to document numbers before their tokens are made."""
    tar, idx = directory / f"train-{number:06d}.tar", directory / f"train-{number:06d}.idx"
    with tar.open("wb") as file:
        writer = ShardWriter(file)
        for document in documents:
            tokens = tokens_of(start + document, lengths[document], eos)
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


class _Listening(ThreadingHTTPServer):
    """A server that takes as many connections at a time as a reader opens."""

    request_queue_size = 128  # with 5, as by default, the kernel drops the others, and their clients time out


class FaultyServer:
    """A real HTTP server on the loopback that serves a directory with ranges, and misbehaves as told.

    ``faults[path]`` is a list of what the next requests for a path get instead: "503", "stall" (headers, then nothing),
    "drop" (half of the body, then the connection is closed), "flip" (a byte changed), "whole" (the range is ignored).
    """

    def __init__(self, directory: Path) -> None:
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str | None]] = []  # (file name, its Range header)
        self.signed: list[tuple[str, str | None]] = []  # (query, Authorization header)
        self._release = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.serve(self, directory)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Listening(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, request: BaseHTTPRequestHandler, directory: Path) -> None:
        """Answer one request."""
        name, _, query = request.path.lstrip("/").partition("?")
        span = request.headers.get("Range")
        self.requests.append((name, span))
        self.signed.append((query, request.headers.get("Authorization")))
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        if fault == "503" or not (directory / name).exists():
            request.send_error(503 if fault == "503" else 404)
            return
        body = bytearray((directory / name).read_bytes())
        if span and fault != "whole":
            first, last = (int(part) for part in span.removeprefix("bytes=").split("-"))
            body = body[first : last + 1]
        if fault == "flip":
            body[len(body) // 2] ^= 0x10
        request.send_response(206 if span and fault != "whole" else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault in ("drop", "stall"):
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
            if fault == "stall":
                self._release.wait(20)
            return
        request.wfile.write(body)

    def close(self) -> None:
        """Stop serving."""
        self._release.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], FaultyServer]]:
    """`serve(directory)` starts a `FaultyServer`, stopped after the test."""
    servers: list[FaultyServer] = []

    def start(directory: Path) -> FaultyServer:
        servers.append(FaultyServer(directory))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
