"""Standard output whose errors do not end a run: a closed terminal, a pipe without a reader, an encoding without "±".

Only the standard library is imported here, because this is used while torch is still being imported.
"""

from __future__ import annotations

from typing import Any, TextIO


class IgnoreWriteErrors:
    """Wraps a text stream; text that cannot be written is discarded."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write to the stream; ignore an OSError. Characters that its encoding lacks are written as escapes."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush the stream; ignore an OSError."""
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
