"""Tables: Parquet and Arrow files, as Hugging Face data sets are stored and published, a document a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bst_base.errors import UserError
from data_pipeline.sources.base import Document, Part, Skipped
from data_pipeline.sources.records import RecordSource

if TYPE_CHECKING:
    import pyarrow

_ARROW = (".arrow", ".feather")
_ROWS = 1024  # turned into Python objects at a time


class Tables(RecordSource):
    """Every `.parquet` file under a directory (or one such file), sorted by path; also Arrow's `.arrow` and `.feather`,
    as `datasets` saves them. A Parquet file is read by many workers, a row group each."""

    kind: Literal["parquet"] = "parquet"
    """Parquet and Arrow tables."""

    def wanted(self, name: str) -> bool:
        return name.endswith((".parquet", *_ARROW))

    def expected(self) -> str:
        return f"a table, or a directory of them: .parquet, {', '.join(_ARROW)}"

    def parts_of(self, name: str, path: Path) -> list[Part]:
        if name.endswith(_ARROW):
            return super().parts_of(name, path)
        import pyarrow.parquet  # takes as long to import as all the other sources together

        try:
            table = pyarrow.parquet.read_metadata(path)
        except (OSError, ValueError):  # said where the part is read, under the policy for what is bad
            return super().parts_of(name, path)
        return [Part(name, table.row_group(i).total_byte_size, i) for i in range(table.num_row_groups)]

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        split = self.split_of(part)
        try:
            for row, record in self._records(part):
                yield self.document(record, f"{part.name}:{row}", split)
        except ValueError as error:  # pyarrow's own errors are ValueErrors; those of this project come as they are
            if isinstance(error, UserError):
                raise
            raise UserError(f"{part.name}: damaged or cut short ({error}); get the file again") from None

    def _records(self, part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number in the file, row) of the rows of a part."""
        import pyarrow.parquet

        path = self.root / part.name
        if part.name.endswith(_ARROW):
            number = 0
            for batch in _arrow_batches(path):
                yield from enumerate(batch.select(self._columns(batch.schema.names)).to_pylist(), start=number)
                number += batch.num_rows
            return
        with pyarrow.parquet.ParquetFile(path) as table:
            number = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
            columns = self._columns(table.schema_arrow.names)
            for batch in table.iter_batches(_ROWS, row_groups=[max(part.start, 0)], columns=columns):
                yield from enumerate(batch.to_pylist(), start=number)
                number += batch.num_rows

    def _columns(self, there: list[str]) -> list[str]:
        """Which columns are read; all of them when none holds the text, so that the message can name them."""
        texts = (self.text_field,) if isinstance(self.text_field, str) else self.text_field
        others = (self.licence_field, self.group_field, self.split_field, self.title_field, *self.keep, *self.where)
        asked = {part for name in (*texts, *others) for part in (name, name.partition(".")[0])}
        held = {part for name in texts for part in (name, name.partition(".")[0])}
        return [name for name in there if name in asked] if held.intersection(there) else there


def _arrow_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """The batches of an Arrow file, in either of its forms."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:  # not mapped: a page that cannot be read would kill the worker
        try:
            reader = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)
            return
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
