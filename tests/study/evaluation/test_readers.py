"""Processes that share one evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from torch import distributed

from bst_base.errors import UserError
from bst_base.host import free_port
from bst_dist.study.evaluation.readers import joined


@pytest.fixture
def launched(monkeypatch):
    """Set the environment of a process that is the only one started by a launcher."""
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


def test_process_group_is_destroyed_at_the_end(launched):
    """Otherwise the process sometimes aborts, because a gloo thread frees a tensor while the interpreter exits."""
    with joined() as readers:
        assert distributed.is_initialized()
        assert readers.sums(np.array([3, 4]))[0].tolist() == [3, 4]
    assert not distributed.is_initialized()


def test_process_group_is_destroyed_after_an_error(launched):
    with pytest.raises(UserError), joined():
        raise UserError("no such checkpoint")
    assert not distributed.is_initialized()
