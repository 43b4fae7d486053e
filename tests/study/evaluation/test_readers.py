"""The processes that share one evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from torch import distributed

from bst_base.errors import UserError
from bst_base.host import free_port
from bst_dist.study.evaluation.readers import joined


@pytest.fixture
def launched(monkeypatch):
    """This process as the only one that a launcher has started."""
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


def test_the_process_group_is_left_at_the_end(launched):
    """Else the process aborts now and then: a thread of gloo frees a tensor while the interpreter ends."""
    with joined() as readers:
        assert distributed.is_initialized()
        assert readers.sums(np.array([3, 4]))[0].tolist() == [3, 4]
    assert not distributed.is_initialized()


def test_the_process_group_is_left_after_an_error(launched):
    with pytest.raises(UserError), joined():
        raise UserError("no such checkpoint")
    assert not distributed.is_initialized()
