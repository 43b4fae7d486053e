"""Sources in an object store are copied once, and then behave like a local directory."""

from __future__ import annotations

import gzip
import json
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import Workers
from data_pipeline.sources import SOURCES, Document, Skipped, copies
from data_pipeline.store.remote import FoundFile, RemoteStorage


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    """Use a separate cache for this test."""
    monkeypatch.setenv("BST_DATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Callable[[dict[str, bytes]], str]]:
    """`store(files)` replaces the content of a store in memory by these files, and returns its address."""
    memory, name = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"

    def put(files: dict[str, bytes]) -> str:
        if memory.exists(name):
            memory.rm(name, recursive=True)
        for path, data in files.items():
            memory.pipe_file(f"{name}/{path}", data)
        return f"memory://{name[1:]}"

    yield put
    if memory.exists(name):
        memory.rm(name, recursive=True)


def read(kind: str, **settings: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Fetch a source; return {path: content} of its documents, and {path: reason} of skipped ones."""
    source = SOURCES[kind](**settings)
    source.fetch()
    listing = source.listing()
    found = [*listing.skipped, *(each for part in listing.parts for each in source.read(part))]
    documents = {each.path: each.content for each in found if isinstance(each, Document)}
    return documents, {each.path: each.reason for each in found if isinstance(each, Skipped)}


def test_selected_files_are_copied_once_and_again_after_changes(store, tmp_path: Path, monkeypatch) -> None:
    files = {"a.txt": b"A", "b/c.txt": b"C", "b/no.md": b"no"}
    address, copied, real = store(files), [], copies._copy_one
    monkeypatch.setattr(copies, "_copy_one", lambda *args: copied.append(args[1].name) or real(*args))
    for _ in range(2):
        assert read("folder", path=address) == ({"a.txt": b"A", "b/c.txt": b"C"}, {"*.md": "ending .md"})
        assert sorted(copied) == ["a.txt", "b/c.txt"]
    copied.clear()
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{address.removeprefix('memory:/')}/a.txt", b"Z")  # of the same size
    memory.rm(f"{address.removeprefix('memory:/')}/b/c.txt")
    assert read("folder", path=address)[0] == {"a.txt": b"Z"}
    assert copied == ["a.txt"]
    (log,) = tmp_path.glob("cache/addresses/*/fetched.jsonl")
    log.write_text(log.read_text() + '["a.txt", 1')  # an incomplete line, as after a kill
    assert read("folder", path=address)[0] == {"a.txt": b"Z"}
    assert copied == ["a.txt"]


def test_preparations_of_one_address_keep_the_files_that_others_chose(store) -> None:
    address = store({"a.txt": b"A", "b.md": b"B"})
    first, second = (SOURCES["folder"](path=address, pattern=f"*.{ending}") for ending in ("txt", "md"))
    first.fetch()
    (part,) = first.listing().parts
    second.fetch()
    assert [each.content for each in first.read(part)] == [b"A"]
    assert {each.path: each.count for each in second.listing().skipped} == {"*.txt": 1}


def test_second_preparation_that_would_use_the_same_copies_is_refused(store) -> None:
    address = store({"a.txt": b"A"})
    one, same, other = (SOURCES["folder"](path=address, pattern=p) for p in ("*.txt", "*.txt", "*.md"))
    with one.in_use():
        with pytest.raises(UserError, match="another preparation is copying or reading the same files"), same.in_use():
            pass
        with other.in_use():
            pass
    with same.in_use():
        pass


def test_single_remote_file_and_source_with_metadata_are_read(store, tmp_path: Path) -> None:
    line = json.dumps({"text": "x"}).encode()
    address = store({"x.jsonl.gz": gzip.compress(line), "y.jsonl": line})
    assert read("jsonl", path=f"{address}/x.jsonl.gz")[0] == {"x.jsonl.gz:1": "x"}
    address = store({"train/1.txt": b"B", "metadata.csv": b"1,Title,1900,x\n", "train/x.md": b""})
    assert read("pg19", path=address) == (
        {"train/1.txt": b"B"},
        {"*.md": "ending .md", "*.csv": "ending .csv"},
    )


def test_missing_or_unsafe_remote_files_give_one_message(store, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"memory://nowhere: nothing is there; source\.path must be"):
        read("folder", path="memory://nowhere")
    with pytest.raises(UserError, match=r"no usable file there \(left out: 1 ending \.csv, 1 ending \.md\)"):
        read("folder", path=store({"a.md": b"", "b.csv": b""}))
    monkeypatch.setattr(RemoteStorage, "files", lambda self: [FoundFile("../x.txt", 1, ""), FoundFile("y.txt", 1, "")])
    with pytest.raises(UserError, match=r"'\.\./x\.txt' would lie outside the folder of copies"):
        read("folder", path="memory://x")
    with pytest.raises(ConfigError, match="sig would be written into the run directory"):
        parse(PrepareConfig, {"source": {"kind": "folder", "path": "https://h/x?sig=abc"}, "output": "x"})


def test_corpus_from_an_object_store_equals_one_from_a_directory(
    s3_endpoint: Callable[[], dict[str, Any]], put: Callable[..., Path], tmp_path: Path, monkeypatch
) -> None:
    words = random.Random(0).choices([f"w{n}" for n in range(900)], k=1200)
    texts = {f"{i}.jsonl": json.dumps({"text": " ".join(words[200 * i : 200 * (i + 1)])}) for i in range(6)}
    root = put(texts | {"README.md": "x"})
    options = s3_endpoint()
    fsspec.filesystem("s3", **options).mkdir("raw")
    fsspec.filesystem("s3", **options).put(str(root), "raw/texts", recursive=True)
    monkeypatch.setenv("STORE_SECRET", options["secret"])
    monkeypatch.setenv("STORE_KEY", options["key"])
    told = options | {"secret": "$STORE_SECRET", "key": "$STORE_KEY"}
    manifests = []
    for name, source in [("near", {"path": str(root)}), ("far", {"path": "s3://raw/texts", "storage_options": told})]:
        settings = {
            "source": {"kind": "jsonl", **source},
            "output": str(tmp_path / name),
            "tokenizer": {"vocab_size": 300},
            "validation_fraction": 0.3,
        }
        manifests.append(prepare(parse(PrepareConfig, settings), Workers(None, 1), lambda *_: None)[0])
    assert manifests[0].sha256 == manifests[1].sha256
    assert (tmp_path / "near/skipped.jsonl").read_text() == (tmp_path / "far/skipped.jsonl").read_text() != ""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a plain file server without range requests, which serves the folder `www`."""
    (tmp_path / "www/texts").mkdir(parents=True)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def test_files_on_a_web_server_are_read_and_copied_once(server: str, tmp_path: Path, monkeypatch) -> None:
    line = json.dumps({"text": "x" * 100}).encode() + b"\n"
    (tmp_path / "www/a.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "www/texts/b.txt").write_bytes(b"B")
    (tmp_path / "www/texts/c.md").write_bytes(b"C")
    copied, real = [], copies._copy_one
    monkeypatch.setattr(copies, "_copy_one", lambda *args: copied.append(args[1].name) or real(*args))
    for _ in range(2):
        assert read("jsonl", path=f"{server}/a.jsonl.gz")[0] == {"a.jsonl.gz:1": "x" * 100}
    assert copied == ["a.jsonl.gz"]
    assert read("folder", path=f"{server}/texts") == ({"b.txt": b"B"}, {"*.md": "ending .md"})
    with pytest.raises(UserError, match=r"nowhere\.jsonl: nothing is there; source\.path must be"):
        read("jsonl", path=f"{server}/nowhere.jsonl")


def test_unreachable_server_is_not_reported_as_empty(monkeypatch) -> None:
    monkeypatch.setattr(RemoteStorage, "_pause", lambda *_: None)
    with pytest.raises(UserError, match=r"not read in 6 attempts; the last: Client.*Cannot connect to host"):
        read("jsonl", path="http://127.0.0.1:1/a.jsonl")
