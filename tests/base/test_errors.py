from __future__ import annotations

import errno
import socket

import pytest

from bst_base.errors import StorageError, nearest
from bst_base.files import path_in_errors

HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("error", "path", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "there"), None, "cannot read there: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), None, "cannot read a file: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), "here", "cannot read here: No space left on device"),
        (OSError("no such luck"), None, "cannot read a file: no such luck"),
        (OSError(), None, "cannot read a file: OSError()"),
    ],
)
def test_a_storage_error_names_host_file_and_reason_if_they_are_known(error, path, message):
    assert str(StorageError.of(error, path)) == f"{HOST} {message}"


def test_an_error_gets_a_path_unless_it_has_one():
    for error, filename in ((OSError(errno.EIO, "Input/output error"), "own"), (OSError(errno.EIO, "", "a"), "a")):
        with pytest.raises(OSError) as told, path_in_errors("own"):
            raise error
        assert told.value.filename == filename
    with pytest.raises(OSError, match=r"^no such luck$"), path_in_errors("own"):
        raise OSError("no such luck")


def test_the_nearest_name_is_the_most_similar_known_one():
    known = ["sequences", "sequence_length", "steps"]
    assert nearest("sequnces", known) == "sequences"
    assert nearest("corpus", known) is None
    assert nearest("sequence_len", known, cutoff=0.99) is None
