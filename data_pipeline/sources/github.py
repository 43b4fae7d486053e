"""GitHub: repositories as checkouts, tarballs or zips from GitHub, one document per repository."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bst_base.errors import UserError
from data_pipeline.sources.archive import TAR_SUFFIXES, open_stream, tar_members, zip_members
from data_pipeline.sources.base import Document, Endings, Listing, LocalPath, Part, Skipped, Source, printable
from data_pipeline.sources.code import repository_licence, repository_text, source_paths, tree_files

_ARCHIVES = (*TAR_SUFFIXES, ".zip")


class Github(Source):
    """A directory whose entries are repositories, or one repository. Vendored, generated and binary files are left out.

    The files of a repository are joined in path order, each below a line with its path.
    """

    kind: Literal["github"] = "github"
    """Repositories: a checkout, a tarball or a zip each."""
    path: LocalPath
    """Directory of the repositories; or one checkout (with a `.git`), tarball or zip."""

    def directory(self) -> Path | None:
        """See `Source`."""
        path = self.path.expanduser()
        return path if path.is_dir() else None

    def listing(self) -> Listing:
        path = self.path.expanduser()
        expected = f"a directory of repositories (checkouts, or {', '.join(_ARCHIVES)}), or one repository"
        if not path.exists():
            raise UserError(f"{path}: no such directory; source.path must be {expected}")
        if not path.is_dir() or (path / ".git").exists():
            return Listing([Part(path.resolve().name, _size(path))], [])
        parts, skipped, endings = [], [], Endings()
        for entry in path.iterdir():
            if entry.is_symlink() and not entry.exists():
                skipped.append(Skipped(entry.name, "broken link"))
            elif entry.is_dir() or entry.name.endswith(_ARCHIVES):
                parts.append(Part(entry.name, _size(entry)))
            else:
                endings.leave_out(entry.name)
        if not parts:
            raise UserError(f"{path}: no repository there; source.path must be {expected}")
        beside = [
            dataclasses.replace(each, reason=f"beside the repositories, {each.reason}") for each in endings.skipped("")
        ]
        return Listing(sorted(parts), sorted(skipped, key=lambda each: each.path) + beside)

    def files(self, part: Part) -> list[Path]:
        path = self._locate(part)
        return [found[1] for found in source_paths(path) if not isinstance(found, Skipped)] if path.is_dir() else [path]

    def names_from(self, part: Part) -> Path | None:
        path = self._locate(part)
        return path if path.is_dir() else None

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        path = self._locate(part)
        files = []
        for member in tree_files(path) if path.is_dir() else _archive_files(path):
            if not isinstance(member, Skipped):
                files.append(member)
            elif path.is_dir():
                yield dataclasses.replace(member, path=f"{part.name}/{member.path}")
            else:
                yield member
        for text in repository_text(files, part.name):
            if isinstance(text, Skipped):
                yield text
            else:
                group = printable(_repository(part.name))
                yield Document(part.name, text, licence=repository_licence(files), group=group)

    def _locate(self, part: Part) -> Path:
        """Return the path of a repository in the directory, or `path` itself if that is the one repository."""
        path = self.path.expanduser()
        return path if not path.is_dir() or (path / ".git").exists() else path / part.name


def _archive_files(path: Path) -> Iterator[tuple[str, bytes] | Skipped]:
    """Yield the files of an archive without its single top directory, `<name>-<commit>/`."""
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
    """Return a repository's name without the archive's suffix: a checkout and a tarball of it have the same name."""
    return next((name.removesuffix(suffix) for suffix in _ARCHIVES if name.endswith(suffix)), name)


def _size(entry: Path) -> int:
    if not entry.is_dir():
        return entry.stat().st_size
    return sum(found[1].stat().st_size for found in source_paths(entry) if not isinstance(found, Skipped))
