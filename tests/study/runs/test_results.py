"""The text about the runs behind a table."""

from bst_dist.study.runs.results import trained_with


def test_runs_of_one_version_have_it_named_once():
    assert trained_with([{"torch": "2.13.0", "commit": "abc"}] * 3) == "Trained with torch 2.13.0, commit abc."


def test_runs_of_several_versions_are_counted_and_warned_of():
    """Once, initial values had changed between the runs of one table, and the page did not show it."""
    versions = [{"torch": "2.13.0", "commit": "abc"}] * 2 + [{"torch": "2.13.0", "commit": "def"}, {"torch": "2.13.0"}]
    assert trained_with(versions) == (
        "Trained with torch 2.13.0, commit abc (2 runs) and def (1 run) and unknown (1 run). Not all runs were trained "
        "with the same commit: what changed between these is in the differences too."
    )


def test_runs_that_are_not_trained_yet_are_none_of_another_version():
    assert trained_with([{"torch": "2.13.0"}, {}]) == "Trained with torch 2.13.0."
    assert trained_with([{}]) == trained_with([]) == ""
