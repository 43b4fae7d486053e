"""The source of the Linux kernel, from a Debian package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bst_base.errors import UserError
from bst_base.files import atomic_directory
from data_pipeline.sources.archive import Member, open_stream, tar_members
from data_pipeline.sources.base import Document, Listing, Part, Skipped, join_files
from data_pipeline.sources.code import source_text
from data_pipeline.sources.packaged.base import PackagedSource
from data_pipeline.sources.packaged.registries import cache_directory, fetch_debian


class Linux(PackagedSource):
    """The source of the Linux kernel, one document per directory: its files joined with their paths."""

    kind: Literal["linux"] = "linux"
    """The Linux source, from a Debian package."""
    package: str = "linux-source-6.1"
    """Debian package of the source."""
    directories: tuple[str, ...] = ()
    """Top-level directories to take; by default all."""

    def roots(self) -> dict[str, Path]:
        return {"linux": _unpacked(fetch_debian(self.package))}

    def listing(self) -> Listing:
        root = self.roots()["linux"]
        missing = [name for name in self.directories if not (root / name).is_dir()]
        if missing:
            raise UserError(f"{self.package} has no directory {', '.join(missing)}; check source.directories")
        sizes: Counter[str] = Counter()
        for part in self.matching("linux", "**"):
            path = part.name.removeprefix("linux//")
            if not self.directories or path.partition("/")[0] in self.directories:
                sizes[path.rpartition("/")[0] or "."] += part.size
        return Listing(sorted(Part(f"linux//{name}", size) for name, size in sizes.items()), [])

    def files(self, part: Part) -> list[Path]:
        return sorted(path for path in self.locate(part).iterdir() if path.is_file())

    def names_from(self, part: Part) -> Path:
        return self.locate(part)

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        root = self.roots()["linux"]
        texts = []
        for file in self.files(part):
            path = file.relative_to(root).as_posix()
            text = source_text(file.name, file.read_bytes())
            if isinstance(text, Skipped):
                yield Skipped(path, text.reason)
            elif text:
                texts.append((path, text))
        name = part.name.partition("//")[2]
        yield Document(name, join_files(texts), licence="GPL-2.0-only WITH Linux-syscall-note")


def _unpacked(package: Path) -> Path:
    """Return the directory with the files of a `linux-source` package's tarball, unpacked into the cache once."""
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
