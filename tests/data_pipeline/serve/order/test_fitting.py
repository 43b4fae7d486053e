"""Best-fit packing cuts few documents that fit in a sequence, and keeps all other properties of the order."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bst_base.errors import UserError
from data_pipeline.serve.order import windows
from data_pipeline.serve.order.fitting import best_fit, cut
from tests.data_pipeline.serve.memory import Memory, loader


def slow_best_fit(sizes: list[int], length: int, room: int) -> list[int]:
    """Return the same as `best_fit`, with a search over all waiting documents in every turn."""
    left, order = list(range(len(sizes))), []

    def fills(room: int, among: list[int]) -> bool:
        pairs = itertools.combinations(among, 2)
        return not room or any(sizes[i] == room for i in among) or any(sizes[i] + sizes[j] == room for i, j in pairs)

    def choose(turn: int) -> int:
        size = sizes[turn]
        if size > length or (size <= room and fills(room - size, [i for i in left if i != turn])):
            return turn
        for i in left:
            if sizes[i] == room:
                return i
        halves = [max(sizes[i], sizes[j]) for i, j in itertools.combinations(left, 2) if sizes[i] + sizes[j] == room]
        if halves:
            return next(i for i in left if sizes[i] == max(halves))
        if size <= room:
            return turn
        return max((i for i in left if sizes[i] <= room), key=lambda i: (sizes[i], -i), default=turn)

    while left:
        chosen = choose(left[0])
        left.remove(chosen)
        order.append(chosen)
        for _ in range(sizes[chosen]):
            room = room - 1 or length
    return order


def cut_one_by_one(sizes: list[int], length: int, room: int) -> list[bool]:
    """Return, for each document, whether its tokens are in more than one sequence; computed token by token."""
    position, found = length - room, []
    for size in sizes:
        sequences = {token // length for token in range(position, position + size)}
        found.append(size <= length and len(sequences) > 1)
        position += size
    return found


@given(st.lists(st.integers(0, 40), max_size=25), st.integers(1, 16), st.data())
def test_best_fit_equals_a_slow_reference_implementation(sizes: list[int], length: int, data) -> None:
    room = data.draw(st.integers(1, length))
    order = best_fit(np.array(sizes, np.int64), length, room)
    assert order.tolist() == slow_best_fit(sizes, length, room)
    ordered = [sizes[i] for i in order]
    assert cut(np.array(ordered, np.int64), length, room).tolist() == cut_one_by_one(ordered, length, room)


def test_best_fit_cuts_few_documents() -> None:
    """Lengths like web text: log-normal with a median of 400 tokens, in sequences of 2,048."""
    sizes = np.minimum(np.random.default_rng(0).lognormal(6, 1, 20_000), 50_000).astype(np.int64) + 1
    fits = int((sizes <= 2048).sum())
    before, order = cut(sizes, 2048, 2048).sum() / fits, best_fit(sizes, 2048, 2048)
    assert np.array_equal(np.sort(order), np.arange(len(sizes)))
    assert before > 0.2
    assert cut(sizes[order], 2048, 2048).sum() / fits < 0.003


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_best_fit_splits_few_documents_across_rows_in_every_window(documents: str, monkeypatch) -> None:
    """Windows may begin inside a sequence, which the packing must take into account."""
    monkeypatch.setattr(windows, "WINDOW_TOKENS", 4_000)
    monkeypatch.setattr(windows, "_DOCUMENT", 1)
    lengths = np.random.default_rng(1).integers(1, 30, 1200).tolist()
    corpus = Memory(lengths, [100] * 12)
    parts = {}
    for packing in ("stream", "best_fit"):
        served, rows_of = loader(corpus, "shuffled", documents, packing=packing), [0] * len(lengths)
        for step in range(-(-served.sequences[0] // 4)):
            for batch in served.batches(step):
                for row in np.flatnonzero(batch.epochs == 0):
                    for document in set(batch.documents[row].tolist()) - {-1}:
                        rows_of[document] += 1
        assert min(rows_of) >= 1
        parts[packing] = sum(count > 1 for count in rows_of)
    assert parts["stream"] > 100
    # Half of these documents are longer than half a sequence, and a window has few documents.
    assert parts["best_fit"] < parts["stream"] / 5


def test_best_fit_order_is_pinned_and_cannot_resume_as_stream() -> None:
    corpus = Memory([7, 30, 12, 25, 18, 3, 20, 14, 9, 31] * 6)
    served = loader(corpus, packing="best_fit")
    rows = [batch.input_ids for step in range(10) for batch in served.batches(step)]
    assert hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest()[:16] == "3f459ef2c76b59bf"
    assert len(str(served.state_dict(3))) < 330
    with pytest.raises(UserError, match="packing: best_fit then, None now"):
        loader(corpus).load_state_dict(served.state_dict(3))
    again = loader(corpus, packing="best_fit", start_step=4)
    for (_, batches), step in zip(itertools.islice(again, 3), range(4, 7), strict=True):
        for found, expected in zip(batches, served.batches(step), strict=True):
            assert np.array_equal(found.input_ids, expected.input_ids)
