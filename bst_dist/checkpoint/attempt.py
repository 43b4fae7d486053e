"""Does work whose failure must be told to other ranks before it is raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Outcome(NamedTuple, Generic[T]):
    """What work returned, or the exception that it raised. It can be sent to other ranks."""

    value: T | None
    error: Exception | None


def attempt(work: Callable[[], T]) -> Outcome[T]:
    """Do `work` and return its outcome; only exceptions that end the process are raised."""
    try:
        return Outcome(work(), None)
    except Exception as error:
        return Outcome(None, error)
