"""Streaming text output: whole characters, up to a stop string, without control characters for a terminal."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Writes text from bytes as they arrive. A character that spans several tokens is written when it is complete.

    The text ends before the stop string that is complete first. Text that may be the beginning of one is held back.
    """

    def __init__(self, write: Callable[[str], object], stops: Sequence[str] = ()):
        """`stops`: stop strings, none of them empty."""
        self.stopped = False
        self._write, self._stops, self._held = write, stops, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, piece: bytes) -> None:
        """Write the text that `piece` completes."""
        self._add(self._decoder.decode(piece))

    def close(self) -> None:
        """Write the text that was held back, with U+FFFD for an incomplete character."""
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
        """Return how many characters at the end may be the beginning of a stop string."""
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
    """Return the text with control characters replaced by symbols, so that a model cannot control the terminal."""
    return text.translate(_VISIBLE)


_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
