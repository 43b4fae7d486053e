"""The spool: chunks of whole documents on disk, between extraction and encoding.

A chunk is a directory that one worker writes from consecutive parts. It holds `text` (the documents' UTF-8, or their
ids if the source is tokenized, one after the other), `table` (one row per document with the data for deduplication and
planning), `names.jsonl` (one line per document with the data for the shards only), `skipped.jsonl`, `signatures`
(MinHash, if asked for), and `fields.json` (which fields the records have, for sources of records). A worker needs
memory for one document at a time. The main process needs one table row per document when it joins the tables of all
chunks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from bst_base.errors import UserError
from bst_base.files import atomic_directory, atomic_file
from data_pipeline.prepare.dedup import PERMUTATIONS, signature, signature_of
from data_pipeline.prepare.text import TOKEN, TextConfig, stored_text
from data_pipeline.sources import Document, Fields, Part, Skipped, Source
from data_pipeline.sources.base import printable

TABLE = np.dtype(
    [
        ("chunk", "<u4"),
        ("names", "<u8"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
        ("digest", "<u8", 2),
        ("group", "<u8"),
        ("id", "<u8"),
        ("split", "u1"),
    ]
)
"""A document: its chunk; the byte offsets of its names and its text in the chunk's files; the size of its text; the
hashes of its text and of its group (0: none); its id; the split that its source gives."""

SPLITS = ("", "train", "validation", "test")
"""The values of the column `split`: none, or the split that the source gives."""


Stamp = tuple[str, int, int] | None
"""A file's path, bytes and time of the last change (ns); None if it cannot be inspected."""


class ChunkTask(NamedTuple):
    """The data that a worker needs to extract one chunk."""

    spool: Path
    number: int
    source: Source
    parts: tuple[Part, ...]
    text: TextConfig
    signatures: bool
    on_bad_record: Literal["stop", "skip"]
    stamps: list[Stamp]
    """Those of the files when the source was hashed."""


class ChunkDone(NamedTuple):
    """An extracted chunk."""

    size: int
    """Bytes of its parts."""
    bad: int
    """Number of bad records that were left out."""
    fields: Fields | None
    """Which fields its records have; None if its source has no records, or the chunk has none of which this is
    known."""


def group_parts(parts: list[Part], size: int) -> list[tuple[Part, ...]]:
    """Return groups of consecutive parts, about `size` bytes each.

    The chunks do not depend on the number of workers.
    """
    before = accumulate((part.size for part in parts[:-1]), initial=0)
    groups: dict[int, list[Part]] = {}
    for part, start in zip(parts, before, strict=True):
        groups.setdefault(start // size, []).append(part)
    return [tuple(group) for group in groups.values()]


def stamps(source: Source, parts: tuple[Part, ...]) -> list[Stamp]:
    """Return the stamps of the files that some parts are read from."""
    return [_stamp(path) for part in parts for path in source.files(part)]


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return str(path), found.st_size, found.st_mtime_ns


def extract_chunk(task: ChunkTask) -> ChunkDone:
    """Read the parts of one chunk into the spool, unless the chunk is already there.

    Raises UserError for the first bad record if the policy is to stop, and when a file has changed since it was hashed.
    """
    path = chunk_path(task.spool, task.number)
    if not path.is_dir():
        with atomic_directory(path) as partial:
            _write_chunk(partial, task)
            _require_unchanged(task)
    bad = sum(skipped.get("bad", False) for skipped in _skipped_in(path))
    return ChunkDone(sum(part.size for part in task.parts), bad, _fields_in(path))


def _require_unchanged(task: ChunkTask) -> None:
    """Raise UserError when the files of a chunk are not as they were when they were hashed."""
    changed = set(stamps(task.source, task.parts)) ^ set(task.stamps)
    if changed:
        name = next((each[0] for each in changed if each), "a file")
        raise UserError(
            f"{printable(name)}: was changed while the corpus was prepared; start again when nothing writes to "
            "the source"
        )


def chunk_path(spool: Path, number: int) -> Path:
    """Return the directory of a chunk."""
    return spool / f"chunk-{number:06d}"


def load_tables(spool: Path, chunks: int) -> np.ndarray:
    """Return the rows of all chunks, (documents,) of TABLE, in the order of the corpus."""
    tables = [np.fromfile(chunk_path(spool, number) / "table", TABLE) for number in range(chunks)]
    return np.concatenate([*tables, np.empty(0, TABLE)])


def merge_signatures(spool: Path, chunks: int) -> np.ndarray:
    """Join the signatures of all chunks in one memory-mapped file: (documents, PERMUTATIONS) uint32."""
    path = spool / "signatures"
    with atomic_file(path) as file:
        for number in range(chunks):
            with (chunk_path(spool, number) / "signatures").open("rb") as part:
                shutil.copyfileobj(part, file)
    return np.memmap(path, np.uint32, mode="r").reshape(-1, PERMUTATIONS)


def read_documents(spool: Path, rows: np.ndarray) -> Iterator[tuple[np.void, dict[str, Any], bytes]]:
    """Yield (row, names, text or ids) of each of `rows`, (n,) with TABLE's columns.

    The rows of a chunk must be consecutive.
    """
    edges = np.flatnonzero(np.diff(rows["chunk"])) + 1
    for run in np.split(rows, edges) if len(rows) else []:
        path = chunk_path(spool, int(run["chunk"][0]))
        with (path / "names.jsonl").open("rb") as names, (path / "text").open("rb") as text:
            for row in run:
                names.seek(int(row["names"]))
                text.seek(int(row["offset"]))
                yield row, json.loads(names.readline()), text.read(int(row["bytes"]))


def read_windows(spool: Path, rows: np.ndarray, window: int, share: float) -> Iterator[str]:
    """Yield a `share` of the text of `rows`, in evenly spaced windows: the first one, then every 1/share-th one."""
    position = 0
    for row in rows:
        size = int(row["bytes"])
        with (chunk_path(spool, int(row["chunk"])) / "text").open("rb") as text:
            for start in range(0, size, window):
                position += 1
                if ceil(position * share) > ceil((position - 1) * share):
                    text.seek(int(row["offset"]) + start)
                    yield text.read(min(window, size - start)).decode(errors="ignore")


def read_skipped(spool: Path, chunks: int) -> Iterator[dict[str, Any]]:
    """Yield everything that was left out, in the format of `skipped_record`, in the order of the corpus."""
    for number in range(chunks):
        yield from _skipped_in(chunk_path(spool, number))


def skipped_record(skipped: Skipped) -> dict[str, Any]:
    """Return a line of `skipped.jsonl`: {path, reason}, with {bad: true} if bad and {count} if it is not 1."""
    record: dict[str, Any] = {"path": printable(skipped.path), "reason": printable(skipped.reason)}
    if skipped.bad:
        record["bad"] = True
    return record if skipped.count == 1 else {**record, "count": skipped.count}


def refusal(skipped: Skipped) -> UserError:
    """Return the error for a bad record if the policy is to stop."""
    remedy = skipped.remedy or "mend it"
    return UserError(
        f"{printable(skipped.path)}: {printable(skipped.reason)}; {remedy}, or set on_bad_record to skip to list and "
        "leave out what is bad"
    )


def _skipped_in(chunk: Path) -> Iterator[dict[str, Any]]:
    for line in (chunk / "skipped.jsonl").read_bytes().splitlines():
        yield json.loads(line)


def _fields_in(chunk: Path) -> Fields | None:
    path = chunk / "fields.json"
    if not path.exists():
        return None
    return Fields(**{name: set(fields) for name, fields in json.loads(path.read_bytes()).items()})


def _write_fields(chunk: Path, fields: Fields) -> None:
    record = {"missing": sorted(fields.missing), "there": sorted(fields.there)}
    (chunk / "fields.json").write_text(json.dumps(record))


def _write_chunk(path: Path, task: ChunkTask) -> None:
    fields = None
    with ExitStack() as stack:
        files = ("text", "table", "names.jsonl", "skipped.jsonl", "signatures")
        texts, table, names, skips, signatures = (stack.enter_context((path / name).open("wb")) for name in files)
        for found in _documents(task):
            if isinstance(found, Fields):
                fields = found if fields is None else fields.and_of(found)
                continue
            if isinstance(found, Skipped):
                _write_line(skips, skipped_record(found))
                continue
            document, text = found
            table.write(_row(task, names.tell(), texts.tell(), document, text).tobytes())
            _write_line(names, _names(document))
            texts.write(text)
            if task.signatures:
                ids = np.frombuffer(text, TOKEN).astype(np.uint64) if task.source.tokenized else None
                signatures.write((signature(text) if ids is None else signature_of(ids)).tobytes())
    if fields is not None:
        _write_fields(path, fields)


def _documents(task: ChunkTask) -> Iterator[tuple[Document, bytes] | Skipped | Fields]:
    for part in task.parts:
        for found in _read(task, part):
            if isinstance(found, Fields):
                yield found
                continue
            stored = stored_text(found, task.text)
            if isinstance(stored, Skipped) and stored.bad and task.on_bad_record == "stop":
                raise refusal(stored)
            yield stored


def _read(task: ChunkTask, part: Part) -> Iterator[Document | Skipped | Fields]:
    """Yield the documents of a part. An error that ends the reading of the part counts as one bad record."""
    try:
        yield from task.source.read(part)
    except OSError as error:
        yield Skipped(part.name, f"cannot be read: {error.strerror or error}", bad=True)
    except UserError as error:
        if task.on_bad_record == "stop":
            raise
        yield Skipped(part.name, f"not read completely ({error})", bad=True)


def _names(document: Document) -> dict[str, Any]:
    record = {"path": printable(document.path), "licence": document.licence, "title": document.title}
    return {**record, "meta": document.meta} if document.meta else record


def _row(task: ChunkTask, names: int, offset: int, document: Document, text: bytes) -> np.ndarray:
    digest = hashlib.sha256(text).digest()
    row = np.zeros((), TABLE)
    row["chunk"], row["names"], row["offset"], row["bytes"] = task.number, names, offset, len(text)
    row["digest"] = np.frombuffer(digest, "<u8", count=2)
    row["group"] = _hash64(document.group.encode()) if document.group else 0
    row["id"] = _hash64(f"{task.source.kind}\0{printable(document.path)}\0".encode() + digest)
    row["split"] = SPLITS.index(document.split)
    return row


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def _write_line(file: IO[bytes], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False, sort_keys=True).encode() + b"\n")
