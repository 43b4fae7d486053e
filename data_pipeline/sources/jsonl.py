"""JSON Lines, plain or compressed with gzip, xz or zstd: one document per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from data_pipeline.sources.archive import open_stream
from data_pipeline.sources.base import Part, Skipped
from data_pipeline.sources.records import RecordSource

_SUFFIXES = tuple(f".{name}{packed}" for name in ("jsonl", "json", "ndjson") for packed in ("", ".gz", ".xz", ".zst"))
_RANGE = 32 << 20
"""Bytes of a plain file that make up one part, so that several workers share a large file. The value must not change:
a document in the first part of a file is named by the number of its line, a later one by the first byte of its line. So
the names stay the same when a file grows at its end."""


class JsonLines(RecordSource):
    """Every `.jsonl`, `.json` or `.ndjson` file under a directory (or one such file), sorted by path; also compressed
    as `.gz`, `.xz`, `.zst`.

    Large files are read by many workers if they are not compressed.
    """

    kind: Literal["jsonl"] = "jsonl"
    """JSON Lines, also .gz, .xz and .zst."""

    def wanted(self, name: str) -> bool:
        return name.endswith(_SUFFIXES)

    def expected(self) -> str:
        return "a JSON Lines file, or a directory of them: .jsonl, .json, .ndjson, also with .gz, .xz, .zst"

    def parts_of(self, name: str, path: Path) -> list[Part]:
        size = path.stat().st_size
        if size <= _RANGE or name.endswith((".gz", ".xz", ".zst")):
            return [Part(name, size)]
        return [Part(name, min(_RANGE, size - start), start) for start in range(0, size, _RANGE)]

    def records(self, part: Part) -> Iterator[tuple[str, Any, Iterable[str]]]:
        with open_stream(self.root / part.name) as file:
            lines = ((0, line) for line in file) if part.start < 0 else _lines_in(file, part.start, part.size)
            for number, (begin, line) in enumerate(lines, start=1):
                if line.strip():
                    where = f"{part.name}:{number if part.start <= 0 else f'byte {begin}'}"
                    record = _record(line, where)
                    yield where, record, record if isinstance(record, dict) else ()


def _record(line: bytes, where: str) -> Any:
    """Parse a line; return the record, or why it cannot be read."""
    if line.lstrip()[:1] == b"[":
        remedy = "write one record per line, as `jq -c '.[]'` does"
        return Skipped(where, "a JSON array instead of a record", bad=True, remedy=remedy)
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return Skipped(where, f"not UTF-8 (byte {error.start} of the line)", bad=True)
    except (ValueError, RecursionError) as error:
        return Skipped(where, f"not JSON ({error})", bad=True)


def _lines_in(file: BinaryIO, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield (first byte, line) for the lines that begin in the `size` bytes from `start` on."""
    stop = start + size
    if start:
        file.seek(start - 1)
        rest = file.readline(size + 1)  # of a line that belongs to a part before; it may end in a later part
        if not rest.endswith(b"\n"):
            return
        start += len(rest) - 1
    while start < stop:
        line = file.readline()
        if not line:
            return
        yield start, line
        start += len(line)
