"""Tables: Parquet and Arrow files, the format of Hugging Face data sets, one document per row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bst_base.errors import UserError
from data_pipeline.sources.base import Part, Skipped
from data_pipeline.sources.records import RecordSource

if TYPE_CHECKING:
    import pyarrow

_ARROW = (".arrow", ".feather")
_ROWS, _BYTES = 1024, 8 << 20  # maximum rows, and bytes, about, that are decoded together


class Tables(RecordSource):
    """Every `.parquet` file under a directory (or one such file), sorted by path; also `.arrow` and `.feather` files,
    as `datasets` saves them.

    A Parquet file is read by several workers, one row group each.
    """

    kind: Literal["parquet"] = "parquet"
    """Parquet and Arrow tables."""

    def wanted(self, name: str) -> bool:
        return name.endswith((".parquet", *_ARROW))

    def expected(self) -> str:
        return f"a table, or a directory of them: .parquet, {', '.join(_ARROW)}"

    def parts_of(self, name: str, path: Path) -> list[Part]:
        if name.endswith(_ARROW):
            return super().parts_of(name, path)
        import pyarrow.parquet  # imported late: it takes as long as all other sources together

        try:
            table = pyarrow.parquet.read_metadata(path)
        except (OSError, ValueError):  # reported when the part is read, by the policy for bad records
            return super().parts_of(name, path)
        return [Part(name, table.row_group(i).total_byte_size, i) for i in range(table.num_row_groups)]

    def records(self, part: Part) -> Iterator[tuple[str, Any, Iterable[str]]]:
        try:
            for first, batch, names in self._batches(part):
                for i in range(batch.num_rows):  # one at a time: rows may be long
                    where = f"{part.name}:{first + i}"
                    yield where, _row(batch, i, where), names
        except ValueError as error:  # most of pyarrow's own errors are ValueErrors
            raise UserError(f"{part.name}: damaged or cut short ({error}); get the file again") from None
        except NotImplementedError as error:
            raise UserError(f"{part.name}: pyarrow cannot read it ({error}); write it in another form") from None

    def _batches(self, part: Part) -> Iterator[tuple[int, pyarrow.RecordBatch, list[str]]]:
        """Yield (number of the first row in the file, some rows, names of all columns) for the rows of a part."""
        import pyarrow.parquet

        path = self.root / part.name
        if part.name.endswith(_ARROW):
            number = 0
            for batch in _arrow_batches(path):
                names = batch.schema.names
                yield number, batch.select(self._columns(names)), names
                number += batch.num_rows
            return
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BYTES, pre_buffer=False) as table:
            group = max(part.start, 0)
            number = sum(table.metadata.row_group(i).num_rows for i in range(group))
            names = table.schema_arrow.names
            rows = _rows_together(table.metadata.row_group(group)) if table.num_row_groups else 1
            for batch in table.iter_batches(rows, row_groups=[group], columns=self._columns(names)):
                yield number, batch, names
                number += batch.num_rows

    def _columns(self, there: list[str]) -> list[str]:
        """Return the columns to read. If none holds the text, all are read, so that the error message can name them."""
        asked = {part: setting for name, setting in self.asked().items() for part in (name, name.partition(".")[0])}
        held = {part for part, setting in asked.items() if setting == "text_field"}
        return [name for name in there if name in asked] if held.intersection(there) else there


def _rows_together(group: pyarrow.parquet.RowGroupMetaData) -> int:
    """Return how many rows of a row group to decode together."""
    return max(1, min(_ROWS, _BYTES * group.num_rows // max(group.total_byte_size, 1)))


def _row(batch: pyarrow.RecordBatch, i: int, where: str) -> dict[str, Any] | Skipped:
    """Return a row of a table, or why it cannot be read."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = _value(column[i])
        # times outside Python's years (ValueError, OverflowError), unknown time zones (KeyError), unusual types
        except (ValueError, OverflowError, KeyError, NotImplementedError) as error:
            return Skipped(where, f"field {name!r} cannot be read ({error})", bad=True, remedy=f"leave out {name!r}")
    return row


def _value(scalar: Any) -> Any:
    """Return a value of a table as a Python object. A string that is not UTF-8 stays bytes."""
    import pyarrow

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pyarrow.StructScalar):
            return {name: _value(inner) for name, inner in scalar.items()}
        if isinstance(scalar, pyarrow.DictionaryScalar):
            return _value(scalar.value)
        if isinstance(scalar, (pyarrow.StringScalar, pyarrow.LargeStringScalar, pyarrow.StringViewScalar)):
            return scalar.as_buffer().to_pybytes()
        raise


def _arrow_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Yield the batches of an Arrow file, in the file or the stream format."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:  # not memory-mapped: an unreadable page would kill the worker
        try:
            reader = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)
            return
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
