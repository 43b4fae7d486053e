"""GitHub: repositories as checkouts or as the tarballs and zips GitHub hands out, a document a repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bst_base.errors import UserError
from data_pipeline.sources.archive import TAR_SUFFIXES, Skipped, open_stream, tar_members, zip_members
from data_pipeline.sources.base import Document, Part, Source, existing_directory
from data_pipeline.sources.code import repository_licence, repository_text, tree_files


class Github(Source):
    """A directory whose entries are repositories; vendored, generated and binary files are left out.

    The files of a repository are joined in the order of their paths, each under a line with its path.
    """

    kind: Literal["github"] = "github"
    """Repositories: a checkout, a tarball or a zip each."""
    path: Path
    """The directory of the repositories."""

    def parts(self) -> list[Part]:
        root = existing_directory(self.path, "a directory of repositories")
        found = [entry for entry in root.iterdir() if entry.is_dir() or entry.name.endswith((*TAR_SUFFIXES, ".zip"))]
        if not found:
            raise UserError(f"{root}: no repository there; expected checkouts, or {', '.join(TAR_SUFFIXES)}, .zip")
        return sorted(Part(entry.name, _size(entry)) for entry in found)

    def read(self, part: str) -> Iterator[Document | Skipped]:
        path = self.path.expanduser() / part
        files = []
        for member in tree_files(path) if path.is_dir() else _archive_files(path):
            if isinstance(member, Skipped):
                yield member
            else:
                files.append(member)
        for text in repository_text(files, part):
            if isinstance(text, Skipped):
                yield text
            else:
                yield Document(part, text, licence=repository_licence(files), group=_repository(part))


def _archive_files(path: Path) -> Iterator[tuple[str, bytes] | Skipped]:
    """The files of an archive without its one top directory, `<name>-<commit>/`."""
    if path.suffix == ".zip":
        members = list(zip_members(path))
    else:
        with open_stream(path) as file:
            members = list(tar_members(file, path.name))
    tops = {member.name.partition("/")[0] for member in members if not isinstance(member, Skipped)}
    inside = all("/" in member.name for member in members if not isinstance(member, Skipped))
    strip = len(tops) == 1 and inside
    for member in members:
        if isinstance(member, Skipped):
            yield member
        else:
            yield (member.name.partition("/")[2] if strip else member.name), member.data


def _repository(name: str) -> str:
    """The repository's name without the archive's suffix: its checkout and its tarball are one."""
    return next((name.removesuffix(suffix) for suffix in (*TAR_SUFFIXES, ".zip") if name.endswith(suffix)), name)


def _size(entry: Path) -> int:
    return sum(f.stat().st_size for f in entry.rglob("*") if f.is_file()) if entry.is_dir() else entry.stat().st_size
