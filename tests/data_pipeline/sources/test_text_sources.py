"""Folders, JSON Lines, WebDatasets, PG-19 and the standard library, in the forms they really have."""

from __future__ import annotations

import gzip
import json
import sys
import sysconfig
from pathlib import Path

import pytest
from backports import zstd

from bst_base.errors import UserError
from data_pipeline.sources import SOURCES


def test_a_folder_gives_its_files_sorted_by_path(read_all, put) -> None:
    root = put({"b.txt": "B", "a/z.txt": "Z", "a/y.md": "no", "a.txt": b"\xff"})
    documents, _ = read_all("folder", path=root, licence="CC0-1.0")
    assert [(d.path, d.content) for d in documents] == [("a.txt", b"\xff"), ("a/z.txt", b"Z"), ("b.txt", b"B")]
    assert documents[0].licence == "CC0-1.0"


@pytest.mark.parametrize("kind", ["folder", "jsonl", "webdataset", "pg19", "arxiv", "github"])
def test_a_source_that_is_missing_or_empty_says_what_it_expected(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such directory; source\.path must be"):
        SOURCES[kind](path=tmp_path / "nowhere").parts()
    with pytest.raises(UserError, match=r"no .* there|no file matches"):
        SOURCES[kind](path=tmp_path).parts()


def lines(*records: dict) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_json_lines_are_read_plain_and_compressed(read_all, put) -> None:
    data = lines({"text": "one\n\u2028", "l": "MIT"}, {"text": "two"})
    root = put(
        {
            "a.jsonl": data,
            "b.json.gz": gzip.compress(data, mtime=0),
            "c.jsonl.zst": zstd.compress(data) * 2,
            "d.txt": "no",
        }
    )
    documents, _ = read_all("jsonl", path=root, licence_field="l")
    assert [d.content for d in documents] == ["one\n\u2028", "two"] * 4
    assert [d.path for d in documents][:3] == ["a.jsonl:1", "a.jsonl:2", "b.json.gz:1"]
    assert [d.licence for d in documents][:2] == ["MIT", "unknown"]


def test_a_json_line_of_40_mb_is_one_document(read_all, put) -> None:
    text = "x" * 40_000_000
    documents, _ = read_all("jsonl", path=put({"a.jsonl": lines({"body": text, "repo": "r"})}), text_field="body",
                            group_field="repo")  # fmt: skip
    assert documents[0].content == text
    assert documents[0].group == "r"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", lines({"text": "x"}) + b"{bad\n", r"a\.jsonl:2: not JSON"),
        ("a.jsonl", lines({"t": "x"}), r"a\.jsonl:1: no field 'text'; set source\.text_field"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: no field 'text'"),
        ("a.jsonl", lines({"text": 3}), r"a\.jsonl:1: field 'text' is a int, not text"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(lines({"text": "x" * 999}), mtime=0)[:-9], r"a\.jsonl\.gz: damaged or cut short"),
        ("a.jsonl.gz", b"not gzip at all", r"a\.jsonl\.gz: damaged or cut short"),
        ("a.jsonl.zst", zstd.compress(lines({"text": "x"}) * 999)[:-9], r"a\.jsonl\.zst: damaged or cut short"),
    ],
)
def test_damaged_json_lines_are_named(read_all, put, name: str, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_all("jsonl", path=put({name: data}))


def test_a_webdataset_gives_the_text_member_of_every_sample(read_all, put, make_tar) -> None:
    samples = {
        "s/0.jpg": b"\xff",
        "s/0.txt": b"zero",
        "s/1.txt": b"one",
        "s/1.txt.old": b"no",
        "link.txt": "-> /etc/passwd",
    }
    root = put({"b.tar": make_tar(samples), "a.tar.gz": make_tar({"9.txt": b"nine"}, "w:gz")})
    documents, skipped = read_all("webdataset", path=root)
    assert [(d.path, d.content) for d in documents] == [
        ("a.tar.gz/9.txt", b"nine"), ("b.tar/s/0.txt", b"zero"), ("b.tar/s/1.txt", b"one"),
    ]  # fmt: skip
    assert skipped == {"b.tar/link.txt": "link or special file in an archive (to '/etc/passwd')"}


def test_a_webdataset_of_json_gives_a_field(read_all, put, make_tar) -> None:
    root = put({"a.tar": make_tar({"0.json": b'{"body": "text"}'})})
    documents, _ = read_all("webdataset", path=root, member="json", text_field="body")
    assert documents[0].content == "text"
    with pytest.raises(UserError, match=r"a\.tar/0\.json: no text in field 'text'"):
        read_all("webdataset", path=root, member="json")


def test_pg19_keeps_its_splits_and_titles(read_all, put) -> None:
    root = put({
        "train/10.txt": b"The Bible\r\n", "train/9.txt": "nine", "validation/3.txt": "three", "test/5.txt": "five",
        "metadata.csv": '10,"The King James Bible, complete",1611,http://www.gutenberg.org/ebooks/10\n5,Five,1900,u\n',
    })  # fmt: skip
    documents, _ = read_all("pg19", path=root)
    assert [(d.path, d.split, d.title) for d in documents] == [
        ("train/10.txt", "train", "The King James Bible, complete (1611)"),
        ("train/9.txt", "train", ""),
        ("validation/3.txt", "validation", ""),
        ("test/5.txt", "test", "Five (1900)"),
    ]
    assert documents[0].content == b"The Bible\r\n"


def test_a_standard_library_gives_modules_and_packages(read_all, put) -> None:
    root = put({
        "abc.py": "abc", "json/__init__.py": "init", "json/tool.py": "tool", "json/__pycache__/x.py": "no",
        "test/test_abc.py": "t", "test/data/bad.py": b"\xe9", "test/data/good.py": "g", "site-packages/p.py": "no",
        "encodings/table.txt": "no",
    })  # fmt: skip
    documents, skipped = read_all("stdlib", path=root)
    assert [(d.path, d.content) for d in documents] == [
        ("abc.py", "abc"),
        ("json", "==> json/__init__.py <==\ninit\n==> json/tool.py <==\ntool"),
        ("test/data", "==> test/data/good.py <==\ng"),
        ("test/test_abc.py", "t"),
    ]
    assert skipped == {"test/data/bad.py": "not UTF-8 (byte 0)"}


def test_this_interpreters_library_is_several_megabytes_of_documents(read_all) -> None:
    """By default the base interpreter's, also in a virtual environment."""
    source = SOURCES["stdlib"]()
    assert source.path == Path(sysconfig.get_path("stdlib"))
    parts = source.parts()
    assert sum(part.size for part in parts) > 4e6
    assert len(parts) > 200
    assert not any("site-packages" in part.name for part in parts)
    assert source.provenance()["python"] == sys.version.split()[0].rstrip("+")
