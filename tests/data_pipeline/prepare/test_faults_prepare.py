"""Errors name bad input and failing disks, and incomplete files never count as complete."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bst_base.errors import UserError
from bst_base.files import atomic_directory, atomic_file
from data_pipeline.format.manifest import MANIFEST, Manifest
from data_pipeline.format.shards import ShardIndex
from data_pipeline.format.tokenizer import TokenizerConfig, read_tokenizer, train_tokenizer
from data_pipeline.format.verify import VerifyTask, verify_shard, verify_tokenizer


def problems(corpus: Path) -> list[tuple[str, str]]:
    """Return all problems that verification finds, as (file, what)."""
    manifest = Manifest.read(corpus)
    tasks = [
        VerifyTask(corpus, s, manifest.tokenizer.vocab_size, manifest.dtype)
        for infos in manifest.splits.values()
        for s in infos
    ]
    found = verify_tokenizer(corpus, manifest) + [problem for task in tasks for problem in verify_shard(task)]
    return [(problem.file, problem.what) for problem in found]


@pytest.fixture
def corpus(run, tmp_path: Path) -> Path:
    run()
    return tmp_path / "corpus"


def test_undamaged_corpus_has_no_problems(corpus: Path) -> None:
    assert problems(corpus) == []


@pytest.mark.parametrize("name", ["{a,b}", "a::b", "x:y", "pipe:cat"])
def test_path_that_looks_like_an_address_is_verified_as_a_path(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(corpus.rename(tmp_path / name).parent)
    assert problems(Path(name)) == []


def test_flipped_byte_in_a_shard_is_found_and_located(corpus: Path) -> None:
    tar = corpus / "train-000000.tar"
    whole = tar.read_bytes()
    for position in range(100, len(whole), len(whole) // 40):
        data = bytearray(whole)
        data[position] ^= 1
        tar.write_bytes(data)
        [(file, what)] = problems(corpus)
        assert file == tar.name
        assert "damage" in what
        if "outside the tokens" not in what:
            assert re.search(rf"\d{{9}}\.tok\.npy: token block 0 is damaged \(byte {position} is", what)
            assert f"was 0x{whole[position]:02x})" in what


def test_several_damaged_bytes_are_located_by_their_block(corpus: Path) -> None:
    index = ShardIndex.read(corpus / "train-000000.idx")
    first = int(index.offsets[1])
    data = bytearray((corpus / "train-000000.tar").read_bytes())
    data[first + 3 : first + 60] = bytes(57)
    (corpus / "train-000000.tar").write_bytes(data)
    [(_, what)] = problems(corpus)
    assert f"token block 0 is damaged (bytes {first} to {first + 2 * int(index.lengths[1]) - 1})" in what


@pytest.mark.parametrize("keep", [0, 512, 3000, 5120])
def test_a_truncated_shard_is_found(corpus: Path, keep: int) -> None:
    tar = corpus / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:keep])
    [(file, what)] = problems(corpus)
    assert file == tar.name
    assert f"{keep} bytes, expected" in what
    assert re.search(r"cut short in (0000000\d\d\.tok\.npy|document \d), at byte", what)


def test_a_missing_shard_and_a_missing_index_are_named(corpus: Path) -> None:
    (corpus / "train-000000.tar").unlink()
    (corpus / "validation-000000.idx").unlink()
    assert problems(corpus) == [
        ("train-000000.tar", "the shard is missing"),
        ("validation-000000.tar", f"{corpus / 'validation-000000.idx'}: the index is missing"),
    ]


def test_the_index_of_another_shard_is_refused(corpus: Path) -> None:
    (corpus / "train-000000.idx").write_bytes((corpus / "train-000001.idx").read_bytes())
    [(file, what)] = problems(corpus)
    assert (file, what.partition(":")[0]) == ("train-000000.idx", "the index of another shard")


def test_index_that_differs_from_the_manifest_is_refused(corpus: Path) -> None:
    path = corpus / "train-000000.idx"
    index = ShardIndex.read(path)
    dataclasses.replace(index, ids=index.ids[::-1]).write(path)
    assert problems(corpus) == [("train-000000.idx", "not the index that the manifest names: its SHA-256 differs")]


def test_a_wrong_tokenizer_is_refused(corpus: Path) -> None:
    other = train_tokenizer([f"other text {i * i}\n" for i in range(300)], TokenizerConfig(vocab_size=350))
    (corpus / "tokenizer.model").write_bytes(other)
    [(file, what)] = problems(corpus)
    assert (file, what.partition(":")[0]) == ("tokenizer.model", "wrong tokenizer")
    (corpus / "tokenizer.model").write_bytes(b"junk")
    assert "not a SentencePiece model" in problems(corpus)[0][1]


def test_text_that_is_not_utf8_is_named_with_its_byte(run, folder: Path, tmp_path: Path) -> None:
    (folder / "bad.txt").write_bytes(b"fine \xff not")
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 \(byte 5 is 0xff\); .*set text\.undecodable"):
        run()
    assert not (tmp_path / "corpus" / MANIFEST).exists()


@pytest.mark.parametrize(("policy", "stored"), [("replace", "fine \ufffd not"), ("latin-1", "fine ÿ not")])
def test_text_that_is_not_utf8_is_decoded_according_to_the_policy(
    run, folder: Path, tmp_path: Path, policy, stored
) -> None:
    from data_pipeline.format.shards import find_document

    (folder / "bad.txt").write_bytes(b"fine \xff not")
    run(text={"undecodable": policy}, validation_fraction=0.0, shard_bytes=10**6)
    corpus = tmp_path / "corpus"
    found = find_document(corpus / "train-000000.tar", None, "bad.txt")
    assert read_tokenizer(corpus / "tokenizer.model").decode(found[2]) == stored


def test_record_with_a_lone_surrogate_is_left_out_wherever_it_is(run, tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    rows = [json.dumps({"text": f"line {i} " + "x y z " * i}) for i in range(60)]
    wrong = [
        {"text": "a\ud800"},
        *({"text": f"fine {name}", name: "a\ud800"} for name in ("title", "by", "work", "url")),
    ]
    wrong += [{"\ud800": "no text"}, {"text": "fine", "part": "\ud800"}]
    rows = [
        *(json.dumps({"part": "train", **json.loads(row)}) for row in rows),
        *(json.dumps({"part": "train", **row}) for row in wrong),
    ]
    (tmp_path / "json/a.jsonl").write_text("\n".join(rows))
    source = {
        "kind": "jsonl",
        "path": str(tmp_path / "json"),
        "title_field": "title",
        "licence_field": "by",
        "group_field": "work",
        "split_field": "part",
        "keep": ["url"],
    }
    manifest, _ = run(source=source, tokenizer={"vocab_size": 300}, on_bad_record="skip")
    assert manifest.provenance["left_out"] == {
        "field 'part' is not train, validation or test": 1,
        "no field 'text'": 1,
        "not Unicode text in its group: surrogates not allowed": 1,
        "not Unicode text in its licence: surrogates not allowed": 1,
        "not Unicode text in its meta: surrogates not allowed": 1,
        "not Unicode text in its title: surrogates not allowed": 1,
        "not Unicode text: surrogates not allowed": 1,
    }
    assert r"(there: part, \ud800)" in (tmp_path / "corpus/skipped.jsonl").read_text().replace("\\\\", "\\")
    with pytest.raises(UserError, match=r"no field 'text' \(there: part, \\ud800\)"):
        run("other", source={**source, "split_field": ""}, tokenizer={"vocab_size": 300})


def test_a_line_of_40_mb_is_prepared_exactly(run, tmp_path: Path) -> None:
    from data_pipeline.format.shards import find_document

    (tmp_path / "long").mkdir()
    line = "".join(f"{i} words, " for i in range(5000)) + "words, " * 3_000_000 + "é" + "words, " * 3_000_000
    (tmp_path / "long/a.txt").write_text(line)
    settings = {"vocab_size": 300, "sample_bytes": 1024}
    run(
        source={"kind": "folder", "path": str(tmp_path / "long")},
        tokenizer=settings,
        validation_fraction=0.0,
        deduplicate={"method": "exact"},
    )
    corpus = tmp_path / "corpus"
    found = find_document(corpus / "train-000000.tar", None, "a.txt")
    assert read_tokenizer(corpus / "tokenizer.model").decode(found[2]) == line


def test_source_with_only_empty_documents_is_a_user_error(run, folder: Path) -> None:
    for file in folder.rglob("*.txt"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no text \(left out: 30 empty\)"):
        run()


FULL = """
import json, resource, signal, sys
from bst_base.settings import parse
from bst_base.errors import UserError
from data_pipeline.prepare.parallel import Workers
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = parse(PrepareConfig, json.loads(sys.argv[1]))

def progress(stage, done, total):
    if stage == sys.argv[2]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))

try:
    prepare(config, Workers(None, 1), progress)
except UserError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize(("stage", "limit"), [("extract", 5000), ("train tokenizer", 2000), ("encode", 6000)])
def test_failed_write_leaves_no_partial_files(run, settings_of, files_of, tmp_path: Path, stage, limit) -> None:
    run("whole")
    command = [sys.executable, "-c", FULL, json.dumps(settings_of()), stage, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "nothing half-written was kept: make room, then start again to continue" in done.stdout
    left = {f.name for f in (tmp_path / "corpus").rglob("*") if f.suffix in (".partial", ".tar", ".idx")}
    assert left == set()
    run()
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "whole")


@pytest.mark.ranks
@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_is_reported_and_preparation_continues_after_space_is_freed(
    run, settings_of, files_of, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount")
    try:
        with pytest.raises(UserError, match="the disk is full; nothing half-written was kept"):
            run("disk/corpus")
        assert not list(disk.rglob("*.partial"))
        assert not (disk / "corpus" / MANIFEST).exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        run("disk/corpus")
        run("whole")
        assert files_of(disk / "corpus") == files_of(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_atomic_file_gets_its_name_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_directory_gets_its_name_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with pytest.raises(ZeroDivisionError), atomic_directory(path) as partial:
        (partial / "a").write_bytes(b"a")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(path) as partial:
        (partial / "a").write_bytes(b"a")
        assert not path.exists()
    assert (path / "a").read_bytes() == b"a"
    with atomic_directory(path) as partial:
        (partial / "a").write_bytes(b"late")
    assert (path / "a").read_bytes() == b"a"
    assert list(tmp_path.iterdir()) == [path]
