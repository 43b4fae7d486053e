from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch

from bst_dist.checkpoint.directory import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    ManifestError,
    OtherFormatError,
    compare,
    damage,
    directory,
    examine,
    listed_files,
    manifest_content,
    newest_valid,
    parse_manifest,
    read_manifest,
    require_intact,
    require_step,
)
from bst_dist.checkpoint.durable import Files
from tests.checkpoint.damage import flip


def write(run_dir: Path, step: int) -> Path:
    path = directory(run_dir, step)
    path.mkdir(parents=True)
    files = Files(path)
    for name in ("a.pt", "b.pt"):
        with files.open(name) as file:
            torch.save({"step": torch.tensor(step)}, file)
    (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files.records}))
    return path


def test_manifest_records_size_and_sha256_of_each_file(tmp_path):
    path = write(tmp_path, 1)
    records = json.loads((path / MANIFEST).read_text())["files"]
    for name, record in records.items():
        data = (path / name).read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert torch.load(path / "b.pt")["step"] == 1


@pytest.mark.parametrize(
    ("hurt", "said", "missing"),
    [
        (lambda path: (path / "b.pt").unlink(), "missing: b.pt", True),
        (lambda path: (path / "b.pt").write_bytes(b""), "size mismatch (0 bytes instead of", False),
        (lambda path: flip(path / "a.pt"), "checksum mismatch in a.pt", False),
        (lambda path: (path / MANIFEST).unlink(), "missing: manifest.json", True),
        (lambda path: (path / MANIFEST).write_text("{"), "not JSON", False),
        (lambda path: (path / MANIFEST).write_text("[]"), "not that of a checkpoint of this program: manifest", False),
    ],
    ids=["missing", "cut", "flipped", "no manifest", "broken manifest", "other manifest"],
)
def test_newest_valid_skips_a_damaged_checkpoint(tmp_path, hurt, said, missing):
    older, newer = write(tmp_path, 10), write(tmp_path, 20)
    assert newest_valid(tmp_path) == newer
    hurt(newer)
    assert said in damage(newer)[0]
    assert [finding.missing for finding in examine(newer)] == [missing]
    assert newest_valid(tmp_path) == older
    hurt(older)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        newest_valid(tmp_path)


def test_any_changed_digit_of_a_manifest_is_noticed(tmp_path):
    manifest = {
        "format": FORMAT,
        "step": 12,
        "validation_loss_nats": 2.25,
        "layout": {"ranks": 8, "sp": 1},
        "data": {"seed": 5, "weights": (0.5, 0.5), "name": "é"},
        "files": {"weights-00000.safetensors": {"bytes": 170, "sha256": "0a1", "rank": 0, "start": 64}},
    }
    content = manifest_content(manifest)
    assert parse_manifest(content, tmp_path) == json.loads(json.dumps(manifest))
    key = content.rindex(b'"sha256"')  # changed, it is another key in a manifest without a digest
    other = {content.index(b'"format": ') + len(b'"format": '), *range(key, key + len(b'"sha256"'))}
    digits = [place for place, byte in enumerate(content) if chr(byte).isdigit() and place not in other]
    assert len(digits) > 60  # the digest's own too
    for place in digits:
        changed = bytearray(content)
        changed[place] = ord("1") if content[place] != ord("1") else ord("7")
        with pytest.raises(ManifestError, match=r"is damaged \(checksum mismatch\)"):
            parse_manifest(bytes(changed), tmp_path)


def test_white_space_in_a_manifest_and_a_missing_digest_are_no_damage(tmp_path):
    manifest = {"format": FORMAT, "files": {}}
    assert parse_manifest(manifest_content(manifest).replace(b"\n", b"\r\n"), tmp_path) == manifest
    assert parse_manifest(json.dumps(manifest).encode(), tmp_path) == manifest


def test_the_error_of_a_bad_manifest_can_be_sent_to_other_ranks(tmp_path):
    with pytest.raises(ManifestError) as failed:
        read_manifest(tmp_path)
    there = pickle.loads(pickle.dumps(failed.value))
    assert (str(there), there.missing) == (f"{tmp_path}: manifest.json is missing", True)


@pytest.mark.parametrize("other", [FORMAT - 1, FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_and_not_skipped(tmp_path, other):
    """Starting from an older one, or from step 0, would repeat steps of the run."""
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    (path / MANIFEST).write_text(json.dumps({"format": other}))
    with pytest.raises(OtherFormatError, match="continue with the version that wrote it"):
        newest_valid(tmp_path)
    assert path.exists()


def test_checking_a_checkpoint_in_two_parts_finds_the_same_damage(tmp_path):
    path = write(tmp_path, 1)
    flip(path / "b.pt")
    flip(path / "a.pt")
    files, _ = listed_files(path)
    parts = [{name: files[name]} for name in ("a.pt", "b.pt")]
    assert [str(one) for part in parts for one in compare(path, part)] == damage(path)


def test_a_damaged_or_missing_checkpoint_is_refused_with_what_to_do(tmp_path):
    write(tmp_path, 20)
    path = write(tmp_path, 10)
    require_intact(require_step(tmp_path, 10))
    flip(path / "b.pt")
    require_intact(path, kind="a")
    advice = rf"choose another step, or restore the file \(`bst ckpt verify {tmp_path}` names every damaged one\)"
    with pytest.raises(CheckpointError, match=f"step-00000010: checksum mismatch in b.pt: {advice}"):
        require_intact(path)
    with pytest.raises(CheckpointError, match="no checkpoint of step 15; there are: 20, 10"):
        require_step(tmp_path, 15)
