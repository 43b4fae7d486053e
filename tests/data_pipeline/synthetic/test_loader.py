"""The batches of a synthetic task: a pure function of the step, the same over any ranks and slices."""

from __future__ import annotations

import numpy as np
import pytest

from bst_base.errors import UserError
from bst_base.settings import parse
from data_pipeline.serve.share import Share
from data_pipeline.serve.slices import slices_of
from data_pipeline.serve.spread import MASKED
from data_pipeline.synthetic.config import SyntheticConfig
from data_pipeline.synthetic.loader import SyntheticLoader


def loader(**changes) -> SyntheticLoader:
    task = {"task": "associative-recall", "pairs": 3, "keys": 8, "symbols": 8, "span": 20} | changes.pop("task", {})
    config = parse(SyntheticConfig, {"synthetic": task, "prefetch": changes.pop("prefetch", 0)})
    others = {name: changes.pop(name) for name in ("split", "seed", "start_step", "row_tokens") if name in changes}
    share = Share(**{"length": 64, "rows": 8, "micro_rows": 2, **changes})
    return SyntheticLoader(config, share=share, **{"split": "train", "seed": 1, **others})


def joined(batches, name: str) -> np.ndarray:
    """Return a field of all rows except masked ones; assert that masked rows have no unmasked label."""
    assert not any(batch.loss_mask[batch.rows == MASKED].any() for batch in batches)
    return np.concatenate([getattr(batch, name)[batch.rows != MASKED] for batch in batches])


@pytest.mark.parametrize(("dp", "sp"), [(2, 1), (1, 2), (2, 4), (3, 2), (9, 1)])
def test_global_batch_does_not_depend_on_ranks_or_slices(dp, sp):
    for name in ("input_ids", "labels", "loss_mask", "distance"):
        whole = joined(loader().batches(7), name)
        parts = [
            np.concatenate([joined(loader(dp_rank=d, dp=dp, sp_rank=s, sp=sp).batches(7), name) for d in range(dp)])
            for s in range(sp)
        ]
        assert (np.concatenate(parts, axis=1) == whole).all()


def test_changed_batch_size_continues_with_the_next_row():
    state = loader(rows=8).state_dict(3)  # 24 rows are read
    resumed = loader(rows=5)
    resumed.load_state_dict(state)
    singles = [loader(rows=1).batches(24 + row) for row in range(10)]
    for late in (0, 1):
        expected = np.concatenate([joined(single, "input_ids") for single in singles[5 * late : 5 * late + 5]])
        assert (joined(resumed.batches(3 + late), "input_ids") == expected).all()
    other = loader(rows=8)
    other.load_state_dict(resumed.state_dict(4))
    assert (joined(other.batches(4), "input_ids")[0] == joined(singles[5], "input_ids")[0]).all()
    with pytest.raises(UserError, match="each streaming row reads its own part"):
        loader(rows=5, row_tokens=128).load_state_dict(loader(rows=8, row_tokens=128).state_dict(3))


def test_labels_are_next_tokens_and_are_masked_without_a_distance():
    for batch in loader().batches(0):
        assert (batch.labels[:, :-1] == batch.input_ids[:, 1:]).all()
        assert (batch.loss_mask == (batch.distance > 0)).all()
        assert batch.loss_mask.any()


def test_iteration_from_a_later_step_equals_the_whole_iteration():
    every = loader(prefetch=2)
    late = loader(start_step=3)
    try:
        whole = [batches for _, batches in zip(range(5), every, strict=False)]
        for (step, batches), (at, expected) in zip(late, whole[3:], strict=False):
            assert step == at
            assert (joined(batches, "input_ids") == joined(expected, "input_ids")).all()
            if step == 4:
                break
    finally:
        every.close()
        late.close()


def test_rows_are_unique_across_steps_seeds_and_splits():
    rows = [
        row.tobytes()
        for which in ({}, {"seed": 2}, {"split": "validation"})
        for step in range(20)
        for row in joined(loader(**which).batches(step), "input_ids")
    ]
    assert len(set(rows)) == len(rows) == 480


def test_micro_batches_do_not_change_the_rows():
    one, two = (joined(loader(micro_rows=size).batches(3), "input_ids") for size in (1, 4))
    assert (one == two).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 2}, "seed: 1 then, 2 now"), ({"task": {"pairs": 2}}, "task: "), ({"length": 32}, "length: 64 then, 32")],
)
def test_checkpoint_of_another_series_is_refused(changes, message):
    state = loader().state_dict(4)
    loader().load_state_dict(state)
    with pytest.raises(UserError, match=message):
        loader(**changes).load_state_dict(state)


def test_row_is_continued_over_several_steps():
    """Rows of 64 read over four steps equal rows of 64 read at once, with labels that cross sequences."""
    for series in (0, 3):
        pieces = [loader(length=16, row_tokens=64).batches(4 * series + piece) for piece in range(4)]
        for name in ("input_ids", "labels", "loss_mask", "distance"):
            found = np.concatenate([joined(batches, name) for batches in pieces], axis=1)
            assert (found == joined(loader().batches(series), name)).all()
        assert [joined(batches, "continues").tolist() for batches in pieces] == [[p > 0] * 8 for p in range(4)]


def test_checkpoint_with_other_steps_per_row_is_refused():
    with pytest.raises(UserError, match="row_steps: 2 then, 4 now"):
        loader(length=16, row_tokens=64).load_state_dict(loader(length=16, row_tokens=32).state_dict(4))


@pytest.mark.parametrize("sp", [1, 2])
def test_concatenated_slices_equal_the_row(sp):
    whole = loader().batches(7)
    ranks = [loader(slice_tokens=16, sp_rank=rank, sp=sp).batches(7) for rank in range(sp)]
    for index, batch in enumerate(whole):
        parts = [rank[index][s] for s in range(4) for rank in ranks]
        assert [part.begin for part in parts] == list(range(0, 64, 16 // sp))
        for name in ("input_ids", "labels", "loss_mask", "distance"):
            found = np.concatenate([getattr(part, name) for part in parts], axis=1)
            assert (found == getattr(batch, name)).all()


@pytest.mark.parametrize("changes", [{}, {"slice_tokens": 16}, {"sp": 2}])
def test_arrays_of_a_batch_are_contiguous(changes):
    for found in loader(**changes).batches(0):
        for part in slices_of(found):
            for name in ("input_ids", "labels", "loss_mask", "distance"):
                assert getattr(part, name).flags.c_contiguous, name
