"""Rows of a synthetic task as text, so that a mixture can combine them with other text by weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.sources.base import Document, Listing, Part, Source
from data_pipeline.synthetic.config import Task
from data_pipeline.synthetic.draws import Draws
from data_pipeline.synthetic.task import TASK_VERSION

ROWS = 1000
"""Documents of one part."""


class SyntheticText(Source):
    """A synthetic task as text: a document is one row, and each token of the task is a word of letters.

    Word i is i in base 26 with the digits a to z. A tokenizer may split a word into several pieces, so distances count
    words, not tokens. The loss is over all tokens, including those that cannot be predicted.
    """

    kind: Literal["synthetic"] = "synthetic"
    """Rows of a synthetic task as words."""
    task: Task
    """Which task, as in data.synthetic of a recipe."""
    words: int = Field(512, ge=2, le=2**24)
    """Words per document."""
    documents: int = Field(1000, ge=1, le=2**40)
    """Number of documents."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Another seed draws other documents."""

    @model_validator(mode="after")
    def _possible(self) -> SyntheticText:
        if problem := self.task.problem(self.words - 1):
            raise ValueError(f"words {self.words}: {problem}")
        return self

    def listing(self) -> Listing:
        firsts = range(0, self.documents, ROWS)
        return Listing([self._part(first, min(first + ROWS, self.documents)) for first in firsts], [])

    def _part(self, first: int, stop: int) -> Part:
        return Part(f"rows-{first:012}", (stop - first) * self.words * 3, first, stop)

    def files(self, part: Part) -> list[Path]:
        return []

    def read(self, part: Part) -> Iterator[Document]:
        words = np.array([word(i) for i in range(self.task.vocabulary)], dtype=object)
        for number in range(part.start, part.stop):
            row = self.task.row(Draws(f"synthetic text/{TASK_VERSION}", self.seed, number), self.words - 1)
            yield Document(f"{self.task.task}/{number:012}", " ".join(words[row.tokens]) + "\n", licence="CC0-1.0")

    def provenance(self) -> dict[str, Any]:
        return {"synthetic_tasks": TASK_VERSION}


def word(number: int) -> str:
    """Return a number in base 26, with the digits a to z."""
    higher, digit = divmod(number, 26)
    return (word(higher) if higher else "") + chr(ord("a") + digit)
