"""Standard output that does not end a run: a terminal that was closed, or a pipe whose reader is gone.

The standard library alone is imported here, as by `signals`.
"""

from __future__ import annotations

from typing import Any, TextIO


class Lasting:
    """A text stream that takes what is written to it even when it leads nowhere any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of the stream."""
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """As of the stream."""
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
