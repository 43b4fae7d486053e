"""The garbage collector does not run during an import, and ignores the imported objects afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from bst_base.importing import uncollected


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thawed():
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


def test_objects_made_during_an_import_are_kept_and_later_ones_collected():
    with uncollected():
        assert not gc.isenabled()
        within = weakref.ref(Cycle())
    assert gc.isenabled()
    after = weakref.ref(Cycle())
    gc.collect()
    assert within() is not None
    assert after() is None


def test_objects_made_between_two_imports_are_collected():
    with uncollected():
        pass
    later = weakref.ref(Cycle())
    with uncollected():
        pass
    gc.collect()
    assert later() is None


def test_garbage_collector_is_enabled_again_only_after_the_outermost_use():
    with uncollected():
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_garbage_collector_is_enabled_again_after_a_failed_import():
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
