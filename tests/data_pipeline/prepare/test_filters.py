"""Custom filters change texts and drop documents, and are part of a corpus's identity."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bst_base.errors import UserError
from bst_base.settings import ConfigError, load, parse
from data_pipeline.prepare import filters
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.sources import Document
from tests.data_pipeline.prepare.test_prepare import stored

CODE = """
def odd(text, document):
    number = int(document.path[-6:-4])
    return text if number % 2 else None

def shouted(text, document):
    return text.upper()

def broken(text, document):
    return len(text) if document.path == "b/03.txt" else text[10**9]
"""


@pytest.fixture
def code(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    filters.load.cache_clear()
    yield path
    filters.load.cache_clear()


def test_filters_change_texts_and_drop_documents(run, folder: Path, code: Path, tmp_path: Path) -> None:
    manifest, _ = run(text={"filters": [f"{code}:odd", f"{code}:shouted"]})
    found = {path: text for split in manifest.splits for path, text in stored(tmp_path / "corpus", split).items()}
    kept = [file for file in folder.rglob("*.txt") if int(file.stem) % 2]
    assert found == {file.relative_to(folder).as_posix(): file.read_bytes().decode().upper() for file in kept}
    assert manifest.provenance["left_out"] == {"filter odd": 15}
    assert json.loads((tmp_path / "corpus/skipped.jsonl").read_text().splitlines()[0])["path"] == "a/00.txt"
    assert str(tmp_path) not in json.dumps(manifest.provenance)


def test_edited_filter_changes_the_identity_of_a_corpus(run, code: Path) -> None:
    run(text={"filters": [f"{code}:odd"]})
    assert run(text={"filters": [f"{code}:odd"]})[1]["reused"]
    code.write_text(CODE + "# another version\n")
    with pytest.raises(UserError, match=r"text\.filters"):
        run(text={"filters": [f"{code}:odd"]})
    with pytest.raises(UserError, match=r"text\.filters"):
        run()


def test_settings_without_filters_do_not_change_the_identity(run) -> None:
    assert "filters" not in run()[0].provenance["settings"]["text"]


def test_document_whose_filter_fails_is_a_bad_record(run, code: Path) -> None:
    with pytest.raises(UserError, match=r"a/00\.txt: filter broken failed \(IndexError: .*mend the filter"):
        run(text={"filters": [f"{code}:broken"]})
    with pytest.raises(UserError, match=r"holds no text .*29 filter broken failed"):
        run(text={"filters": [f"{code}:broken"]}, on_bad_record="skip")


def test_missing_filter_gives_one_message(run, settings_of, code: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.py: there is no such file"):
        run(text={"filters": [f"{tmp_path}/none.py:odd"]})
    with pytest.raises(UserError, match="has no function even"):
        run(text={"filters": [f"{code}:even"]})
    with pytest.raises(ConfigError, match=r"write path/to/file\.py:function"):
        parse(PrepareConfig, settings_of(text={"filters": ["odd"]}))
    (tmp_path / "corpus.yaml").write_text(json.dumps(settings_of(text={"filters": ["mine.py:odd"]})))
    assert load(PrepareConfig, tmp_path / "corpus.yaml", []).text.filters == (str(code) + ":odd",)


def test_filter_may_define_dataclasses_and_import_modules_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_filter.py").write_text("WORD = 'kept'\n")
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, field\n"
        "from typing import ClassVar\n"
        "from beside_filter import WORD\n"
        "@dataclass\n"
        "class Rule:\n"
        "    least: ClassVar[int] = 3\n"
        "    words: list[str] = field(default_factory=list)\n"
        "def keep(text, document):\n"
        "    return WORD if Rule() else None\n"
    )
    before = list(sys.path)
    assert filters.load(f"{tmp_path}/own.py:keep")("text", Document("a", "text")) == "kept"
    assert sys.path == before
