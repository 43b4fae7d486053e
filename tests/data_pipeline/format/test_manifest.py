"""The manifest identifies a corpus, and is refused if it is missing, foreign or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bst_base.errors import UserError
from data_pipeline.format.manifest import MANIFEST, Manifest, sha256_file
from data_pipeline.format.shard_table import ShardTable


def test_manifest_reads_back_equal_and_has_the_hash_of_its_file(make_corpus) -> None:
    corpus = make_corpus([5, 9, 3])
    manifest = Manifest.read(corpus)
    assert Manifest.from_bytes(manifest.to_bytes(), "x") == manifest
    assert manifest.sha256 == sha256_file(corpus / MANIFEST)
    assert (manifest.documents("train"), manifest.tokens("train"), manifest.documents("validation")) == (3, 17, 0)


def test_changed_manifest_has_another_hash(make_corpus) -> None:
    manifest = Manifest.read(make_corpus([5, 9, 3]))
    first, *others = manifest.splits["train"]
    changed = manifest.model_copy(update={"splits": {"train": (first.model_copy(update={"tokens": 1}), *others)}})
    assert changed.sha256 != manifest.sha256


def test_a_manifest_without_extents_keeps_its_bytes(make_corpus) -> None:
    corpus = make_corpus([5, 9, 3])
    data = (corpus / MANIFEST).read_bytes()
    assert b"extents" not in data and Manifest.read(corpus).to_bytes() == data


def test_shard_table_returns_every_shard(make_corpus) -> None:
    shards = Manifest.read(make_corpus([5, 9, 3], shards=3)).splits["train"]
    assert [shard.tokens for shard in shards] == [5, 9, 3] == shards.column("tokens").tolist()
    assert [type(value) for value in shards[1].model_dump().values()] == [str, int, str, int, int, int, str, str]
    assert list(shards[1:]) == list(ShardTable(list(shards)[1:])) and not ShardTable()
    assert shards != shards[:2] and ShardTable(shards) == shards


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", "x", "tokens"),
        ("tokens", 2**70, "tokens"),
        ("file", 3, "file"),
        ("sha", "0", r"unknown key 'splits\.train\.1\.sha'"),
    ],
)
def test_invalid_shard_entries_are_refused_with_the_field_name(
    make_corpus, field: str, value: object, message: str
) -> None:
    corpus = make_corpus([5, 9, 3], shards=3)
    raw = json.loads((corpus / MANIFEST).read_text())
    raw["splits"]["train"][1][field] = value
    with pytest.raises(UserError, match=message):
        Manifest.from_bytes(json.dumps(raw).encode(), "x")


def test_unknown_split_error_lists_the_existing_splits(make_corpus) -> None:
    with pytest.raises(UserError, match=r"no split 'dev', only train, validation"):
        Manifest.read(make_corpus([4, 4])).shards("dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no prepared corpus there"),
        (b"", "not a manifest"),
        (b"[]", "format version None"),
        (b'{"format_version": 2}', "format version 2, this program reads 1"),
        (json.dumps({"format_version": 1, "shard": []}).encode(), "unknown key 'shard'"),
    ],
)
def test_invalid_manifest_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Manifest.read(tmp_path)
