"""Locks between processes, also on file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from bst_base.locks import NoLocksError, flock


def test_a_lock_has_one_holder_at_a_time(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert flock(first, path)
        assert not flock(second, path)
        first.close()
        assert flock(second, path, wait=True)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_with_the_remedy(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "lock").open("w") as file, pytest.raises(NoLocksError, match=r"Lustre: -o flock") as caught:
        flock(file, tmp_path / "lock")
    assert str(caught.value).startswith(f"{tmp_path}/lock: cannot be locked")
