"""Formal mathematics: Metamath and HOL Light, from Debian packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_pipeline.sources.base import Document, Listing, Part, Skipped
from data_pipeline.sources.packaged.base import PackagedSource
from data_pipeline.sources.packaged.registries import fetch_debian


class Mathematics(PackagedSource):
    """Formal mathematics: Metamath databases (set.mm is one document of 41 MB) and HOL Light, one document per file."""

    kind: Literal["mathematics"] = "mathematics"
    """Formal mathematics: Metamath and HOL Light, from Debian packages."""

    def roots(self) -> dict[str, Path]:
        return {"metamath": fetch_debian("metamath-databases"), "hol-light": fetch_debian("hol-light")}

    def listing(self) -> Listing:
        proofs = [
            part for ending in ("ml", "hl") for part in self.matching("hol-light", f"usr/share/hol-light/**/*.{ending}")
        ]
        return Listing([*self.matching("metamath", "usr/share/metamath/databases/*.mm"), *sorted(proofs)], [])

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        metamath = part.name.startswith("metamath")
        yield Document(
            part.name.replace("//", "/"),
            self.locate(part).read_bytes(),
            licence="CC0-1.0" if metamath else "BSD-2-Clause",
            group="metamath" if metamath else "",  # the smaller databases repeat parts of set.mm
        )
