"""Check that the records of a source have the fields that its settings name."""

from __future__ import annotations

import logging

from data_pipeline.sources import Fields, RecordSource, Source

_log = logging.getLogger(__name__)

EARLY = 64 << 20
"""Bytes of the source after which a field that no record had so far is reported, long before a large source is read."""


class FieldCheck:
    """Collects which fields the records have, chunk by chunk."""

    def __init__(self, source: Source) -> None:
        self._source = source if isinstance(source, RecordSource) else None
        self._fields: Fields | None = None
        self._known = True
        """Whether the fields of every chunk are known. A chunk without records does not know them."""
        self._reported = False

    def add(self, fields: Fields | None, done: int) -> None:
        """Add the fields of a chunk. `done`: bytes of the source read so far.

        Logs a warning, once, when `EARLY` bytes are read and no record has one of the fields.
        """
        if self._source is None:
            return
        if fields is None:
            self._known = False
        else:
            self._fields = fields if self._fields is None else self._fields.and_of(fields)
        if done >= EARLY and not self._reported and self._fields and (found := self._source.missing(self._fields)):
            self._reported = True
            _log.warning(
                "in the first %.0f MB: %s; if no later record has it either, the preparation fails when all "
                "records are read",
                done / 1e6,
                found,
            )

    def require(self) -> None:
        """Raise UserError when all chunks are known and no record has one of the fields."""
        if self._source is not None and self._fields is not None and self._known:
            self._source.require(self._fields)
