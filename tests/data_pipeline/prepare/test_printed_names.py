"""Commands print licences, paths and messages as they are: no markup of the terminal's library, no emoji codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bst_dist.cli import main
from data_pipeline.commands import bench
from data_pipeline.commands.stats import most_frequent
from tests.data_pipeline.prepare.conftest import text

LICENCES = ["MIT", "[/b] custom", "[unknown]"]
NAME = "[red]my :x: corpus[b]"


@pytest.fixture
def corpus(tmp_path: Path, settings_of, capsys: pytest.CaptureFixture) -> Path:
    (tmp_path / "records").mkdir()
    rows = [{"text": text(i), "by": LICENCES[i % 3]} for i in range(30)]
    (tmp_path / "records/[a].jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{[/x] :x:\n")
    source = {"kind": "jsonl", "path": str(tmp_path / "records"), "licence_field": "by"}
    settings = settings_of(NAME, source=source, on_bad_record="skip", workers=1)
    (tmp_path / "corpus.yaml").write_text(json.dumps(settings))
    assert main(["data", "prepare", str(tmp_path / "corpus.yaml")]) == 0
    output = Path(settings["output"])
    said = capsys.readouterr().out
    assert f"{output} prepared in" in said and f"listed in {output}/skipped.jsonl" in said
    assert main(["data", "prepare", str(tmp_path / "corpus.yaml")]) == 0
    assert f"{output} is already prepared" in capsys.readouterr().out
    return output


def test_licences_and_paths_with_brackets_are_printed_as_they_are(corpus: Path, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "[b]l[/b].png"
    assert main(["data", "stats", str(corpus), "--workers", "1", "--length", "64", "--png", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "licences: MIT (10), [/b] custom (10), [unknown] (10)\n" in said
    assert f"histogram of lengths: {picture}\n" in said
    assert main(["data", "pack", str(corpus), "--workers", "1"]) == 0
    assert capsys.readouterr().out.endswith(f"\n{corpus}: 0 packed files written, for 4 shards\n")
    assert main(["data", "push", str(corpus), f"file://{tmp_path}/pushed"]) == 0
    assert f"\n{corpus}: " in capsys.readouterr().out


def test_problems_with_brackets_are_printed_as_they_are(corpus: Path, capsys) -> None:
    assert main(["data", "verify", str(corpus), "--workers", "1"]) == 0
    assert f"{corpus}: 4 shards, " in capsys.readouterr().out
    (corpus / "tokenizer.model").unlink()
    (corpus / "train-000000.idx").unlink()
    assert main(["data", "verify", str(corpus), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert f"train-000000.tar: {corpus}/train-000000.idx: the index is missing\n" in said
    assert f"{corpus}: 4 shards, " in said and ": 2 problems\n" in said


def test_only_the_most_frequent_licences_are_listed() -> None:
    counts = {f"licence {n:02d}": n for n in range(1, 31)}
    assert most_frequent(counts, 3) == "licence 30 (30), licence 29 (29), licence 28 (28), 27 others (378)"
    assert most_frequent({"MIT": 2, "0BSD": 2}, 3) == "MIT (2), 0BSD (2)"


def test_bench_prints_its_directory_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench.venv, "create", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bench._Bench(tmp_path / NAME, 1, 1, bench.Console())._install()
    assert f"into {tmp_path / NAME}/peers" in capsys.readouterr().out
