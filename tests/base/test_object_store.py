"""Files in an object store: what is missing, what fails, and what messages must not show."""

from __future__ import annotations

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bst_base.errors import StorageError, UserError
from bst_base.object_store import ObjectStore


class Refusing(MemoryFileSystem):
    """A store whose client fails and puts the password into its message."""

    protocol, cachable = "refusing", False

    @staticmethod
    def _get_kwargs_from_urls(url: str) -> dict[str, str]:
        return {"password": url.partition("me:")[2].partition("@")[0]}

    def cat_file(self, *_: object, **__: object) -> bytes:
        raise ConnectionError(f"login as me:{self.storage_options['password']} failed")

    info = glob = pipe_file = put_file = get_file = rm_file = rm = cat_file


def test_files_come_back_as_they_were_written(tmp_path):
    store = ObjectStore(f"file://{tmp_path}/there/")
    store.write("a/one", b"1")
    (tmp_path / "local").write_bytes(b"22")
    store.upload(tmp_path / "local", "a/two")
    assert (tmp_path / "there" / "a" / "two").read_bytes() == b"22"
    assert (store.read("a/one"), store.size("a/two"), sorted(store.names("a/*"))) == (b"1", 2, ["a/one", "a/two"])
    store.download("a/two", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"22"
    store.remove("a/one")
    assert (store.read("a/one"), store.size("a/one"), store.names("a/*")) == (None, None, ["a/two"])
    store.remove_below("a")
    assert not (tmp_path / "there" / "a").exists()


@pytest.mark.parametrize(("password", "shown"), [("hunter2", "…"), ("$STORE_PASSWORD", "$STORE_PASSWORD")])
def test_errors_name_the_file_and_hide_the_password(tmp_path, monkeypatch, password, shown):
    monkeypatch.setenv("STORE_PASSWORD", "hunter2")
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    store = ObjectStore(f"refusing://me:{password}@host/x")
    for work in (
        lambda: store.read("a"),
        lambda: store.size("a"),
        lambda: store.names("a"),
        lambda: store.write("a", b""),
        lambda: store.upload(tmp_path, "a"),
        lambda: store.download("a", tmp_path),
        lambda: store.remove("a"),
        lambda: store.remove_below("a"),
    ):
        with pytest.raises(StorageError) as told:
            work()
        assert str(told.value).startswith(f"refusing://me:{shown}@host/x/a: cannot ")
        assert str(told.value).endswith(f"ConnectionError: login as me:{shown} failed")


def test_what_is_no_address_of_a_known_store_is_refused():
    with pytest.raises(UserError, match="/tmp/x: not an address of an object store"):
        ObjectStore("/tmp/x")
    with pytest.raises(UserError, match="nosuch://me:…@x: Protocol not known"):
        ObjectStore("nosuch://me:hunter2@x")


@pytest.mark.parametrize("name", ["run[1]", "run*", "what?", "a::b"])
def test_addresses_that_fsspec_would_not_take_literally_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"which fsspec takes for .*: choose another address"):
        ObjectStore(f"file://{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["a b", "a:b", "50%", "x#y", "{a,b}", "~a"])
def test_other_characters_are_parts_of_an_address(tmp_path, name):
    store = ObjectStore(f"file://{tmp_path}/{name}")
    store.write("steps/1/one", b"1")
    assert (tmp_path / name / "steps" / "1" / "one").read_bytes() == b"1"
    assert store.names("steps/*/one") == ["steps/1/one"]
    store.remove_below("steps/1")
    assert store.names("steps/*/one") == []
