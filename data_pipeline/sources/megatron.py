"""Megatron-LM's tokenized data sets, one document per document of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from bst_base.errors import UserError
from data_pipeline.format.megatron import read_index
from data_pipeline.sources.base import Document, Part, Skipped
from data_pipeline.sources.tokens import RANGE, TokenSource, read_tokens

_index = lru_cache(maxsize=1)(read_index)  # cached for the file whose parts a worker is reading


class Megatron(TokenSource):
    """Every pair of `.bin` and `.idx` under a directory (or one pair, by its `.idx`), sorted by path.

    The id that ends a document may be present or not. Sequences of one document are joined.
    """

    kind: Literal["megatron"] = "megatron"
    """Megatron-LM's token ids, .bin and .idx."""

    def wanted(self, name: str) -> bool:
        return name.endswith(".idx")

    def is_companion(self, name: str) -> bool:
        return name.endswith(".bin") and (self.root / name).with_suffix(".idx").exists()

    def copied(self, name: str) -> bool:
        return name.endswith((".idx", ".bin"))

    def expected(self) -> str:
        return "an .idx of Megatron's with its .bin beside it, or a directory of them"

    def files(self, part: Part) -> list[Path]:
        """See `Source`."""
        path = self.root / part.name
        return [path, path.with_suffix(".bin")]

    def parts_of(self, name: str, path: Path) -> list[Part]:
        try:
            index = _index(path)
        except (OSError, UserError):  # reported when the part is read, by the policy for bad records
            return super().parts_of(name, path)
        if not len(index.lengths):
            return []
        sizes = index.lengths * index.dtype.itemsize
        bounds = [0, *(np.flatnonzero(np.diff(index.offsets // RANGE)) + 1).tolist(), len(sizes)]
        return [Part(name, int(sizes[start:stop].sum()), start, stop) for start, stop in pairwise(bounds)]

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        split, path = self.split_of(part), self.root / part.name
        index = _index(path)
        lengths = index.lengths[part.start : part.stop]
        every = read_tokens(path.with_suffix(".bin"), index.dtype, int(index.offsets[part.start]), int(lengths.sum()))
        for number, tokens in enumerate(np.split(every, np.cumsum(lengths)[:-1]), start=part.start):
            if len(tokens) and tokens[-1] == self.eos_id:
                tokens = tokens[:-1]
            yield self.document_of(tokens, f"{part.name.removesuffix('.idx')}:{number}", split)
