"""Parquet and Arrow tables, in their real formats."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bst_base.errors import UserError
from data_pipeline.prepare.text import TextConfig, stored_text
from data_pipeline.sources import SOURCES, Document, Skipped, parquet

ROWS = [{"text": f"text {i}", "meta": {"lang": "en" if i % 3 else "de"}, "n": i, "day": None} for i in range(50)]


@pytest.mark.parametrize("form", ["parquet", "arrow stream", "arrow file"])
def test_parquet_and_arrow_tables_are_read(read_all, tmp_path: Path, form: str) -> None:
    table, root = pyarrow.Table.from_pylist(ROWS), tmp_path / "tables"
    root.mkdir()
    if form == "parquet":
        pyarrow.parquet.write_table(table, root / "train.parquet", row_group_size=7)
        assert len(SOURCES["parquet"](path=root).listing().parts) == 8
    else:
        writer = pyarrow.ipc.new_stream if form == "arrow stream" else pyarrow.ipc.new_file
        with writer(root / "train.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=9)
    documents, skipped = read_all("parquet", path=root, where={"meta.lang": "en"}, keep=("n",), own_splits=True)
    wanted = [row for row in ROWS if row["meta"]["lang"] == "en"]
    assert [(d.content, d.meta) for d in documents] == [(row["text"], {"n": row["n"]}) for row in wanted]
    assert len({d.path for d in documents}) == len(wanted) and {d.split for d in documents} == {"train"}
    assert len(skipped) == 17 and set(skipped.values()) == {"filter meta.lang"}
    with pytest.raises(UserError, match=r"no field 'body' \(there: day, meta, n, text\); set source\.text_field"):
        read_all("parquet", path=root, text_field="body")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_table_is_refused_by_name(read_all, put, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: damaged or cut short"):
        read_all("parquet", path=put({name: b"PAR1 not a table"}))


def as_strings(values: list[bytes], kind: pyarrow.DataType) -> pyarrow.Array:
    """Return strings that pyarrow does not check, as other programs write them."""
    return pyarrow.Array.from_buffers(kind, len(values), pyarrow.array(values, pyarrow.binary()).buffers())


def read_back(table: pyarrow.Table, path: Path, **settings) -> list[Document | Skipped]:
    pyarrow.parquet.write_table(table, path)
    source = SOURCES["parquet"](path=path, **settings)
    return [
        found
        for part in source.listing().parts
        for found in source.read(part)
        if isinstance(found, (Document, Skipped))
    ]


BYTES = [b"good", "z\u00e4h".encode(), b"caf\xe9", b"last"]


@pytest.mark.parametrize("kind", ["string", "binary", "inner", "dictionary"])
def test_text_that_is_not_utf8_is_handled_by_the_setting_and_loses_no_other_row(tmp_path: Path, kind: str) -> None:
    texts = pyarrow.array(BYTES, pyarrow.binary()) if kind == "binary" else as_strings(BYTES, pyarrow.string())
    if kind == "inner":
        texts = pyarrow.StructArray.from_arrays([texts], names=["body"])
    if kind == "dictionary":
        texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 2, 3], pyarrow.int32()), texts)
    field = "text.body" if kind == "inner" else "text"
    found = read_back(pyarrow.table({"text": texts}), tmp_path / "a.parquet", text_field=field)
    assert [each.path for each in found] == [f"a.parquet:{i}" for i in range(4)]
    for setting, third in (("latin-1", "caf\u00e9"), ("replace", "caf\ufffd")):
        stored = [stored_text(each, TextConfig(undecodable=setting))[1].decode() for each in found]
        assert stored == ["good", "z\u00e4h", third, "last"]
    third = stored_text(found[2], TextConfig())
    assert third.bad and third.reason == "not UTF-8 (byte 3 is 0xe9)"


def test_bytes_in_other_fields_are_decoded(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "name": pyarrow.array([b"n\xc3\xa4", b"\xe9"], pyarrow.binary())})
    found = read_back(table, tmp_path / "a.parquet", title_field="name")
    assert found[0].title == "n\u00e4"
    assert stored_text(found[1], TextConfig()).reason.startswith("not Unicode text in its title")
    several = read_back(table, tmp_path / "a.parquet", text_field=("text", "name"))
    assert [each.content for each in several] == [b"a\n\nn\xc3\xa4", b"b\n\n\xe9"]


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (pyarrow.timestamp("us"), 2**62),
        (pyarrow.timestamp("us", "Atlantis/Nowhere"), 0),
        (pyarrow.date32(), 2**30),
        (pyarrow.timestamp("s"), -(2**60)),
    ],
)
def test_time_that_python_cannot_represent_is_one_bad_record(tmp_path: Path, kind, wrong: int) -> None:
    integer = pyarrow.int32() if kind == pyarrow.date32() else pyarrow.int64()
    times = pyarrow.array([None, wrong, None], integer).cast(kind)
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"text": ["a", "b", "c"], "when": times})
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    source = SOURCES["parquet"](path=path, keep=("when",))
    found = [each for each in source.read(source.listing().parts[0]) if isinstance(each, (Document, Skipped))]
    assert [type(each) for each in found] == [Document, Skipped, Document]
    assert found[1].bad and found[1].reason.startswith("field 'when' cannot be read (")


def test_few_long_rows_are_decoded_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "_BYTES", 1 << 16)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{i}" * 20_000 for i in range(9)]}), path)
    source = SOURCES["parquet"](path=path)
    sizes = [batch.num_rows for _, batch, _ in source._batches(source.listing().parts[0])]
    assert sum(sizes) == 9 and max(sizes) <= 3
