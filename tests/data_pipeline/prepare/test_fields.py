"""A field that the settings name but no record has is an error: a misspelt field would drop every record, or have no
effect."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bst_base.errors import UserError
from data_pipeline.prepare import corpus as preparing
from data_pipeline.prepare import field_check
from data_pipeline.prepare.field_check import FieldCheck
from data_pipeline.sources import Fields
from tests.data_pipeline.prepare.conftest import text

ROWS = [{"text": text(i), "language": "en", "meta": {"url": f"u{i}"}} for i in range(60)]
ROWS[-1]["rare"] = "x"


@pytest.fixture(params=["jsonl", "many chunks", "gzip", "parquet"])
def source(request, tmp_path: Path, monkeypatch) -> dict[str, Any]:
    """Settings of a source with the same records in files of several kinds; only the last record has a rare field."""
    monkeypatch.setattr(preparing, "_CHUNK_BYTES", 2000 if request.param == "many chunks" else 8 << 20)
    root = tmp_path / "records"
    root.mkdir()
    for half, rows in enumerate((ROWS[:30], ROWS[30:])):
        if request.param == "parquet":
            table = pyarrow.Table.from_pylist(rows, pyarrow.Table.from_pylist(ROWS[-1:]).schema)
            pyarrow.parquet.write_table(table, root / f"{half}.parquet", row_group_size=7)
            continue
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        packed = request.param == "gzip"
        (root / f"{half}.jsonl{'.gz' if packed else ''}").write_bytes(gzip.compress(lines) if packed else lines)
    return {"kind": "parquet" if request.param == "parquet" else "jsonl", "path": str(root)}


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"where": {"langage": "en"}}, r"source\.where: no record has the field 'langage'; did you mean 'language'\?"),
        ({"keep": ["meta.urls"]}, r"source\.keep: no record has the field 'meta\.urls'; did you mean 'meta\.url'\?"),
        ({"licence_field": "zzz"}, r"source\.licence_field: .* 'zzz'; correct or remove it \(fields there: language, "),
        ({"text_field": ["title", "text"]}, r"source\.text_field: no record has the field 'title'"),
    ],
)
def test_unknown_field_error_suggests_the_nearest_field(run, source, setting, told: str) -> None:
    with pytest.raises(UserError, match=told):
        run(source={**source, **setting}, tokenizer={"vocab_size": 300})


def test_field_of_a_single_record_is_accepted(run, source, tmp_path: Path) -> None:
    named = {"keep": ["rare", "meta.url"], "where": {"language": ["en", "de"]}}
    manifest, _ = run(source={**source, **named}, tokenizer={"vocab_size": 300})
    assert sum(info.documents for infos in manifest.splits.values() for info in infos) == 60


@pytest.mark.parametrize("keep", ["rares", "rare", "meta.url"])
def test_unknown_field_is_reported_once_early_in_a_large_source(run, tmp_path: Path, monkeypatch, caplog, keep) -> None:
    monkeypatch.setattr(preparing, "_CHUNK_BYTES", 2000)
    monkeypatch.setattr(field_check, "EARLY", 5000)
    path = tmp_path / "records"
    path.mkdir()
    for number, row in enumerate(ROWS):
        (path / f"{number:02}.jsonl").write_text(json.dumps(row) + "\n")
    settings = {"source": {"kind": "jsonl", "path": str(path), "keep": [keep]}, "tokenizer": {"vocab_size": 300}}
    if keep == "rares":
        with pytest.raises(UserError, match="no record has the field 'rares'"):
            run(**settings)
    else:
        run(**settings)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (keep != "meta.url")
    assert all(f"source.keep: no record has the field {keep!r}; correct or remove it" in each for each in warnings)


def test_unknown_field_is_reported_when_a_file_is_damaged(run, tmp_path: Path) -> None:
    """Records before the damage count, so a field that only they have is not reported as missing."""
    root = tmp_path / "records"
    root.mkdir()
    lines = ["".join(json.dumps(row) + "\n" for row in rows).encode() for rows in (ROWS[:29:-1], ROWS[:30])]
    (root / "a.jsonl.gz").write_bytes(gzip.compress(lines[0], 0)[:-20_000])
    (root / "b.jsonl").write_bytes(lines[1])
    source = {"kind": "jsonl", "path": str(root)}
    settings = {"tokenizer": {"vocab_size": 300}, "on_bad_record": "skip"}
    with pytest.raises(UserError, match=r"source\.keep: no record has the field 'rares'; did you mean 'rare'\?"):
        run(source={**source, "keep": ["rares"]}, **settings)
    manifest, _ = run(source={**source, "keep": ["rare"]}, **settings)
    assert 30 < sum(info.documents for infos in manifest.splits.values() for info in infos) < 60


def test_number_of_remembered_field_names_is_bounded() -> None:
    found = [Fields({"rares"}), Fields({"rares"})]
    for part, fields in enumerate(found):
        for i in range(2000):
            fields.note({"rare": 1, "meta": {f"{part}-{i}": 0}}, ["rare", "meta"])
    both = found[0].and_of(found[1])
    assert len(both.there) < 2100 and {"rare", "meta.0-1"} < both.there and both.missing == {"rares"}


def test_interrupted_preparation_remembers_the_fields_already_read(run, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"source": {"kind": "jsonl", "path": str(path), "keep": ["rares"]}, "tokenizer": {"vocab_size": 300}}

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FieldCheck, "require", stopped)  # by then all chunks are written
        run(**settings)
    monkeypatch.setattr("data_pipeline.prepare.spool._write_chunk", lambda *_: pytest.fail("a chunk is read again"))
    with pytest.raises(UserError, match=r"source\.keep: no record has the field 'rares'; did you mean 'rare'\?"):
        run(**settings)
