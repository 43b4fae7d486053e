"""The times of a run, and the text about the runs behind a table."""

import json

import pytest

from bst_dist.study.runs.results import read_result, trained_with


@pytest.fixture
def run(tmp_path):
    """Makes a run directory; each start is (from_step, step times in seconds)."""

    def make(*starts):
        lines = [
            {"kind": "train", "step": begin + n, "step_time_s": s}
            for begin, seconds in starts
            for n, s in enumerate(seconds, 1)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "environment.json").write_text(json.dumps({"starts": [{"from_step": n} for n, _ in starts]}))
        return read_result(tmp_path)

    return make


def test_time_does_not_include_the_compilation_of_any_start(run):
    """Once, a comparison at equal time showed the time to compile: 56 of 68 s were the first step."""
    ordinary = 8 * [1.0]
    result = run((0, [100.0, 50.0, *ordinary]), (10, [100.0, 3.0, *ordinary]), (20, [100.0, 3.0, *ordinary]))
    assert result.step_times == 30 * [1.0]
    assert result.time_s() == 30


def test_warm_up_steps_count_as_long_as_the_median_step_of_their_start(run):
    """The second start ran on a machine half as fast."""
    result = run((0, [90.0, 80.0, 1.0, 2.0, 1.0]), (5, [70.0, 60.0, 2.0, 2.0, 4.0]))
    assert result.step_times == [1, 1, 1, 2, 1, 2, 2, 2, 2, 4]
    assert result.until(4).step_times == [1.5, 1.5, 1, 2]
    assert [line["step"] for line in result.warm] == [3, 4, 5, 8, 9, 10]


def test_a_start_of_warm_up_steps_alone_counts_the_median_step_of_the_run(run):
    assert run((0, [90.0, 80.0, 1.0, 3.0, 1.0]), (5, [70.0])).step_times == [1, 1, 1, 3, 1, 1]


def test_a_run_of_warm_up_steps_alone_has_no_other_time(run):
    assert run((0, [4.0, 2.0])).time_s() == 6
    assert run((0, [])).time_s() == 0


def test_common_version_of_all_runs_is_named_once():
    assert trained_with([{"torch": "2.13.0", "commit": "abc"}] * 3) == "Trained with torch 2.13.0, commit abc."


def test_runs_of_several_versions_are_counted_with_a_warning():
    """Once, initial values had changed between the runs of one table, and the page did not show it."""
    versions = [{"torch": "2.13.0", "commit": "abc"}] * 2 + [{"torch": "2.13.0", "commit": "def"}, {"torch": "2.13.0"}]
    assert trained_with(versions) == (
        "Trained with torch 2.13.0, commit abc (2 runs) and def (1 run) and unknown (1 run). Not all runs were trained "
        "with the same commit: what changed between these is in the differences too."
    )


def test_untrained_runs_do_not_count_as_another_version():
    assert trained_with([{"torch": "2.13.0"}, {}]) == "Trained with torch 2.13.0."
    assert trained_with([{}]) == trained_with([]) == ""
