"""The tasks of the Long Range Arena: what an example of each is (arXiv 2011.04006, section 2.2).

All are classification of sequences of small numbers: a position holds one of `symbols` values, and an example has one
sequence, or two that are compared (Retrieval). To the model a symbol s is the id s + 1; id 0 is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """What all examples of a task have in common."""

    name: str
    classes: int
    symbols: int
    sequences: int = 1
    """Sequences of an example."""
    cropped: bool = False
    """Whether a sequence that a model has no room for loses its end, as published; otherwise it is an error."""

    @property
    def vocab_size(self) -> int:
        """Ids of a model: the symbols and padding."""
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
"""By name. Pathfinder-X is `pathfinder` at 128 x 128."""
