"""The shards of a split in columns. 100,000 shards take 20 MB; as Python objects they would take 100 MB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, overload

import numpy as np
from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from bst_base.settings import Config

_CHUNK = 1 << 12  # maximum shards that are Python objects at a time while a manifest is parsed
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class ShardInfo(Config):
    """One tar of documents and its index."""

    file: str
    """Name of the tar inside the corpus directory."""
    bytes: Count
    """Size of the tar."""
    sha256: str
    """SHA-256 of the tar."""
    documents: Count
    """Number of documents."""
    tokens: Count
    """Number of tokens, including the end-of-document tokens."""
    text_bytes: Count
    """UTF-8 bytes of text that its tokens stand for."""
    index: str
    """Name of the index file inside the corpus directory."""
    index_sha256: str
    """SHA-256 of the index file."""


_NUMBERS = ("bytes", "documents", "tokens", "text_bytes")
_TEXTS = ("file", "sha256", "index", "index_sha256")
_FIELDS = {**dict.fromkeys(_NUMBERS, int), **dict.fromkeys(_TEXTS, str)}


class ShardTable(Sequence[ShardInfo]):
    """The shards of a split, in order. A `ShardInfo` is created when it is asked for."""

    def __init__(self, shards: Iterable[ShardInfo | dict[str, Any]] = ()) -> None:
        rows = Rows()
        for shard in shards:
            rows.add(shard if isinstance(shard, dict) else shard.__dict__)
        self._columns = rows.columns()

    @classmethod
    def of(cls, columns: dict[str, np.ndarray]) -> ShardTable:
        """Return a table of these columns, named like the fields of `ShardInfo`: int64, or bytes of UTF-8."""
        table = cls.__new__(cls)
        table._columns = columns
        return table

    def column(self, name: str) -> np.ndarray:
        """Return (shards,) values of a field of `ShardInfo`: int64, or bytes of UTF-8."""
        return self._columns[name]

    def __len__(self) -> int:
        return len(self._columns["file"])

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, index: slice) -> ShardTable: ...
    def __getitem__(self, index: int | slice) -> ShardInfo | ShardTable:
        if isinstance(index, slice):
            return ShardTable.of({name: column[index] for name, column in self._columns.items()})
        numbers = {name: int(self._columns[name][index]) for name in _NUMBERS}
        texts = {name: self._columns[name][index].decode() for name in _TEXTS}
        return ShardInfo.model_construct(**numbers, **texts)

    def __iter__(self) -> Iterator[ShardInfo]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(ShardInfo.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # not hashable, like the list that it replaces

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validated(value: Any, of_rows: core_schema.ValidatorFunctionWrapHandler) -> ShardTable:
            return value if isinstance(value, cls) else cls(of_rows(value))

        def listed(shards: Iterable[ShardInfo]) -> list[dict[str, Any]]:
            return [shard.model_dump() for shard in shards]

        return core_schema.no_info_wrap_validator_function(
            validated,
            handler.generate_schema(tuple[ShardInfo, ...]),
            serialization=core_schema.plain_serializer_function_ser_schema(listed),
        )


class Rows:
    """Collects shards into columns, so that few are Python objects at a time."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._chunks: list[dict[str, np.ndarray]] = []
        self._count = 0

    def add(self, row: dict[str, Any]) -> int:
        """Append a shard with the fields of `ShardInfo`; return its number."""
        self._rows.append(row)
        self._count += 1
        if len(self._rows) == _CHUNK:
            self._flush()
        return self._count - 1

    def columns(self) -> dict[str, np.ndarray]:
        """Return all shards that were added, as columns by field."""
        self._flush()
        return {name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in _FIELDS}

    def _flush(self) -> None:
        numbers = {name: np.array([row[name] for row in self._rows], np.int64) for name in _NUMBERS}
        texts = {name: np.array([row[name].encode() for row in self._rows], np.bytes_) for name in _TEXTS}
        self._chunks.append({**numbers, **texts})
        self._rows = []


class _Row(int):
    """The number of a shard in `ShardParser`."""


class ShardParser:
    """Takes the shards out of a JSON document while it is parsed, so that they never all exist as Python objects."""

    def __init__(self) -> None:
        self._rows = Rows()
        self._columns: dict[str, np.ndarray] | None = None

    def hook(self, value: dict[str, Any]) -> dict[str, Any] | _Row:
        """Return the row number for a well-formed shard, and anything else unchanged.

        It is the `object_hook` of `json.loads`.
        """
        if value.keys() != _FIELDS.keys() or any(type(value[name]) is not kind for name, kind in _FIELDS.items()):
            return value
        if any(value[name] < 0 or value[name] >> 62 for name in _NUMBERS):
            return value
        return _Row(self._rows.add(value))

    def table(self, shards: Any) -> Any:
        """Return the table of a list of rows.

        If it holds anything else, return the value as it was in the JSON document.
        """
        if self._columns is None:
            self._columns = self._rows.columns()
        if not isinstance(shards, list):
            return shards
        if all(type(shard) is _Row for shard in shards):
            return ShardTable.of(
                {name: column[shards] for name, column in self._columns.items()} if shards else ShardTable()._columns
            )
        every = ShardTable.of(self._columns)
        return [every[shard].model_dump() if type(shard) is _Row else shard for shard in shards]
