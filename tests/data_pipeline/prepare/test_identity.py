"""Two preparations make the same corpus if their settings and the content of their sources are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bst_base.errors import UserError
from bst_base.settings import parse
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.identity import check_same, identity, name_of
from data_pipeline.prepare.parallel import Workers
from data_pipeline.prepare.spool import group_parts
from data_pipeline.sources import jsonl


@pytest.fixture
def identify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``identify(size, **changes)`` returns the identity of a JSON Lines file in parts, with `size` bytes per task."""
    monkeypatch.setattr(jsonl, "_RANGE", 40)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(20)))

    def of(size: int = 100, **changes) -> dict:
        settings = {"source": {"kind": "jsonl", "path": str(tmp_path / "texts")}, "output": str(tmp_path / "corpus")}
        config = parse(PrepareConfig, settings | changes)
        parts = config.source.listing().parts
        assert len(parts) > 5
        return identity(config, group_parts(parts, size), Workers(None, 1), lambda *_: None)

    return of


def test_change_anywhere_in_a_file_read_in_parts_changes_the_identity(identify, tmp_path: Path) -> None:
    file = tmp_path / "texts/a.jsonl"
    before, text = identify(), file.read_text()
    for line in ("line 0", "line 9", "line 19"):
        file.write_text(text.replace(f'"{line}"', f'"{line.replace("line", "Line")}"'))
        after = identify()
        assert after["source"]["content_sha256"] != before["source"]["content_sha256"]
        assert name_of(after) != name_of(before)
        with pytest.raises(UserError, match="the source's files are not those it was made from"):
            check_same(before, after, tmp_path)
    file.write_text(text)
    assert identify() == before


def test_identity_does_not_depend_on_workers_part_size_or_output(identify, tmp_path: Path) -> None:
    before = identify()
    same = [identify(size=10_000), identify(size=1), identify(workers=3), identify(output=str(tmp_path / "else"))]
    assert same == [before] * 4
    assert [name_of(each) for each in same] == [name_of(before)] * 4
    check_same(same[0], before, tmp_path)


def test_only_added_tokens_change_the_identity_of_tokenizer_settings(identify) -> None:
    before = identify()
    assert list(before["settings"]["tokenizer"]) == [
        "vocab_size",
        "model_type",
        "sample_bytes",
        "reuse",
        "bos",
        "eos",
        "pad",
    ]
    for kind in ("special_tokens", "text_tokens"):
        more = identify(tokenizer={kind: ["<|user|>"]})
        assert more["settings"]["tokenizer"] == before["settings"]["tokenizer"] | {kind: ["<|user|>"]}
        assert name_of(more) != name_of(before)


@pytest.mark.parametrize(
    ("found", "wanted", "told"),
    [
        ({"settings": {"seed": 0}}, {"settings": {"seed": 1}}, "seed: 0 there, 1 now"),
        ({"settings": {"text": None}}, {"settings": {"text": {"a": 1}}}, "text: None there, {'a': 1} now"),
        ({"settings": {"text": {"a": 1}}}, {"settings": {"text": 3}}, "text: {'a': 1} there, 3 now"),
        ({"settings": None}, {"settings": {"seed": 1}}, "settings: None there, {'seed': 1} now"),
        ({"source": {}}, {"source": {"content_sha256": "b"}}, "its source was not hashed, by an old version"),
    ],
)
def test_error_names_the_settings_that_differ(found: dict, wanted: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        check_same(found, wanted, tmp_path)
    assert str(refused.value) == (
        f"{tmp_path} holds another corpus ({told}): choose another output, or delete it first"
    )


def test_listing_hash_of_an_old_version_is_ignored(tmp_path: Path) -> None:
    check_same({"source": {"listing_sha256": "a"}}, {"source": {"listing_sha256": None}}, tmp_path)


@pytest.mark.parametrize("kind", ["github", "stdlib"])
def test_renamed_file_inside_a_part_changes_the_identity(tmp_path: Path, kind: str) -> None:
    package = tmp_path / "source/package"
    package.mkdir(parents=True)
    for name in ("__init__.py", "a.py", "b.py"):
        (package / name).write_text(f"{name[0]} = 1\n")
    settings = {"source": {"kind": kind, "path": str(tmp_path / "source")}, "output": str(tmp_path / "corpus")}

    def found() -> dict:
        config = parse(PrepareConfig, settings)
        return identity(config, group_parts(config.source.listing().parts, 100), Workers(None, 1), lambda *_: None)

    before = found()
    (package / "b.py").rename(package / "c.py")  # the order and the content of the files stay
    after = found()
    assert after["source"]["content_sha256"] == before["source"]["content_sha256"]
    with pytest.raises(UserError, match=r"holds another corpus \(the source's files have other names than"):
        check_same(before, after, tmp_path)
    del before["source"]["names_sha256"]  # a corpus of an older version
    check_same(before, after, tmp_path)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "github", "stdlib"])
@pytest.mark.parametrize("output", ["text", "text/corpus", "text/a/../b/corpus", "link/corpus"])
def test_output_inside_the_source_is_refused(run, folder: Path, tmp_path: Path, kind: str, output: str) -> None:
    (folder / "lines.jsonl").write_text('{"text": "a"}\n')
    (folder / "os.py").write_text("a = 1\n")
    (tmp_path / "link").symlink_to(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=r"output is inside .*/text, the directory .*: give another output"):
        run(output, source={"kind": kind, "path": str(folder)})
    assert sorted(folder.rglob("*")) == before


def test_output_beside_a_source_of_one_file_or_around_the_source_is_accepted(run, folder: Path, tmp_path: Path) -> None:
    whole = "\n".join(json.dumps({"text": path.read_text()}) for path in sorted(folder.rglob("*.txt")))
    (tmp_path / "lines/in").mkdir(parents=True)
    (tmp_path / "lines/in/a.jsonl").write_text(whole)
    source = {"kind": "jsonl", "path": str(tmp_path / "lines/in/a.jsonl")}
    assert run("lines/in/corpus", source=source)[1]["reused"] is False
    assert run("lines/in/corpus", source=source)[1]["reused"] is True
    (tmp_path / "around/raw").mkdir(parents=True)
    (tmp_path / "around/raw/a.jsonl").write_text(whole)
    assert run("around", source={"kind": "jsonl", "path": str(tmp_path / "around/raw")})[1]["reused"] is False


@pytest.mark.parametrize("change", ["grow", "remove", "add"])
@pytest.mark.parametrize("kind", ["folder", "github"])
def test_source_that_changes_after_it_was_hashed_stops_the_preparation(
    run, folder: Path, kind: str, change: str
) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("extract", 0):
            if change == "grow":
                (folder / "a/00.txt").write_text("another text")
            elif change == "remove":
                (folder / "a/00.txt").unlink()
            else:
                (folder / "a/more.txt").write_text("a new text")

    source = {"kind": kind, "path": str(folder)}
    if (kind, change) == ("folder", "add"):  # a file that was not listed is not read
        run(source=source, progress=progress)
        return
    if (kind, change) == ("folder", "remove"):
        with pytest.raises(UserError, match=r"a/00\.txt"):
            run(source=source, progress=progress)
        return
    with pytest.raises(UserError, match=r"a/.*: was changed while the corpus was prepared; start again when"):
        run(source=source, progress=progress)
    assert run(source=source, validation_fraction=0.0)[1]["reused"] is False
