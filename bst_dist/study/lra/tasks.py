"""The tasks of the Long Range Arena (arXiv 2011.04006, section 2.2).

All tasks are classification of sequences. A position has one of `symbols` values, and an example has one sequence, or
two that are compared (Retrieval). In the model a symbol s has the id s + 1, and id 0 is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """The properties of a task's examples."""

    name: str
    classes: int
    symbols: int
    sequences: int = 1
    """Number of sequences per example."""
    cropped: bool = False
    """Whether a sequence that is too long for the model is truncated, as published. Otherwise it is an error."""

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of a model: the symbols and padding."""
        return self.symbols + 1


TASKS = {
    task.name: task
    for task in (
        Task("listops", classes=10, symbols=15),
        Task("text", classes=2, symbols=256, cropped=True),
        Task("retrieval", classes=2, symbols=256, sequences=2, cropped=True),
        Task("image", classes=10, symbols=256),
        Task("pathfinder", classes=2, symbols=256),
    )
}
"""Name -> task. Pathfinder-X is `pathfinder` with images of 128 x 128."""
