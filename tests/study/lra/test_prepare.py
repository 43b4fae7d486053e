"""Preparing a task: the same examples with any number of workers, no duplicates, and damage is detected."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bst_base.errors import UserError
from bst_dist.cli import main
from bst_dist.study.lra.examples import ExamplesError, open_split, read_manifest
from bst_dist.study.lra.listops import ListOpsConfig, example
from bst_dist.study.lra.prepare import prepare
from bst_dist.study.lra.tasks import SPLITS, TASKS
from data_pipeline.prepare.parallel import open_workers

# There are so few short expressions that some are drawn twice.
FEW = ListOpsConfig(train=200, validation=40, test=40, max_depth=2, max_args=2, min_length=4, max_length=4)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    directory = tmp_path_factory.mktemp("few") / "listops"
    with open_workers(1) as workers:
        prepare(FEW, directory, workers, lambda *_: None)
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_examples_do_not_depend_on_the_workers(few, tmp_path):
    with open_workers(2) as workers:
        prepare(FEW, tmp_path / "again", workers, lambda *_: None)
    assert contents(tmp_path / "again") == contents(few)


def test_no_example_occurs_twice_in_any_split(few):
    drawn = [example(FEW, split, index)[0][0].tobytes() for split in SPLITS for index in range(getattr(FEW, split))]
    assert len(set(drawn)) < len(drawn)  # so there were duplicates to avoid
    splits = [open_split(few, split, TASKS["listops"]) for split in SPLITS]
    kept = [split.sequences(index)[0].tobytes() for split in splits for index in range(len(split))]
    assert len(set(kept)) == len(kept) == 280


def test_stored_examples_equal_the_drawn_ones(listops):
    manifest, _ = read_manifest(listops)
    config = ListOpsConfig(**manifest["settings"])
    for split in SPLITS:
        opened = open_split(listops, split, TASKS["listops"])
        assert manifest["splits"][split]["class_counts"] == np.bincount(opened.classes, minlength=10).tolist()
        assert opened.longest == manifest["splits"][split]["longest"] <= 32
        same = [
            np.array_equal(opened.sequences(index)[0], example(config, split, index)[0][0])
            for index in range(len(opened))
        ]
        assert sum(same) >= 0.9 * len(same)  # all except those that were drawn again


def test_requesting_more_unique_examples_than_exist_is_an_error(tmp_path):
    config = FEW.model_copy(update={"train": 1000})
    with open_workers(1) as workers, pytest.raises(UserError, match="were duplicates: ask for fewer"):
        prepare(config, tmp_path / "listops", workers, lambda *_: None)
    assert not list(tmp_path.iterdir())  # no incomplete files remain


def test_damaged_missing_and_foreign_examples_are_refused(tmp_path, listops):
    with pytest.raises(ExamplesError, match=r"no prepared examples .* make them with 'bst lra prepare'"):
        open_split(tmp_path, "train", TASKS["listops"])
    with pytest.raises(ExamplesError, match="examples of listops, not of image"):
        open_split(listops, "train", TASKS["image"])
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(listops).items():
        (copy / name).write_bytes(content)
    symbols = copy / "train.symbols"
    symbols.write_bytes(symbols.read_bytes()[:-5])
    with pytest.raises(ExamplesError, match=r"the manifest says .* prepare the task again"):
        open_split(copy, "train", TASKS["listops"])
    symbols.unlink()
    with pytest.raises(ExamplesError, match="cannot be read"):
        open_split(copy, "train", TASKS["listops"])
    (copy / "manifest.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(ExamplesError, match="not the manifest of a Long Range Arena task"):
        open_split(copy, "train", TASKS["listops"])


def test_command_prepares_pairs_of_sequences(tmp_path, capsys):
    for name in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_bytes(b"1.0\tA\tB\tfirst text\tsecond\n0.0\tA\tC\tx\tyy\n")
    report = tmp_path / "report.json"
    to = tmp_path / "pairs"
    arguments = ["retrieval", f"source={tmp_path}", "--to", str(to), "--workers", "1", "--json", str(report)]
    assert main(["lra", "prepare", *arguments]) == 0
    opened = open_split(to, "validation", TASKS["retrieval"])
    assert [[s.tobytes() for s in opened.sequences(i)] for i in range(2)] == [[b"first text", b"second"], [b"x", b"yy"]]
    assert opened.classes.tolist() == [1, 0]
    assert json.loads(report.read_text())["splits"]["test"]["class_counts"] == [1, 1]
    assert main(["lra", "prepare", *arguments]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lisops"], "unknown task 'lisops'; the tasks are listops, text, retrieval, image, pathfinder"),
        (["listops", "max_dept=3"], "unknown key 'max_dept': did you mean 'max_depth'?"),
        (["listops", "min_length=9", "max_length=5"], "min_length 9 is more than max_length 5"),
        (["text"], "key 'source' is required and missing"),
        (["text", "source=[x"], "override 'source=[x': the value is not YAML"),
        (["text", "source"], "override 'source': expected setting=value"),
    ],
)
def test_invalid_arguments_give_one_message(arguments, message, capsys):
    assert main(["lra", "prepare", *arguments]) == 2
    assert message in capsys.readouterr().err
