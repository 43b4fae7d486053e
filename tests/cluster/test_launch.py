"""`bst launch` on several hosts, as a user starts it."""

from __future__ import annotations

import pytest

from bst_dist.train.rundir import read_outcome

pytestmark = pytest.mark.cluster


def test_a_run_over_three_hosts_ends_with_status_0(launch, recipe, tmp_path, network):
    started = launch(str(recipe(6)), "--run-dir", str(tmp_path / "run"))
    assert started.status() == 0, started.said
    print(started.said)
    assert read_outcome(tmp_path / "run")["step"] == 6
    for host in network.hosts:
        assert f"{host}  1 slot" in started.said
        assert not network.ranks(host)
