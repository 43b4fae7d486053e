"""A preparation that was killed continues where it stopped, and gives the same bytes as an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bst_base.errors import UserError
from data_pipeline.format.manifest import MANIFEST

KILLED_AT = """
import json, os, signal, sys
from bst_base.settings import parse
from data_pipeline.prepare.parallel import Workers
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare

settings, stage, share = json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def progress(name, done, total):
    if name == stage and done >= share * total:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(parse(PrepareConfig, settings), Workers(None, 1), progress)
"""


def kill_at(settings: dict, stage: str, share: float) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_AT, json.dumps(settings), stage, str(share)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("stage", "share"),
    [
        ("extract", 0.0),
        ("extract", 1.0),
        ("deduplicate", 1.0),
        ("train tokenizer", 1.0),
        ("encode", 0.4),
        ("encode", 1.0),
    ],
)
def test_killed_preparation_continues_to_the_same_bytes(
    run, settings_of, files_of, tmp_path: Path, stage: str, share: float
) -> None:
    run("whole")
    kill_at(settings_of("killed"), stage, share)
    corpus = tmp_path / "killed"
    assert not (corpus / MANIFEST).exists()
    finished = {f: f.stat().st_mtime_ns for f in corpus.glob("*.tar")}
    assert bool(finished) == (stage == "encode")
    _, found = run("killed")
    assert found["shards_already_there"] == len(finished)
    assert {f: f.stat().st_mtime_ns for f in finished} == finished
    assert files_of(corpus) == files_of(tmp_path / "whole")
    assert not (corpus / "preparing").exists()


@pytest.mark.parametrize("ending", ["tar", "tokens"])
def test_finished_shard_damaged_after_a_kill_is_written_again(
    run, settings_of, files_of, tmp_path: Path, ending: str
) -> None:
    run("whole")
    kill_at(settings_of("killed"), "encode", 0.4)
    first = tmp_path / "killed" / f"train-000000.{ending}"
    data = bytearray(first.read_bytes())
    data[700] ^= 1
    first.write_bytes(data)
    run("killed")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_unfinished_work_with_other_settings_is_ignored(run, settings_of, files_of, tmp_path: Path) -> None:
    run("whole", seed=1, shard_bytes=20000)
    kill_at(settings_of("corpus"), "encode", 0.4)
    _, found = run("corpus", seed=1, shard_bytes=20000)
    assert found["shards_already_there"] == 0
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "whole")


def test_failed_preparation_does_not_block_the_next_one(run, folder: Path) -> None:
    (folder / "bad.txt").write_bytes(b"fine \xff not")
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8"):
        run()
    manifest, _ = run(text={"undecodable": "latin-1"})
    assert sum(manifest.documents(split) for split in manifest.splits) == 31


def test_files_of_a_corpus_without_manifest_are_not_reused(run, files_of, tmp_path: Path) -> None:
    run("whole", tokenizer={"vocab_size": 700})
    run("corpus")
    (tmp_path / "corpus" / MANIFEST).unlink()
    run("corpus", tokenizer={"vocab_size": 700})
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "whole")


def test_partial_files_of_a_killed_writer_are_removed(run, settings_of, files_of, tmp_path: Path) -> None:
    """Incomplete files have another name, and are removed."""
    run("whole")
    kill_at(settings_of("killed"), "extract", 0.0)
    corpus = tmp_path / "killed"
    for name in ("train-000000.tar.0123abcd.partial", "tokenizer.model.1123abcd.partial"):
        (corpus / name).write_bytes(b"half")
    (corpus / "preparing/spool/chunk-000000.0123abcd.partial").mkdir(parents=True)
    (corpus / "preparing/spool/chunk-000000.0123abcd.partial/text").write_bytes(b"half")
    (corpus / "download.partial").write_bytes(b"of another program")
    run("killed")
    assert files_of(corpus) == files_of(tmp_path / "whole") | {"download.partial": b"of another program"}


def test_second_preparation_of_the_same_directory_is_refused(run, settings_of) -> None:
    problems = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "encode" and not problems:
            with pytest.raises(UserError, match="another preparation is writing there") as error:
                run()
            problems.append(error)

    run(progress=progress)
    assert problems


def test_every_file_of_the_corpus_is_on_the_disk_before_the_manifest(run, tmp_path: Path, monkeypatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        partial = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced.append(partial.removesuffix(".partial").rpartition(".")[0])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    run()
    files = {path.name for path in (tmp_path / "corpus").iterdir() if path.name != ".lock"}
    assert files <= set(synced) and set(synced[: synced.index(MANIFEST)]) >= files - {MANIFEST}
