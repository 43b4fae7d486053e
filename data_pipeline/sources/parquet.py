"""Tables: Parquet and Arrow files, the format of Hugging Face data sets, one document per row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bst_base.errors import UserError
from data_pipeline.sources.base import Part
from data_pipeline.sources.records import RecordSource

if TYPE_CHECKING:
    import pyarrow

_ARROW = (".arrow", ".feather")
_ROWS = 1024  # rows converted to Python objects at a time


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
            for row, record, names in self._rows(part):
                yield f"{part.name}:{row}", record, names
        except ValueError as error:  # pyarrow's own errors are ValueErrors
            raise UserError(f"{part.name}: damaged or cut short ({error}); get the file again") from None

    def _rows(self, part: Part) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
        """Yield (number in the file, row, names of all columns) for the rows of a part."""
        import pyarrow.parquet

        path = self.root / part.name
        if part.name.endswith(_ARROW):
            number = 0
            for batch in _arrow_batches(path):
                names = batch.schema.names
                rows = batch.select(self._columns(names)).to_pylist()
                yield from ((number + i, row, names) for i, row in enumerate(rows))
                number += batch.num_rows
            return
        with pyarrow.parquet.ParquetFile(path) as table:
            number = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
            names = table.schema_arrow.names
            for batch in table.iter_batches(_ROWS, row_groups=[max(part.start, 0)], columns=self._columns(names)):
                yield from ((number + i, row, names) for i, row in enumerate(batch.to_pylist()))
                number += batch.num_rows

    def _columns(self, there: list[str]) -> list[str]:
        """Return the columns to read. If none holds the text, all are read, so that the error message can name them."""
        asked = {part: setting for name, setting in self.asked().items() for part in (name, name.partition(".")[0])}
        held = {part for part, setting in asked.items() if setting == "text_field"}
        return [name for name in there if name in asked] if held.intersection(there) else there


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
