"""The data section of a recipe that trains on a synthetic task."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import Discriminator, Field, Tag

from bst_base.settings import Config
from data_pipeline.synthetic.copying import Copy, SelectiveCopy
from data_pipeline.synthetic.mad import InContextRecall, Memorisation
from data_pipeline.synthetic.recall import AssociativeRecall, Induction, Needle
from data_pipeline.synthetic.unigram import LatentUnigram


def _task(section: Any) -> Any:
    return section.get("task") if isinstance(section, dict) else getattr(section, "task", None)


Task: TypeAlias = Annotated[
    Annotated[LatentUnigram, Tag("latent-unigram")]
    | Annotated[Copy, Tag("copy")]
    | Annotated[SelectiveCopy, Tag("selective-copy")]
    | Annotated[Induction, Tag("induction")]
    | Annotated[AssociativeRecall, Tag("associative-recall")]
    | Annotated[Needle, Tag("needle")]
    | Annotated[InContextRecall, Tag("in-context-recall")]
    | Annotated[Memorisation, Tag("memorisation")],
    Discriminator(_task),
]


class SyntheticConfig(Config):
    """A task whose sequences are computed, used instead of a corpus."""

    documents: ClassVar[str] = "joined"  # a row holds one sequence, or several independent episodes

    synthetic: Task
    """Which task, and how hard it is."""
    row_tokens: int | None = Field(None, ge=1, le=2**40)
    """Tokens per row, a multiple of train.sequence_length. Each step reads one sequence of the row, and train.carry can
    carry the row's state along; evaluations read whole rows. null: a row is one sequence."""
    prefetch: int = Field(2, ge=0, le=2**16)
    """Steps to compute ahead in a thread; 0: compute in the caller's thread."""

    @property
    def mode(self) -> str:
        """As for a text corpus: `streaming` if a row continues from step to step, else `shuffled`."""
        return "shuffled" if self.row_tokens is None else "streaming"

    def row(self, sequence_length: int) -> int:
        """Return the tokens of a row."""
        return self.row_tokens or sequence_length

    def urls(self) -> list[str]:
        """Return the addresses of the data: none."""
        return []
