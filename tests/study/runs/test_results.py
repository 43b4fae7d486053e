"""The text about the runs behind a table."""

from bst_dist.study.runs.results import trained_with


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
