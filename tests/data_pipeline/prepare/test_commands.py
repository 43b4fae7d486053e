"""The commands: their output, JSON reports and exit statuses."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from bst_dist.cli import main
from data_pipeline.format.manifest import Manifest
from data_pipeline.format.shards import ShardIndex


@pytest.fixture
def config(settings_of, tmp_path: Path) -> Path:
    path = tmp_path / "corpus.yaml"
    path.write_text(yaml.safe_dump({**settings_of(), "workers": 1}))
    return path


@pytest.fixture
def corpus(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Path:
    assert main(["data", "prepare", str(config)]) == 0
    capsys.readouterr()
    return tmp_path / "corpus"


def report(path: Path) -> dict:
    return json.loads(path.read_text())


def test_prepare_reports_its_result_and_later_reuses_it(config: Path, tmp_path: Path, capsys) -> None:
    assert main(["data", "prepare", str(config), "--json", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().out
    assert "encode           100 %" in said
    assert "duplicates removed: 0 exact, 0 near" in said
    made = report(tmp_path / "r.json")
    assert made["splits"]["train"]["documents"] + made["splits"]["validation"]["documents"] == 30
    assert made["reused"] is False
    assert list(made["stage_time_s"]) == ["fetch", "hash source", "extract", "deduplicate", "train tokenizer", "encode"]
    assert sum(made["stage_time_s"].values()) <= made["time_s"]
    assert list(made["stage_cpu_s"]) == list(made["stage_time_s"])
    assert 0 < sum(made["stage_cpu_s"].values()) < made["cpu_s"]
    assert main(["data", "prepare", str(config)]) == 0
    assert "already prepared with these settings: reused" in " ".join(capsys.readouterr().out.split())


def test_overrides_replace_settings_and_unknown_keys_are_refused(config: Path, tmp_path: Path, capsys) -> None:
    assert main(["data", "prepare", str(config), f"output={tmp_path / 'o'}", "tokenizer.vocab_size=500"]) == 0
    assert json.loads((tmp_path / "o/manifest.json").read_text())["tokenizer"]["vocab_size"] == 500
    assert main(["data", "prepare", str(config), "tokenizer.vocab=500"]) == 2
    assert "unknown key 'tokenizer.vocab': did you mean 'tokenizer.vocab_size'?" in capsys.readouterr().err


def test_added_tokens_are_reported_and_used_in_the_corpus(
    config: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text/a/00.txt").write_text("<|user|> w1 w2 [TOOL] w3")
    tokens = ["tokenizer.special_tokens=['<|user|>']", "tokenizer.text_tokens=['[TOOL]']"]
    out = ["--json", str(tmp_path / "r.json")]
    for name, more in (("trained", []), ("reused", [f"tokenizer.reuse={corpus}"])):
        assert main(["data", "prepare", str(config), f"output={tmp_path / name}", *tokens, *more, *out]) == 0
        added = report(tmp_path / "r.json")["added_tokens"]
        assert f"added tokens: <|user|> {added['<|user|>']}, [TOOL] {added['[TOOL]']}" in capsys.readouterr().out
        manifest = Manifest.read(tmp_path / name)
        assert manifest.tokenizer.vocab_size == 600 + 2 * (name == "reused")
        found = [np.load(io.BytesIO(bytes_)) for bytes_ in token_members(tmp_path / name)]
        assert sum(int((ids == added["[TOOL]"]).sum()) for ids in found) == 1
        assert not any((ids == added["<|user|>"]).any() for ids in found)
        assert main(["data", "verify", str(tmp_path / name), "--workers", "1"]) == 0
    assert main(["data", "prepare", str(config), "tokenizer.special_tokens=['<|user|>', '']"]) == 2
    assert "tokenizer: special_tokens: an empty token" in capsys.readouterr().err


def token_members(corpus: Path) -> list[bytes]:
    """Return the stored token members of all shards of a corpus."""
    found = []
    for path in sorted(corpus.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".tok.npy")]
    return found


def test_verify_passes_a_whole_corpus_and_fails_a_damaged_one(corpus: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "r.json")
    assert main(["data", "verify", str(corpus), "--workers", "1", "--json", out]) == 0
    assert report(tmp_path / "r.json")["passed"] is True
    shard = corpus / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    assert main(["data", "verify", str(corpus), "--workers", "1", "--json", out]) == 1
    assert [problem["file"] for problem in report(tmp_path / "r.json")["problems"]] == ["train-000001.tar"]
    said = capsys.readouterr().out
    assert re.search(r"train-000001\.tar: .* damaged .*; so its SHA-256 differs from the manifest's\n", said)


def test_verify_names_a_damaged_packed_file_and_accepts_a_missing_one(corpus: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "r.json")
    packed = corpus / "train-000001.tokens"
    data = bytearray(packed.read_bytes())
    data[700] ^= 1
    packed.write_bytes(data)
    assert main(["data", "verify", str(corpus), "--workers", "1", "--json", out]) == 1
    (problem,) = report(tmp_path / "r.json")["problems"]
    right = f"byte 700 is 0x{data[700]:02x}, but 0x{data[700] ^ 1:02x} in the tar"
    assert problem == {"file": packed.name, "what": right}
    packed.unlink()
    assert main(["data", "verify", str(corpus), "--workers", "1"]) == 0


def test_pack_writes_missing_and_damaged_packed_files(corpus: Path, tmp_path: Path, capsys) -> None:
    before = {path: path.read_bytes() for path in corpus.iterdir() if path.is_file()}
    packed = sorted(corpus.glob("*.tokens"))
    packed[0].unlink()
    packed[1].write_bytes(before[packed[1]][:-70] + bytes(70))
    for written in (2, 0):
        out = ["--workers", "1", "--json", str(tmp_path / "r.json")]
        assert main(["data", "pack", str(corpus), *out]) == 0
        assert report(tmp_path / "r.json")["written"] == written
        assert {path: path.read_bytes() for path in corpus.iterdir() if path.is_file()} == before
    packed[0].unlink()
    packed[0].with_suffix(".tar").write_bytes(b"")
    assert main(["data", "pack", str(corpus), "--workers", "1"]) == 2
    assert f"{packed[0].stem}.tar: missing, damaged, cut short or of another index" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [".tar", ".idx"])
def test_pack_refuses_a_damaged_shard_and_keeps_its_intact_packed_file(corpus: Path, damaged: str, capsys) -> None:
    packed = corpus / "train-000001.tokens"
    before, path = packed.read_bytes(), packed.with_suffix(damaged)
    index = ShardIndex.read(corpus / "train-000001.idx")
    if damaged == ".tar":
        data = bytearray(path.read_bytes())
        data[int(index.offsets[1]) + 20] ^= 1  # a token
        path.write_bytes(data)
    else:
        dataclasses.replace(index, offsets=index.offsets[::-1]).write(path)
    assert main(["data", "pack", str(corpus), "--workers", "1"]) == 2
    assert "train-000001.tar: missing, damaged, cut short or of another index" in capsys.readouterr().err
    assert packed.read_bytes() == before


def test_verify_without_a_corpus_says_how_to_prepare_one(tmp_path: Path, capsys) -> None:
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert (
        "no prepared corpus there (manifest.json is missing); make one with 'bst data prepare'"
        in capsys.readouterr().err
    )


def test_stats_reports_counts_and_writes_a_plot(corpus: Path, tmp_path: Path, capsys) -> None:
    arguments = ["data", "stats", str(corpus), "--workers", "1", "--json", str(tmp_path / "r.json")]
    assert main([*arguments, "--png", str(tmp_path / "l.png")]) == 0
    found = report(tmp_path / "r.json")
    assert sum(found["length_histogram"]["documents"]) == 30
    assert found["duplicates_left"] == 0
    assert found["overlap_with_train"]["validation"]["found"] == 0
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert "overlap: 0.00%" in capsys.readouterr().out
    assert main([*arguments, "--quick"]) == 0
    assert "overlap_with_train" not in report(tmp_path / "r.json")


def test_a_histogram_that_cannot_be_written_loses_no_number(corpus: Path, tmp_path: Path, no_room_for_figures) -> None:
    arguments = ["data", "stats", str(corpus), "--quick", "--json", str(tmp_path / "r.json")]
    assert main([*arguments, "--png", str(tmp_path / "l.png")]) == 74
    assert sum(report(tmp_path / "r.json")["length_histogram"]["documents"]) == 30


def test_show_prints_a_document_by_key_and_by_path(corpus: Path, folder: Path, capsys) -> None:
    expected = (folder / "a/04.txt").read_bytes().decode()
    assert not expected.endswith("\n")
    assert main(["data", "show", str(corpus), "a/04.txt"]) == 0
    assert capsys.readouterr().out == expected
    assert main(["data", "show", str(corpus), "2"]) == 0
    assert capsys.readouterr().out == expected
    assert main(["data", "show", str(corpus), "999"]) == 2
    assert "no document with the key or the path '999'" in capsys.readouterr().err


def test_show_ends_a_text_without_newline_with_one_only_on_a_terminal(corpus: Path, folder: Path, monkeypatch) -> None:
    for terminal in (False, True):
        output = io.StringIO(newline="")
        monkeypatch.setattr(output, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr("sys.stdout", output)
        assert main(["data", "show", str(corpus), "a/04.txt"]) == 0
        assert output.getvalue() == (folder / "a/04.txt").read_bytes().decode() + "\n" * terminal


def test_show_finds_a_document_whose_path_is_all_digits(settings_of, folder: Path, tmp_path: Path, capsys) -> None:
    for name in ("2", "777"):
        (folder / name).write_text(f"the document {name} ")
    source = {"kind": "folder", "path": str(folder), "pattern": "**/*"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**settings_of(source=source), "workers": 1}))
    assert main(["data", "prepare", str(tmp_path / "c.yaml")]) == 0
    capsys.readouterr()
    assert main(["data", "show", str(tmp_path / "corpus"), "777"]) == 0
    assert capsys.readouterr().out == "the document 777 "
    assert main(["data", "show", str(tmp_path / "corpus"), "2"]) == 0
    assert capsys.readouterr().out != "the document 2 "  # keys come first


def test_show_lists_documents_and_filters_them(corpus: Path, tmp_path: Path, capsys) -> None:
    assert main(["data", "show", str(corpus), "--limit", "100", "--json", str(tmp_path / "all.json")]) == 0
    listed = report(tmp_path / "all.json")["documents"]
    assert sorted(each["path"] for each in listed) == sorted(f"{'ab'[i % 2]}/{i:02d}.txt" for i in range(30))
    assert {each["split"] for each in listed} == {"train", "validation"}
    assert main(["data", "show", str(corpus), "--find", "A/2", "--json", str(tmp_path / "some.json")]) == 0
    assert sorted(each["path"] for each in report(tmp_path / "some.json")["documents"]) == [
        f"a/2{i}.txt" for i in (0, 2, 4, 6, 8)
    ]
    capsys.readouterr()
    assert main(["data", "show", str(corpus), "--limit", "1"]) == 0
    assert capsys.readouterr().out.count("there are more") == 2
    for wrong, said in (
        (["--find", "zzz"], "no document whose path or title holds 'zzz'"),
        (["2", "--find", "a"], "--find and --limit are for lists"),
        (["--tokens", "3"], "--tokens is for one document"),
    ):
        assert main(["data", "show", str(corpus), *wrong]) == 2
        assert said in capsys.readouterr().err


def test_show_refuses_the_wrong_tokenizer(corpus: Path, tokenizer_model: bytes, capsys) -> None:
    (corpus / "tokenizer.model").write_bytes(tokenizer_model)
    assert main(["data", "show", str(corpus), "2"]) == 2
    assert "not the tokenizer that the corpus was made with" in capsys.readouterr().err


def test_unreadable_or_unwritable_file_gives_one_message(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="2"):  # before the work
        main(["data", "verify", str(corpus), "--workers", "1", "--json", str(tmp_path / "file/r.json")])
    assert re.search(r"r\.json cannot be written: \S+/file is not a directory\n", capsys.readouterr().err)
    real = Path.open

    def refuse(self: Path, *args, **kwargs):
        if self.name == "train-000001.tar":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # because root may read everything
    assert main(["data", "verify", str(corpus), "--workers", "1"]) == 1
    assert "train-000001.tar: cannot be read: Permission denied" in capsys.readouterr().out
    for command in (["stats"], ["pack"], ["export", str(tmp_path / "out"), "--format", "parquet"]):
        assert main(["data", command[0], str(corpus), *command[1:], "--workers", "1"]) == 74
        told = capsys.readouterr().err
        assert re.search(rf"bst data {command[0]}: \S+ cannot read or write \S+000001.tar: Permission denied\n", told)


@pytest.mark.parametrize("command", ["verify", "stats", "pack", "export"])
def test_zero_workers_are_refused(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["data", command, "corpus", "--workers", "0"])
    assert "argument --workers: 0 is less than 1" in capsys.readouterr().err


def test_sources_are_listed_and_explained(capsys) -> None:
    assert main(["data", "sources"]) == 0
    listed = capsys.readouterr().out
    for kind in ("stdlib", "folder", "jsonl", "webdataset", "pg19", "arxiv", "github", "books", "latex", "linux"):
        assert f"\n  {kind} " in listed
    assert main(["data", "sources", "arxiv"]) == 0
    assert "comments" in capsys.readouterr().out
    assert main(["data", "sources", "arxv"]) == 2


@pytest.mark.parametrize("command", ["show", "stats", "verify", "export", "pack", "push"])
def test_commands_that_read_directories_name_those_that_read_addresses(command: str, tmp_path: Path, capsys) -> None:
    more = {"export": [str(tmp_path / "out"), "--format", "parquet"], "push": ["s3://b/c"]}.get(command, [])
    with pytest.raises(SystemExit):
        main(["data", command, "s3://bucket/corpus", *more])
    said = " ".join(capsys.readouterr().err.split())
    assert "s3:// is not read here, but by runs, 'bst plan' and 'bst baselines': give a directory" in said


def test_address_of_a_directory_is_read(corpus: Path, capsys) -> None:
    assert main(["data", "verify", f"file://{corpus}"]) == 0
    assert main(["data", "show", f"file://{corpus}"]) == 0
