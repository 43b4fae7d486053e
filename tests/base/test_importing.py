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


def test_what_is_made_within_stays_and_what_is_made_after_it_is_collected():
    with uncollected():
        assert not gc.isenabled()
        within = weakref.ref(Cycle())
    assert gc.isenabled()
    after = weakref.ref(Cycle())
    gc.collect()
    assert within() is not None
    assert after() is None


def test_only_what_is_there_the_first_time_stays():
    with uncollected():
        pass
    later = weakref.ref(Cycle())
    with uncollected():
        pass
    gc.collect()
    assert later() is None


def test_within_another_the_outer_one_decides():
    with uncollected():
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_collects_again_after_an_import_that_fails():
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
