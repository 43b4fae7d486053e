"""Runs read the same corpus from a store that was pushed there, even after interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs

from bst_base.errors import StorageError, UserError
from bst_dist import cli
from data_pipeline.format.manifest import Manifest
from data_pipeline.serve.reader import Corpus
from data_pipeline.store import push as pushing
from data_pipeline.store.base import StorageConfig
from data_pipeline.store.push import UNDER_WAY, push

LENGTHS = [20_000, 12, 700, 9_000, 5_000]


@pytest.fixture(autouse=True)
def no_client_of_another_test() -> Iterator[None]:
    """Clear fsspec's client cache, because its key contains the arguments but not the environment variables."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def quiet(*_: int) -> None:
    pass


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_command_uploads_a_readable_corpus_to_s3(
    make_corpus: Any, s3_endpoint: Callable[[], dict[str, Any]], monkeypatch, capsys
) -> None:
    directory, server = make_corpus(LENGTHS), s3_endpoint()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", server["client_kwargs"]["region_name"])
    s3fs.S3FileSystem(**server).mkdir("corpora")
    assert cli.main(["data", "push", str(directory), "s3://corpora/books"]) == 0
    assert "6 files sent" in capsys.readouterr().out
    found, expected = Corpus.open("s3://corpora/books", "train", StorageConfig()), Corpus.open(str(directory))
    assert found.sha256 == expected.sha256
    assert all(np.array_equal(found.document(i), expected.document(i)) for i in range(len(LENGTHS)))
    assert cli.main(["data", "push", str(directory), "s3://corpora/books"]) == 0
    assert "0 files sent, 0.0 MB, 6 were there already" in capsys.readouterr().out


def test_interrupted_push_leaves_no_corpus_and_can_continue(make_corpus: Any, tmp_path: Path, monkeypatch) -> None:
    directory, there = make_corpus(LENGTHS), tmp_path / "there"
    put, sent = pushing._Target.put, []

    def broken(self: Any, corpus: Path, file: Any) -> None:
        if len(sent) == 2:
            raise StorageError("the network is gone")
        put(self, corpus, file)
        sent.append(file.name)

    monkeypatch.setattr(pushing, "_TRANSFERS", 1)
    monkeypatch.setattr(pushing._Target, "put", broken)
    with pytest.raises(StorageError, match="gone"):
        push(directory, f"file://{there}", False, quiet)
    assert files(there).keys() == {*sent, UNDER_WAY}
    with pytest.raises(UserError, match="no prepared corpus"):
        Corpus.open(str(there))
    (there / sent[1]).write_bytes(b"half of it")
    monkeypatch.setattr(pushing._Target, "put", put)
    assert push(directory, f"file://{there}", False, quiet).already_there == 1
    assert files(there) == files(directory)


def test_push_of_a_damaged_or_other_corpus_is_refused(make_corpus: Any, tmp_path: Path) -> None:
    one, other = make_corpus(LENGTHS), make_corpus(LENGTHS[:3], name="other")
    there = tmp_path / "there"
    tar = one / "train-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1] + b"x")
    with pytest.raises(UserError, match=r"train-000001\.tar: not what the manifest says"):
        push(one, f"file://{there}", False, quiet)
    assert not (there / "manifest.json").exists() and not (there / tar.name).exists()
    tar.write_bytes(whole)
    push(one, f"file://{there}", False, quiet)
    with pytest.raises(UserError, match="holds another corpus"):
        push(other, f"file://{there}", True, quiet)
    with pytest.raises(UserError, match="not an address"):
        push(one, str(there), False, quiet)
    assert files(there) == files(one)


def test_push_of_a_grown_corpus_sends_only_new_files(make_corpus: Any, tmp_path: Path) -> None:
    first = make_corpus(LENGTHS[:3], shards=1)
    grown = make_corpus(LENGTHS[:3], name="grown", shards=1)
    (grown / "added.extents").write_bytes(b"a file that only the grown one has")
    manifest = Manifest.read(grown)
    provenance = {"continues": [Manifest.read(first).sha256]}
    sha256 = pushing.sha256_file(grown / "added.extents")
    Manifest(
        **{
            **dict(manifest),
            "provenance": provenance,
            "extents": {"train": {"file": "added.extents", "sha256": sha256}},
        }
    ).write(grown)
    url = f"file://{tmp_path / 'there'}"
    push(first, url, False, quiet)
    with pytest.raises(UserError, match="with --grow"):
        push(grown, url, False, quiet)
    sent = push(grown, url, True, quiet)
    assert (sent.files, sent.already_there) == (2, 3)  # the file and the manifest; a tar, its index, the tokenizer
    assert files(tmp_path / "there") == files(grown)
