"""Standard output whose errors do not end a run or lose a result: a closed terminal, a pipe without a reader, a full
disk, an encoding without "±".

Only the standard library is imported here, because this is used while torch is still being imported.
"""

from __future__ import annotations

from typing import Any, TextIO


class IgnoreWriteErrors:
    """Wraps a text stream; text that cannot be written is discarded."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """The first error of the stream, if there was one."""

    def write(self, text: str) -> int:
        """Write to the stream; ignore an OSError. Characters that its encoding lacks are written as escapes."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self.error = self.error or error
            return len(text)

    def flush(self) -> None:
        """Flush the stream; ignore an OSError."""
        try:
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def exit_unless_written(stream: Any) -> None:
    """End the command if `stream` is an IgnoreWriteErrors that has ignored an error.

    For a command whose output is its result: if nobody reads it, the rest of the work is in vain.
    """
    if isinstance(stream, IgnoreWriteErrors) and stream.error is not None:
        raise SystemExit(1) from stream.error
