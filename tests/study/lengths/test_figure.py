from __future__ import annotations

import json

import numpy as np
import pytest

from bst_dist.cli import main
from bst_dist.study.evaluation.trained import open_run
from bst_dist.study.lengths.figure import draw
from bst_dist.study.lengths.measure import measure
from data_pipeline.serve.reader import Corpus


@pytest.fixture
def found(make_run, corpus):
    return measure(open_run(make_run()), Corpus.open(str(corpus), "validation"), [8, 32, 128])


def test_both_losses_are_drawn_by_position_and_by_length(found):
    by_position, by_length, more_by_position, more_by_length = draw({"corpus": found}, 32).axes
    for axes, of in ((by_position, "nats_per_token"), (more_by_position, "versus_trained")):
        for line, each in zip(axes.lines, found, strict=False):
            where = [np.sqrt(at.first * at.last) for at in each.positions]
            np.testing.assert_allclose(line.get_xydata()[:, 0], where)
            np.testing.assert_allclose(line.get_ydata(), [getattr(at, of).value for at in each.positions])
    for axes, of in ((by_length, "nats_per_token"), (more_by_length, "versus_trained")):
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), [8, 32, 128])
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [getattr(each, of).value for each in found])
        assert len(axes.containers) == 3
    assert [text.get_text() for text in by_position.get_legend().get_texts()] == ["8", "32", "128"]


def test_differences_are_not_drawn_without_the_trained_length(make_run, corpus):
    found = measure(open_run(make_run()), Corpus.open(str(corpus), "validation"), [8, 128])
    *_, more_by_length = draw({"corpus": found}, 32).axes
    assert not more_by_length.containers


def test_each_corpus_of_a_mixture_has_its_own_axes(found):
    assert len(draw({"one": found, "other": found}, 32).axes) == 8


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_file_is_written_in_the_format_asked_for(make_run, tmp_path, suffix):
    out = tmp_path / f"lengths.{suffix}"
    assert main(["eval", str(make_run()), "--lengths", "16", "--plot", str(out)]) == 0
    assert out.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")


def test_a_figure_that_cannot_be_written_loses_no_number(make_run, tmp_path, no_room_for_figures, capsys):
    run_dir, report = make_run(), tmp_path / "report.json"
    words = ["--lengths", "16", "--plot", str(tmp_path / "lengths.png"), "--json", str(report)]
    assert main(["eval", str(run_dir), *words]) == 74
    assert "lengths.png: No space left on device" in capsys.readouterr().err
    (kept,) = (run_dir / "reports").iterdir()
    for path in (report, kept):
        assert json.loads(path.read_text())["corpora"][0]["lengths"][0]["loss_nats_per_token"] > 0
