"""Records with fields (a line of JSON, a row of a table) as documents: the meaning of each field, and filters."""

from __future__ import annotations

import datetime
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from bst_base.errors import UserError
from data_pipeline.sources.base import Document, Part, Skipped
from data_pipeline.sources.tree import SPLIT_NAMES, FileSource

_MISSING = object()
_SHOWN, _REMEMBERED = 20, 1000  # maximum field names shown in a message, and kept to suggest the nearest one


@dataclass
class Fields:
    """Which fields some records have."""

    missing: set[str]
    """The fields that the settings name, and that no record had so far."""
    there: set[str] = field(default_factory=set)
    """The fields of the records, about a thousand at most. They are collected only while a field is missing."""

    def note(self, record: Any, names: Iterable[str]) -> None:
        """Update from one record, which has fields with these names."""
        if not self.missing or not isinstance(record, Mapping):
            return
        self.missing = {name for name in self.missing if field_of(record, name) is _MISSING}
        if len(self.there) >= _REMEMBERED:
            return
        self.there.update(names)
        for name, value in record.items():
            if isinstance(value, Mapping):
                self.there.update(f"{name}.{inner}" for inner in value)

    def and_of(self, other: Fields) -> Fields:
        """Return the fields of these records and others together."""
        there = self.there if len(self.there) >= _REMEMBERED else self.there | other.there
        return Fields(self.missing & other.missing, there)


class RecordSource(FileSource):
    """Base of sources whose files hold records. Fields may be nested: `meta.language` is `language` inside `meta`."""

    text_field: str | tuple[str, ...] = "text"
    """Field that holds the text. With several, those that a record has are joined with a blank line between them."""
    licence_field: str = ""
    """Field that holds the licence, if any."""
    group_field: str = ""
    """Field that names what must not be split between train and validation (a work, a repository), if any."""
    split_field: str = ""
    """Field that says train, validation (valid, val, dev) or test, if any."""
    title_field: str = ""
    """Field that holds the document's title, if any."""
    keep: tuple[str, ...] = ()
    """Fields to store with the document, as `meta`."""
    where: dict[str, str | int | float | bool | tuple[str | int | float | bool, ...]] = Field(default_factory=dict)
    """Take only records whose field has this value, or one of several: `{meta.language: [en, de], quality: good}`."""

    def records(self, part: Part) -> Iterator[tuple[str, Any, Iterable[str]]]:
        """Yield (place, record or `Skipped`, names of its fields) for each record of a part, in order.

        It may raise OSError or UserError when the rest of the part cannot be read.
        """
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Document | Skipped | Fields]:
        split, fields, cause = self.split_of(part), Fields(set(self.asked())), None
        try:
            for where, record, names in self.records(part):
                fields.note(record, names)
                yield record if isinstance(record, Skipped) else self.document(record, where, split)
        except (OSError, UserError) as error:
            cause = error
        yield fields
        if cause is not None:
            raise cause

    def asked(self) -> dict[str, str]:
        """Return a dict: each field that the settings name -> the setting that names it."""
        single = ("licence_field", "group_field", "split_field", "title_field")
        names = {name: setting for setting in single if (name := getattr(self, setting))}
        texts = (self.text_field,) if isinstance(self.text_field, str) else self.text_field
        several = {"where": self.where, "keep": self.keep, "text_field": texts}
        return names | {name: setting for setting, asked in several.items() for name in asked}

    def missing(self, fields: Fields) -> str:
        """Return a message on the first field that the settings name and no record has; empty if there is none, or if
        the fields of no record are known."""
        for name, setting in self.asked().items():
            if name in fields.missing and fields.there:
                near = difflib.get_close_matches(name, fields.there, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "correct or remove it"
                there = ", ".join(sorted(fields.there)[:_SHOWN])
                return f"source.{setting}: no record has the field {name!r}; {hint} (fields there: {there})"
        return ""

    def require(self, fields: Fields) -> None:
        """Raise UserError for a field that the settings name and no record has, if any record's fields are known."""
        if found := self.missing(fields):
            raise UserError(found)

    def document(self, record: Any, where: str, split: str) -> Document | Skipped:
        """Return the document of a record, or why there is none. `split` is the split of the record's file."""
        for name, wanted in self.where.items():
            if field_of(record, name) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
                return Skipped(where, f"filter {name}")
        names = (self.text_field,) if isinstance(self.text_field, str) else self.text_field
        values = {
            name: value for name in names if (value := field_of(record, name)) is not _MISSING and value is not None
        }
        if not values:
            return self._without_text(record, where, names)
        for name, value in values.items():
            if not isinstance(value, (str, bytes)):
                return Skipped(where, f"field {name!r} is not text (but {type(value).__name__})", bad=True)
        if self.split_field:
            split = SPLIT_NAMES.get(_text(record, self.split_field).lower(), "")
            if not split:
                return Skipped(where, f"field {self.split_field!r} is not train, validation or test", bad=True)
        return Document(
            where,
            _joined(list(values.values())),
            licence=_text(record, self.licence_field) or "unknown",
            group=_text(record, self.group_field),
            split=split,
            title=_text(record, self.title_field),
            meta={name: _plain(value) for name in self.keep if (value := field_of(record, name)) is not _MISSING},
        )

    @staticmethod
    def _without_text(record: Any, where: str, names: tuple[str, ...]) -> Skipped:
        asked = " or ".join(map(repr, names))
        if isinstance(record, Mapping) and any(field_of(record, name) is not _MISSING for name in names):
            return Skipped(where, "empty")
        there = (
            ", ".join(sorted(record)[:_SHOWN])
            if isinstance(record, Mapping)
            else f"no fields: the record is of type {type(record).__name__}"
        )
        return Skipped(where, f"no field {asked} (there: {there})", bad=True, remedy="set source.text_field")


def field_of(record: Any, name: str) -> Any:
    """Return the value of a field; dots in its name mean nested fields. `_MISSING` when the record does not have it."""
    if isinstance(record, Mapping) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            return _MISSING
        record = record[part]
    return record


def _joined(texts: list[str | bytes]) -> str | bytes:
    """Join texts with a blank line between them. Tables also hold bytes, which the preparation decodes."""
    if all(isinstance(text, str) for text in texts):
        return "\n\n".join(texts)
    return b"\n\n".join(text.encode() if isinstance(text, str) else text for text in texts)


def _text(record: Any, name: str) -> str:
    """Return a field as text. Bytes that are not UTF-8 become lone surrogates, for which the document is left out."""
    value = field_of(record, name) if name else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return "" if value is None or value is _MISSING else str(value)


def _plain(value: Any) -> Any:
    """Convert a value to JSON types. Tables also hold times, bytes, and numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such numbers
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
