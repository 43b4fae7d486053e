"""The common base of the packaged corpora: some packages, and the files in them that hold documents."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from data_pipeline.sources.base import Part, Skipped, Source
from data_pipeline.sources.tree import glob_pattern, walk


class PackagedSource(Source):
    """Base of packaged sources. Parts are named `<package>//<path in it>`."""

    @abstractmethod
    def roots(self) -> dict[str, Path]:
        """Return the directory of each package, which is fetched if necessary."""

    def fetch(self) -> None:
        self.roots()

    def provenance(self) -> dict[str, Any]:
        return {"packages": [path.name for path in self.roots().values()]}

    def files(self, part: Part) -> list[Path]:
        return [self.locate(part)]

    def locate(self, part: Part) -> Path:
        """Return the file or directory of a part."""
        package, _, path = part.name.partition("//")
        return self.roots()[package] / path

    def matching(self, package: str, pattern: str) -> list[Part]:
        """Return the regular files of a package that match the pattern, as sorted parts."""
        wanted, parts = glob_pattern(pattern), []
        for found in walk(self.roots()[package]):
            if isinstance(found, Skipped):
                if found.bad:
                    raise UserError(f"{self.roots()[package]}/{found.path}: {found.reason}; delete it to fetch it anew")
            elif wanted.fullmatch(found[0]) and not found[1].is_symlink():
                parts.append(Part(f"{package}//{found[0]}", found[1].stat().st_size))
        return sorted(parts)
