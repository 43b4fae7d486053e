"""Tars that are damaged or cut short are named, wherever the damage is; none of their members is dropped silently."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path

import pytest

from bst_base.errors import UserError
from bst_base.settings import parse
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import Workers
from data_pipeline.sources.archive import Member, tar_members

MEMBERS = {f"{i}.txt": b"text %d" % i for i in range(60)}  # 1,024 bytes each


def damaged(whole: bytes, damage: str) -> bytes:
    """Return a tar of 60 members with damage in or before the header of the 31st."""
    place = 30 * 1024
    return {
        "flipped": whole[: place + 10] + b"\1" + whole[place + 11 :],
        "cut in a header": whole[: place + 200],
        "cut between members": whole[:place],
        "page of zeros": whole[:place] + bytes(4096) + whole[place + 4096 :],
    }[damage]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("flipped", "the header at byte 30720: bad checksum"),
        ("cut in a header", "the header at byte 30720: truncated header"),
        ("cut between members", "neither a member nor the end of the archive at byte 30720"),
        ("page of zeros", "an end of the archive at byte 30720, and members after it"),
    ],
)
def test_damage_at_a_header_is_an_error_and_the_members_before_it_are_read(make_tar, damage: str, named: str) -> None:
    found: list = []
    with pytest.raises(UserError) as told:
        found.extend(tar_members(io.BytesIO(damaged(make_tar(MEMBERS), damage)), "a.tar"))
    assert str(told.value) == f"a.tar: damaged or cut short ({named}); get the file again"
    found = []
    with pytest.raises(UserError):
        for member in tar_members(io.BytesIO(damaged(make_tar(MEMBERS), damage)), "a.tar"):
            found.append(member.name)
    assert found == list(MEMBERS)[:30]


def test_damage_after_a_pax_header_is_an_error(make_tar) -> None:
    whole = make_tar({"a" * 300: b"x", "b" * 300: b"y"})  # a long name: tarfile writes a pax header before the member's
    place = len(whole.rstrip(b"\0").rpartition(b"b" * 100)[0]) // 512 * 512
    with pytest.raises(UserError, match=r"the header at byte \d+: bad checksum"):
        list(tar_members(io.BytesIO(whole[: place + 10] + b"\1" + whole[place + 11 :]), "a.tar"))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("padding", [bytes(1024), bytes(1024) + b"old" * 700, bytes(1024 + 20480)])
def test_intact_tars_of_other_programs_are_read(format: int, padding: bytes) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=format) as tar:
        for name, data in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    whole = file.getvalue()[:end] + padding  # what follows the end in the last record is undefined
    assert list(tar_members(io.BytesIO(whole), "a.tar")) == [Member(*each) for each in MEMBERS.items()]
    assert list(tar_members(io.BytesIO(bytes(10240)), "empty.tar")) == []


@pytest.mark.parametrize("damage", ["flipped", "cut between members"])
def test_a_preparation_stops_at_a_damaged_tar_or_lists_it(tmp_path: Path, make_tar, damage: str) -> None:
    texts = {name: data + b", and more words to read %d" % zlib.crc32(data) for name, data in MEMBERS.items()}
    (tmp_path / "a.tar").write_bytes(damaged(make_tar(texts), damage))
    settings = {
        "source": {"kind": "webdataset", "path": str(tmp_path / "a.tar")},
        "tokenizer": {"vocab_size": 300},
        "deduplicate": {"method": "exact"},
        "output": str(tmp_path / "corpus"),
    }
    with pytest.raises(UserError, match=r"a\.tar: damaged or cut short"):
        prepare(parse(PrepareConfig, settings), Workers(None, 1), lambda *_: None)
    kept = parse(PrepareConfig, {**settings, "on_bad_record": "skip"})
    manifest, _ = prepare(kept, Workers(None, 1), lambda *_: None)
    assert sum(manifest.documents(split) for split in manifest.splits) == 30
    (line,) = (tmp_path / "corpus/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["bad"] and "not read completely" in line
