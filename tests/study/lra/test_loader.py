"""The order of examples: every pass is a permutation, and the global batch does not depend on the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from bst_base.errors import UserError
from bst_dist.study.lra.examples import Examples, open_split
from bst_dist.study.lra.loader import LabelledLoader, LengthError
from bst_dist.study.lra.tasks import TASKS
from data_pipeline.serve.share import Share
from data_pipeline.serve.spread import MASKED


def loader(examples: Examples, **changes) -> LabelledLoader:
    others = {name: changes.pop(name) for name in ("seed", "start_step") if name in changes}
    share = Share(**{"length": 32, "rows": 8, "micro_rows": 2, **changes})
    return LabelledLoader(examples, share, **{"seed": 1, **others})


@pytest.fixture
def examples(listops) -> Examples:
    return open_split(listops, "train", TASKS["listops"])


def rows(batches) -> list[tuple[bytes, int]]:
    assert not any(batch.loss_mask[batch.rows == MASKED].any() for batch in batches)
    return [
        (ids.tobytes(), int(label))
        for batch in batches
        for row, ids, label in zip(batch.rows, batch.input_ids, batch.labels, strict=True)
        if row != MASKED
    ]


def test_each_pass_contains_every_example_once_in_another_order(examples):
    served = [row for step in range(15) for row in rows(loader(examples).batches(step))]  # 120 rows: two passes of 60
    assert len(set(served)) == 60
    assert sorted(served[:60]) == sorted(served[60:])
    assert served[:60] != served[60:]
    assert served != [row for step in range(15) for row in rows(loader(examples, seed=2).batches(step))]


def test_rows_are_examples_padded_at_the_end(examples):
    (batch, *_) = loader(examples, seed=None).batches(0)
    for row in range(2):
        (symbols,) = examples.sequences(row)
        assert batch.input_ids[row].tolist() == [int(s) + 1 for s in symbols] + [0] * (32 - len(symbols))
        assert batch.labels[row] == examples.classes[row]
    assert batch.loss_mask.all()


@pytest.mark.parametrize("world", [2, 3, 4, 9])
def test_ranks_divide_the_global_batch_in_order(examples, world):
    for step in (0, 9):
        whole = rows(loader(examples).batches(step))
        shared = [rows(loader(examples, dp_rank=rank, dp=world).batches(step)) for rank in range(world)]
        assert [row for part in shared for row in part] == whole


def test_changed_batch_size_continues_with_the_next_example(examples):
    resumed = loader(examples, rows=5)
    resumed.load_state_dict(loader(examples).state_dict(3))  # 24 rows are read
    single = [row for step in range(24, 29) for row in rows(loader(examples, rows=1).batches(step))]
    assert rows(resumed.batches(3)) == single


def test_iteration_starts_at_the_given_step(examples):
    served = iter(loader(examples, start_step=5))
    for expected in (5, 6):
        step, batches = next(served)
        assert step == expected
        assert rows(batches) == rows(loader(examples).batches(expected))


def test_last_batch_of_one_pass_has_masked_rows(examples):
    (batch,) = loader(examples, rows=64, micro_rows=64, seed=None).batches(0)
    assert batch.loss_mask.tolist() == [True] * 60 + [False] * 4
    assert (batch.input_ids[60:] == 0).all()


def test_too_long_examples_are_refused(examples):
    with pytest.raises(LengthError, match=r"holds 16: raise train.sequence_length, or prepare"):
        loader(examples, length=16)


def test_long_texts_are_cropped_at_the_end():
    symbols = np.arange(40, dtype=np.uint8)
    texts = Examples(TASKS["text"], "texts", symbols, np.array([[30], [40]]), np.array([0, 1], np.uint8), "")
    (batch,) = loader(texts, length=16, rows=2, micro_rows=2, seed=None).batches(0)
    assert batch.input_ids.tolist() == [list(range(1, 17)), [*range(31, 41), 0, 0, 0, 0, 0, 0]]


def test_checkpoint_of_another_order_is_refused(examples):
    state = loader(examples).state_dict(4)
    loader(examples).load_state_dict(state)
    with pytest.raises(UserError, match=r"another order .*seed: 1 then, 2 now"):
        loader(examples, seed=2).load_state_dict(state)
