"""Text as it is being written: whole characters, up to a stop string, and nothing that could command a terminal."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Text from bytes as they arrive; a character spread over several tokens is written once it is whole.

    The text ends before the first of the `stops` that is complete; what may be the beginning of one is held back.
    """

    def __init__(self, write: Callable[[str], object], stops: Sequence[str] = ()):
        """`stops`: none of them empty."""
        self.stopped = False
        self._write, self._stops, self._held = write, stops, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, piece: bytes) -> None:
        """Write what `piece` completes."""
        self._add(self._decoder.decode(piece))

    def close(self) -> None:
        """Write what was held back, with U+FFFD for a character that was left unfinished."""
        self._add(self._decoder.decode(b"", final=True))
        self._release(self._held)

    def _add(self, text: str) -> None:
        if self.stopped:
            return
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._release(self._held[: min(found)[1]])
            self.stopped, self._held = True, ""
        else:
            self._release(self._held[: len(self._held) - self._beginning()])

    def _beginning(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, text: str) -> None:
        if text:
            self._write(text)
            self._held = self._held[len(text) :]


def printable(text: str) -> str:
    """The text with control characters shown as symbols, so that a model cannot command the terminal."""
    return text.translate(_VISIBLE)


_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
