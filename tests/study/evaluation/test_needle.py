"""Pass keys in text: a reader that copies finds all of them, a reader that guesses finds none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bst_base.errors import UserError
from bst_dist.cli import main
from bst_dist.study.evaluation.needle import DEPTHS, QUESTION, Texts, batches, read
from data_pipeline.serve.reader import Corpus


class Reader:
    """Stub of a model that predicts the next token of each row by a function of all tokens read."""

    config = SimpleNamespace(block=8)

    def __init__(self, guess):
        self.guess = guess

    def parameters(self):
        yield torch.zeros(1)

    def carry(self, state, position):
        return SimpleNamespace(state=state, position=position, after=None)

    def __call__(self, ids, labels, counts, past):
        before = past.state.get("read", torch.zeros(len(ids), 0, dtype=torch.long))
        assert before.shape[1] == past.position
        read = torch.cat([before, ids], 1)
        past.after = {"read": read}
        guesses = torch.tensor(
            [[self.guess(row[: past.position + at + 1].tolist()) for at in range(ids.shape[1])] for row in read]
        )
        return SimpleNamespace(correct=guesses == labels, per_token=torch.where(guesses == labels, 0.0, 1.0))


def copies(read: list[int]) -> int:
    """Return the token that followed the longest earlier match of the latest tokens; of equal matches, the last."""
    best, following = 0, -1
    for end in range(1, len(read)):
        same = 0
        while same < end and read[end - 1 - same] == read[-1 - same]:
            same += 1
        if same and same >= best:
            best, following = same, read[end]
    return following


@pytest.fixture
def maker(corpus):
    opened = Corpus.open(str(corpus), "validation")
    return Texts([opened], opened.tokenizer())


@pytest.mark.parametrize("begin", [3, None])
def test_copying_reader_finds_only_keys_that_are_present(maker, begin):
    for depth in DEPTHS:
        rows = [maker.row(number, 160, depth) for number in range(3)]
        place = read(Reader(copies), rows, begin, 64, "fp32", depth)
        assert (place.keys.value, place.tokens.value, place.loss.value) == (1.0, 1.0, 0.0)
        assert read(Reader(lambda read: -1), rows, begin, 64, "fp32", depth).tokens.value == 0.0
    rows = [maker.row(number, 160, None) for number in range(3)]
    without = read(Reader(copies), rows, begin, 64, "fp32", None)
    assert (without.keys.value, without.distance) == (0.0, 0.0)


def test_rows_contain_the_key_at_the_stated_distance(maker):
    keys = set()
    for number in range(4):
        distances = []
        for depth in DEPTHS:
            row = maker.row(number, 200, depth)
            assert len(row.tokens) == 200
            asked = row.tokens[row.first :]
            there = row.first - row.distance
            text = maker.tokenizer.decode(row.tokens)
            key = text[-5:]
            assert text.endswith(QUESTION.format(key=key))
            assert text.count(f"The pass key is {key}") == 2
            assert maker.tokenizer.decode(row.tokens[there:]).lstrip().startswith(key)
            assert maker.tokenizer.decode(asked).strip() == key
            distances.append(row.distance)
        keys.add(key)
        assert distances == sorted(distances, reverse=True)
        assert maker.tokenizer.decode(maker.row(number, 200, None).tokens).count("The pass key is") == 1
    assert len(keys) == 4
    with pytest.raises(UserError, match="--needle 16: the sentence and the question alone have"):
        maker.row(0, 16, 0.5)


def test_only_tokens_of_the_key_are_scored(maker):
    rows = [maker.row(number, 100, 0.5) for number in range(2)]
    for begin in (7, None):
        (batch,) = batches(rows, begin, 8)
        for place, row in enumerate(rows):
            assert batch.labels[place][batch.loss_mask[place]].tolist() == row.tokens[row.first :].tolist()
            inputs = batch.input_ids[place][: np.flatnonzero(batch.loss_mask[place])[0] + 1]
            assert inputs.tolist() == [*([] if begin is None else [begin]), *row.tokens[: row.first].tolist()]


def test_needle_command_reports_every_place_and_untrained_model_finds_none(make_run, tmp_path, capsys):
    run_dir, path = make_run(), tmp_path / "report.json"
    assert main(["eval", str(run_dir), "--needle", "96,128", "--rows", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [(p["length_tokens"], p["depth"]) for p in report["places"]] == [
        (length, depth) for length in (96, 128) for depth in (*DEPTHS, None)
    ]
    assert all(place["keys"] == 0 for place in report["places"])
    assert "pass keys in validation text" in capsys.readouterr().out
    assert json.loads((run_dir / "reports" / "eval-4-validation-needle.json").read_text())["places"] == report["places"]
    assert main(["eval", str(run_dir), "--needle", "96", "--context", "8"]) == 2
