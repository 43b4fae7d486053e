from __future__ import annotations

import pytest

from bst_dist.cli import main


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--lengths", "8", "--harness", "x"], "--lengths and --harness are two evaluations"),
        (["--plot", "x.png"], "--plot does not belong to this evaluation but to --lengths"),
        (["--lengths", "8", "--context", "8"], "--context does not belong to this evaluation but to whole documents"),
        (["--harness", "x", "--tokens", "9"], "--tokens does not belong to this evaluation but to --lengths"),
        (["--harness-tasks", "x"], "--harness-tasks does not belong to this evaluation but to --harness"),
    ],
)
def test_options_of_another_evaluation_are_refused(make_run, capsys, options, reason):
    assert main(["eval", str(make_run()), *options]) == 2
    assert reason in capsys.readouterr().err


def test_what_is_no_list_of_lengths_is_refused(make_run, capsys):
    with pytest.raises(SystemExit):
        main(["eval", str(make_run()), "--lengths", "8,x"])
    assert "'8,x' is not a list of lengths like 512,4096" in capsys.readouterr().err
