"""Folders, JSON Lines, WebDatasets, PG-19 and the standard library, in their real formats."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
from backports import zstd

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from data_pipeline.sources import SOURCES, Document, jsonl, tree
from data_pipeline.sources.pg19 import _titles


def test_a_folder_gives_its_files_sorted_by_path(read_all, put) -> None:
    root = put({"b.txt": "B", "a/z.txt": "Z", "a/y.md": "no", "a.txt": b"\xff"})
    documents, skipped = read_all("folder", path=root, licence="CC0-1.0")
    assert [(d.path, d.content) for d in documents] == [("a.txt", b"\xff"), ("a/z.txt", b"Z"), ("b.txt", b"B")]
    assert documents[0].licence == "CC0-1.0"
    assert skipped == {"*.md": "ending .md"}


def test_compressed_files_of_a_folder_are_read(read_all, put) -> None:
    root = put({"a.txt.gz": gzip.compress(b"A"), "b.txt.zst": zstd.compress(b"B"), "c.txt.xz": lzma.compress(b"C")})
    assert [d.content for d in read_all("folder", path=root, pattern="*.txt.*")[0]] == [b"A", b"B", b"C"]
    assert [d.content for d in read_all("folder", path=root / "a.txt.gz")[0]] == [b"A"]


def test_links_outside_the_folder_are_listed_and_not_followed(read_all, put, tmp_path: Path) -> None:
    root = put({"a.txt": "A", "d/b.txt": "B"})
    (tmp_path / "secret.txt").write_text("secret")
    (root / "leak.txt").symlink_to(tmp_path / "secret.txt")
    (root / "gone.txt").symlink_to(tmp_path / "nothing")
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to(root)
    (root / "inside.txt").symlink_to(root / "d/b.txt")
    os.mkfifo(root / "pipe.txt")
    documents, skipped = read_all("folder", path=root)
    assert [d.path for d in documents] == ["a.txt", "d/b.txt", "inside.txt"]
    assert skipped == {
        "gone.txt": "broken link",
        "leak.txt": "link that leads out of the folder",
        "loop": "link to a directory",
        "out": "link that leads out of the folder",
        "pipe.txt": "not a regular file",
    }


@pytest.mark.parametrize("kind", ["folder", "jsonl", "webdataset", "arxiv", "github", "stdlib", "pg19"])
def test_unreadable_directory_is_an_error(kind, read_all, put, make_tar, monkeypatch) -> None:
    files = {
        "train/a.txt": "A",
        "a.jsonl": '{"text": "x"}',
        "a.tar": make_tar({"0.txt": b"0"}),
        "a.tex": "\\TeX",
        "repository/x.py": "x",
        "abc.py": "x",
    }
    root = put(files | {"repository/closed/y": "y"})
    real = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # because root may read everything
    with pytest.raises(UserError, match=r"repository/closed/: directory cannot be read: Permission denied; .*skip"):
        read_all(kind, path=root)


def test_file_that_cannot_be_inspected_is_an_error(read_all, put, monkeypatch) -> None:
    real = tree._not_taken

    def not_taken(entry, path, root):
        if entry.name == "bad.txt":
            raise OSError(5, "Input/output error", str(path))
        return real(entry, path, root)

    monkeypatch.setattr(tree, "_not_taken", not_taken)
    with pytest.raises(UserError, match=r"d/bad\.txt: cannot be read: Input/output error; .*skip"):
        read_all("folder", path=put({"d/a.txt": "A", "d/bad.txt": "B"}))


def test_splits_of_the_source_are_kept(read_all, put) -> None:
    root = put({"train/a.txt": "A", "dev/b.txt": "B", "test/c.txt": "C"})
    found = {d.path: d.split for d in read_all("folder", path=root, own_splits=True)[0]}
    assert found == {"train/a.txt": "train", "dev/b.txt": "validation", "test/c.txt": "test"}
    assert {d.split for d in read_all("folder", path=root)[0]} == {""}
    files = {"train-00000-of-00002.jsonl": "T", "valid.jsonl": "V"}
    root = put({name: lines({"text": text}) for name, text in files.items()}, under="json")
    assert [d.split for d in read_all("jsonl", path=root, own_splits=True)[0]] == ["train", "validation"]
    names = {  # of published data sets
        "data/train-00000-of-00002.txt": "train",
        "en/c4-validation.00000.txt": "validation",
        "plain_text/test/0000.txt": "test",
        "train/test/valid.txt": "train",  # the outermost directory decides
    }
    root = put(dict.fromkeys(names, "text"), under="nested")
    assert {d.path: d.split for d in read_all("folder", path=root, own_splits=True)[0]} == names
    with pytest.raises(UserError, match=r"x\.txt: own_splits is set, but neither"):
        read_all("folder", path=put({"x.txt": "x"}, under="other"), own_splits=True)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "webdataset", "pg19", "arxiv", "github"])
def test_missing_or_empty_source_error_says_what_was_expected(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such .*directory; source\.path must be"):
        SOURCES[kind](path=tmp_path / "nowhere").listing()
    with pytest.raises(UserError, match=r"no .* there.*source\.path must be"):
        SOURCES[kind](path=tmp_path).listing()


@pytest.mark.parametrize("kind", ["github", "stdlib"])
def test_url_is_refused_for_sources_that_need_a_path(kind: str) -> None:
    with pytest.raises(ConfigError, match="path: must be a path on this machine's file systems; copy s3:// data first"):
        parse(SOURCES[kind], {"path": "s3://bucket/text"})


def lines(*records: dict) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_json_lines_are_read_plain_and_compressed(read_all, put) -> None:
    data = lines({"text": "one\n\u2028", "l": "MIT"}, {"text": "two"})
    root = put(
        {
            "a.jsonl": data,
            "b.json.gz": gzip.compress(data, mtime=0),
            "c.jsonl.zst": zstd.compress(data) * 2,
            "d.jsonl.xz": lzma.compress(data),
            "d.txt": "no",
        }
    )
    documents, skipped = read_all("jsonl", path=root, licence_field="l")
    assert [d.content for d in documents] == ["one\n\u2028", "two"] * 5
    assert skipped == {"*.txt": "ending .txt"}
    assert [d.content for d in read_all("jsonl", path=root / "b.json.gz")[0]] == ["one\n\u2028", "two"]
    assert [d.path for d in documents][:3] == ["a.jsonl:1", "a.jsonl:2", "b.json.gz:1"]
    assert [d.licence for d in documents][:2] == ["MIT", "unknown"]


def test_a_json_line_of_40_mb_is_one_document(read_all, put) -> None:
    text = "x" * 40_000_000
    documents, _ = read_all(
        "jsonl", path=put({"a.jsonl": lines({"body": text, "repo": "r"})}), text_field="body", group_field="repo"
    )
    assert documents[0].content == text
    assert documents[0].group == "r"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", lines({"text": "x"}) + b"{bad\n", r"a\.jsonl:2: not JSON"),
        ("a.jsonl", lines({"t": "x"}), r"a\.jsonl:1: no field 'text' \(there: t\); set source\.text_field"),
        ("a.jsonl", b"1\n", r"a\.jsonl:1: no field 'text'"),
        ("a.json", b'[{"text": "x"},\n', r"a\.json:1: a JSON array instead of a record; write one record per line"),
        ("a.jsonl", lines({"text": 3}), r"a\.jsonl:1: field 'text' is not text \(but int\)"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(lines({"text": "x" * 999}), mtime=0)[:-9], r"a\.jsonl\.gz: damaged or cut short"),
        ("a.jsonl.gz", b"not gzip at all", r"a\.jsonl\.gz: damaged or cut short"),
        ("a.jsonl.zst", zstd.compress(lines({"text": "x"}) * 999)[:-9], r"a\.jsonl\.zst: damaged or cut short"),
    ],
)
def test_damaged_json_lines_are_named(read_all, put, name: str, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_all("jsonl", path=put({name: data}))


def test_webdataset_text_member_of_each_sample_is_read(read_all, put, make_tar) -> None:
    samples = {
        "s/0.v1.txt": b"dots",
        "s/0.jpg": b"\xff",
        "s/0.txt": b"zero",
        "s/1.txt": b"one",
        "s/1.txt.old": b"no",
    }
    samples = {"link.txt": "-> /etc/passwd"} | samples
    root = put({"b.tar": make_tar(samples), "a.tar.gz": make_tar({"9.txt": b"nine"}, "w:gz")})
    documents, skipped = read_all("webdataset", path=root)
    assert [(d.path, d.content) for d in documents] == [
        ("a.tar.gz/9.txt", b"nine"),
        ("b.tar/s/0.v1.txt", b"dots"),
        ("b.tar/s/0.txt", b"zero"),
        ("b.tar/s/1.txt", b"one"),
    ]
    assert skipped == {
        "b.tar/link.txt": "link or special file in an archive (to '/etc/passwd')",
        "b.tar/*.jpg": "ending .jpg",
        "b.tar/*.old": "ending .old",
    }


def test_text_members_of_a_webdataset_may_be_compressed(read_all, put, make_tar) -> None:
    members = {"0.txt.gz": gzip.compress(b"zero"), "1.txt.zst": zstd.compress(b"one"), "2.txt": b"two"}
    documents, _ = read_all("webdataset", path=put({"a.tar": make_tar(members)}) / "a.tar")
    assert [d.content for d in documents] == [b"zero", b"one", b"two"]


def test_webdataset_json_field_is_read(read_all, put, make_tar) -> None:
    root = put({"a.tar": make_tar({"0.json": b'{"body": "text"}'})})
    documents, _ = read_all("webdataset", path=root, member="json", text_field="body")
    assert documents[0].content == "text"
    with pytest.raises(UserError, match=r"a\.tar/0\.json: no text in field 'text'.*set source.text_field"):
        read_all("webdataset", path=root, member="json")
    root = put({"a.tar": make_tar({"0.json": b'{"text": 3}'})}, under="numbers")
    with pytest.raises(UserError, match=r"a\.tar/0\.json: field 'text' is not text \(but int\)"):
        read_all("webdataset", path=root, member="json")


def test_pg19_keeps_its_splits_and_titles(read_all, put) -> None:
    root = put(
        {
            "train/10.txt": b"The Bible\r\n",
            "train/9.txt": "nine",
            "validation/3.txt": "three",
            "test/5.txt": "five",
            "metadata.csv": '10,"The King James Bible, complete",1611,http://www.gutenberg.org/ebooks/10\n5,Five,1900,u\n',
        }
    )
    documents, _ = read_all("pg19", path=root)
    assert [(d.path, d.split, d.title) for d in documents] == [
        ("train/10.txt", "train", "The King James Bible, complete (1611)"),
        ("train/9.txt", "train", ""),
        ("validation/3.txt", "validation", ""),
        ("test/5.txt", "test", "Five (1900)"),
    ]
    assert documents[0].content == b"The Bible\r\n"
    (root / "metadata.csv").write_bytes(b"10,\xff,1611,u\n")
    _titles.cache_clear()
    with pytest.raises(UserError, match=r"metadata\.csv: damaged \(.*0xff.*\); get the file again, or remove it"):
        read_all("pg19", path=root)


def test_standard_library_gives_one_document_per_module_or_package(read_all, put) -> None:
    root = put(
        {
            "abc.py": "abc",
            "json/__init__.py": "init",
            "json/tool.py": "tool",
            "json/__pycache__/x.py": "no",
            "test/test_abc.py": "t",
            "test/data/bad.py": b"\xe9",
            "test/data/good.py": "g",
            "site-packages/p.py": "no",
            "encodings/table.txt": "no",
        }
    )
    documents, skipped = read_all("stdlib", path=root)  # files that are not modules do not count
    assert [(d.path, d.content) for d in documents] == [
        ("abc.py", "abc"),
        ("json", "==> json/__init__.py <==\ninit\n==> json/tool.py <==\ntool"),
        ("test/data", "==> test/data/good.py <==\ng"),
        ("test/test_abc.py", "t"),
    ]
    assert skipped == {"test/data/bad.py": "not UTF-8 (byte 0)"}


def test_a_standard_library_in_the_home_directory_is_read(read_all, put, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(put({"abc.py": "abc"})))
    assert [d.content for d in read_all("stdlib", path="~")[0]] == ["abc"]


def test_default_stdlib_source_is_the_library_of_this_interpreter(read_all) -> None:
    """The default is the base interpreter's library, also in a virtual environment."""
    source = SOURCES["stdlib"]()
    assert source.path == Path(sysconfig.get_path("stdlib"))
    parts = source.listing().parts
    assert sum(part.size for part in parts) > 4e6
    assert len(parts) > 200
    assert not any("site-packages" in part.name for part in parts)
    assert source.provenance()["python"] == sys.version.split()[0].rstrip("+")


def test_nested_fields_joined_fields_filters_and_metadata_of_records(read_all, put) -> None:
    rows = [
        {"title": "A", "body": {"text": "one"}, "meta": {"lang": "en", "url": "u"}, "split": "train"},
        {"title": None, "body": {"text": "two"}, "meta": {"lang": "de"}, "split": "dev"},
        {"title": "C", "body": {"text": "three"}, "meta": {"lang": "fr"}, "split": "train"},
    ]
    root = put({"a.jsonl": lines(*rows)})
    documents, skipped = read_all(
        "jsonl",
        path=root,
        text_field=("title", "body.text"),
        where={"meta.lang": ("en", "de")},
        split_field="split",
        keep=("meta.url", "meta.lang"),
        title_field="title",
    )
    assert [(d.content, d.split, d.title) for d in documents] == [("A\n\none", "train", "A"), ("two", "validation", "")]
    assert [d.meta for d in documents] == [{"meta.url": "u", "meta.lang": "en"}, {"meta.lang": "de"}]
    assert skipped == {"a.jsonl:3": "filter meta.lang"}


def test_field_that_is_null_is_an_empty_text_also_inside_another(read_all, put) -> None:
    root = put({"a.jsonl": lines({"m": {"b": "text"}, "c": None}, {"m": {"b": None}, "c": "text"})})
    assert read_all("jsonl", path=root, text_field="m.b")[1] == {"a.jsonl:2": "empty"}
    assert read_all("jsonl", path=root, text_field="c")[1] == {"a.jsonl:1": "empty"}
    with pytest.raises(UserError, match=r"no field 'm\.d' \(there: c, m\)"):
        read_all("jsonl", path=root, text_field="m.d")


def test_each_line_of_a_split_json_file_is_read_once(put, monkeypatch) -> None:
    monkeypatch.setattr(jsonl, "_RANGE", 50)
    for ending in (b"\n", b""):
        rows = [{"text": "x" * (i % 90)} for i in range(200)]
        root = put({"a.jsonl": lines(*rows).removesuffix(b"\n") + ending})
        source = SOURCES["jsonl"](path=root)
        parts = source.listing().parts
        found = [item for part in parts for item in source.read(part) if isinstance(item, Document)]
        assert len(parts) > 100
        assert [d.content for d in found] == [row["text"] for row in rows]
        assert len({d.path for d in found}) == 200


def test_line_of_many_parts_of_a_json_file_is_read_twice_at_most() -> None:
    class Counted(io.BytesIO):
        read_so_far = 0

        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline(size)
            self.read_so_far += len(line)
            return line

    whole = b"first\n" + b"x" * 50_000 + b"\nlast\n" + b"y" * 93
    file, found = Counted(whole), []
    for start in range(0, len(whole), 100):
        found += jsonl._lines_in(file, start, 100)
    assert found == [(0, b"first\n"), (6, b"x" * 50_000 + b"\n"), (50_007, b"last\n"), (50_012, b"y" * 93)]
    assert file.read_so_far < 2.1 * len(whole)


def test_document_names_do_not_change_when_a_file_grows(read_all, put, monkeypatch) -> None:
    """A corpus that continues an earlier one finds the earlier documents by their names and texts."""
    monkeypatch.setattr(jsonl, "_RANGE", 500)
    rows = [{"text": f"text {i}"} for i in range(100)]
    names = [
        [d.path for d in read_all("jsonl", path=put({"a.jsonl": b"\n" + lines(*rows[:n])}))[0]]
        for n in (20, 25, 60, 100)
    ]
    assert len(set(names[-1])) == 100
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(names))
    assert names[0] == [f"a.jsonl:{number}" for number in range(2, 22)]


def test_zstd_with_a_long_window_is_read(read_all, put) -> None:
    """A frame as written by `zstd --long=31`: its header requires a window of 2 GiB (RFC 8878, section 3.1.1)."""
    text = lines({"text": "x"})
    window, raw_block = bytes([(31 - 10) << 3]), (1 | len(text) << 3).to_bytes(3, "little")
    packed = b"\x28\xb5\x2f\xfd" + b"\0" + window + raw_block + text
    assert [d.content for d in read_all("jsonl", path=put({"a.jsonl.zst": packed}))[0]] == ["x"]


def test_webdataset_json_that_is_null_or_nested_too_deep_is_left_out(put, make_tar) -> None:
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    root = put({"a.tar": make_tar({"a.json": b'{"text": null}', "b.json": deep, "c.json": b'{"text": "good"}'})})
    source = SOURCES["webdataset"](path=root, member="json")
    null, nested, good = source.read(source.listing().parts[0])
    assert (null.reason, null.bad) == ("empty", False)
    assert nested.bad and nested.reason.startswith("no text in field 'text' (")
    assert good.content == "good"


def test_kept_number_that_is_not_finite_is_null(read_all, put) -> None:
    root = put({"a.jsonl": b'{"text": "x", "score": NaN, "more": [1e999, 2.5]}\n'})
    (document,) = read_all("jsonl", path=root, keep=("score", "more"))[0]
    assert document.meta == {"score": None, "more": [None, 2.5]}
