"""Atomic writes of files and directories, and the error message when the disk is full."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from bst_base.errors import StorageError
from bst_base.files import atomic_directory, atomic_file, remove_partials, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_write_creates_folders_and_complete_files(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    write_text(path, "café")
    assert path.read_bytes() == "café".encode()
    write_json(path, {"x": 1})
    assert path.read_text() == '{\n  "x": 1\n}\n'
    assert names(tmp_path) == ["a", "b", "file.json"]


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_atomic_directory_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(ValueError), atomic_directory(tmp_path / "folder") as partial:
        (partial / "a").write_text("a")
        raise ValueError
    assert names(tmp_path) == []
    with atomic_directory(tmp_path / "folder") as partial:
        (partial / "a").write_text("a")
        (partial / "sub").mkdir()
        assert not (tmp_path / "folder").exists()
    assert names(tmp_path) == ["a", "folder", "sub"]
    with atomic_directory(tmp_path / "folder") as late:  # another writer was first: its directory stays
        (late / "b").write_text("b")
    assert names(tmp_path) == ["a", "folder", "sub"]


def test_failed_rename_of_a_directory_is_an_error(tmp_path):
    (tmp_path / "folder").write_text("a file is there")
    with pytest.raises(NotADirectoryError), atomic_directory(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder").read_text() == "a file is there"
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up")]
)
def test_full_disk_error_names_the_file(tmp_path, number, said):
    with pytest.raises(StorageError) as told, atomic_file(tmp_path / "file"):
        raise OSError(number, "as the system says it")
    assert str(told.value).startswith(f"{tmp_path / 'file'}: {said}; nothing half-written was kept")
    assert names(tmp_path) == []


def test_other_system_errors_keep_their_type(tmp_path):
    with pytest.raises(PermissionError), atomic_file(tmp_path / "file"):
        raise OSError(errno.EACCES, "no")


def test_only_partial_files_of_atomic_writers_are_removed(tmp_path):
    for name in ("a.0123abcd.partial", "deep/b.00000000.partial", "other.partial", "c.0123abcd.partial.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    left = tmp_path / "d.0123abcd.partial"
    (left / "inside").mkdir(parents=True)
    (left / "inside" / "e.0123abcd.partial").write_text("x")
    remove_partials(tmp_path)
    assert names(tmp_path) == ["c.0123abcd.partial.txt", "deep", "other.partial"]
