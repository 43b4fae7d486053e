from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bst_dist.cli import main
from bst_dist.study.comparison.curves import SMALL, draw, read_runs
from bst_dist.study.runs.results import Result


def line(step, **changes):
    keys = ("bits_per_byte", "gradient_norm", "learning_rate", "tokens_per_s")
    return {"kind": "train", "step": step, "tokens": 100 * step, **dict.fromkeys(keys, float(step)), **changes}


def test_every_step_and_evaluation_is_drawn_at_the_tokens_seen():
    lines = [line(step) for step in range(1, 6)]
    lines.append({"kind": "eval", "split": "validation", "step": 4, "tokens": 9, "bits_per_byte": 2.5})
    loss, *small = draw({"run": Result(Path(), lines)}).axes
    steps, _, evaluations = loss.lines
    np.testing.assert_array_equal(steps.get_xydata(), [[100 * s, s] for s in range(1, 6)])
    np.testing.assert_array_equal(evaluations.get_xydata(), [[400, 2.5]])
    assert [axes.get_title() for axes in small] == list(SMALL.values())


def test_smoothing_keeps_a_straight_line_straight():
    loss = draw({"run": Result(Path(), [line(step) for step in range(1, 301)])}).axes[0]
    tokens, values = loss.lines[1].get_data()
    np.testing.assert_allclose(values, tokens / 100)
    assert len(tokens) == 300 - 6


def test_each_run_has_its_own_colour_and_line_style():
    runs = {f"run{i}": Result(Path(), [line(1), line(2)]) for i in range(9)}
    legend = draw(runs).axes[0].get_legend()
    looks = {(handle.get_color(), handle.get_linestyle()) for handle in legend.legend_handles[:9]}
    assert len(looks) == 9
    assert [text.get_text() for text in legend.get_texts()] == [*runs, "training", "validation"]


def test_runs_with_equal_names_get_longer_names(make_run):
    one, other = make_run("a/run"), make_run("b/run")
    assert list(read_runs([one, other])) == ["a/run", "b/run"]
    assert list(read_runs([one])) == ["run"]


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_a_file_is_written_in_the_format_asked_for(make_run, tmp_path, suffix):
    out = tmp_path / "deep" / f"curves.{suffix}"
    assert main(["plot", str(make_run("one")), str(make_run("other")), "--out", str(out)]) == 0
    assert out.read_bytes()[:4] in (b"\x89PNG", b"%PDF")


def test_runs_without_metrics_and_unknown_formats_are_refused(make_run, tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["plot", str(make_run()), "--out", "x.docx"])
    assert "must be one of .png" in capsys.readouterr().err
