"""LaTeX: the sources of TeX Live's documentation, from Debian packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_pipeline.sources.archive import open_stream
from data_pipeline.sources.base import Document, Listing, Part, Skipped
from data_pipeline.sources.packaged.base import PackagedSource
from data_pipeline.sources.packaged.registries import fetch_debian
from data_pipeline.sources.tex import decode_tex


class Latex(PackagedSource):
    """The documentation of TeX Live in LaTeX source: manuals, examples and articles, one document per file."""

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

    def listing(self) -> Listing:
        found = [part for package in self.packages for part in self.matching(package, "usr/share/doc/**/*.tex*")]
        return Listing([part for part in found if part.name.endswith((".tex", ".tex.gz"))], [])

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        with open_stream(self.locate(part)) as file:
            text = decode_tex(file.read())
        # The examples of one LaTeX package resemble each other, so they stay in one split.
        group = "/".join(part.name.partition("/texlive-doc/")[2].split("/")[:2])
        yield Document(part.name.replace("//", "/"), text, licence="by package (mostly LPPL)", group=group)
