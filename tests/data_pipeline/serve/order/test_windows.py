"""Version 3 of the order, window by window, compared with an explicit list of the whole pass."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.format.extents import ShardSizes
from data_pipeline.serve import rows as rows_module
from data_pipeline.serve.order import windows as windows_module
from data_pipeline.serve.order.permutation import Permutation
from data_pipeline.serve.order.window_stream import WindowCache, WindowStream
from data_pipeline.serve.order.windows import Windows
from tests.data_pipeline.serve.memory import Memory, loader

DOCUMENT = 2048  # a document counts as at least this many tokens
SEED, LENGTH, BLOCK = 3, 32, 8
Token = tuple[int, int] | None  # (document, place in it); None for padding


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use windows of about six short documents."""
    monkeypatch.setattr(windows_module, "WINDOW_TOKENS", 6 * DOCUMENT)


def spelled_out(lengths: list[int], shards: list[int], block: int | None, epoch: int) -> list[list[Token]]:
    """Return the tokens of each window of a pass, one by one."""
    key, firsts = (SEED, 0, epoch), [sum(shards[:number]) for number in range(len(shards))]
    order = [shard for shard in Permutation(len(shards), "shards", *key).all().tolist() if shards[shard]]
    weights = {
        shard: max(sum(lengths[firsts[shard] : firsts[shard] + shards[shard]]), shards[shard] * DOCUMENT)
        for shard in order
    }
    total = sum(weights.values())
    size = -(-total // max(1, round(total / (6 * DOCUMENT))))
    members: dict[int, list[int]] = {}
    before = 0
    for shard in order:
        members.setdefault(before // size, []).append(shard)
        before += weights[shard]
    found = []
    for number, own in enumerate(members.values()):
        documents = [firsts[shard] + place for shard in sorted(own) for place in range(shards[shard])]
        keyed = (*key, number) if len(members) > 1 else key
        tokens: list[Token] = []
        for place in Permutation(len(documents), "documents", *keyed).all().tolist():
            tokens += [(documents[place], at) for at in range(lengths[documents[place]])]
            tokens += [None] * (-len(tokens) % (block or 1))
        found.append(tokens)
    return found


def sequences_of(windows: list[list[Token]], epoch: int, joined: bool) -> tuple[list[list[Token]], list[int]]:
    """Return the sequences of a pass in stream order, with their last label, and the order of the shuffled mode."""
    stream = [token for window in windows for token in window]
    count = -(-(len(stream) - joined) // LENGTH)
    padded = stream + [None] * (LENGTH + 1)
    sequences = [padded[number * LENGTH : (number + 1) * LENGTH + 1] for number in range(count)]
    order, begin = [], 0
    for number, window in enumerate(windows):
        own = [each for each in range(count) if begin <= each * LENGTH < begin + len(window)]
        keyed = (SEED, 0, epoch, number) if len(windows) > 1 else (SEED, 0, epoch)
        if own:
            order += [own[place] for place in Permutation(len(own), "sequences", *keyed).all().tolist()]
        begin += len(window)
    return sequences, order


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw (lengths of documents, documents per shard), with empty shards and shards larger than a window."""
    shards = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 17]), min_size=1, max_size=20).filter(any))
    lengths = draw(st.lists(st.integers(1, 70), min_size=sum(shards), max_size=sum(shards)))
    lengths[0] += 4 * LENGTH + (9000 if draw(st.booleans()) else 0)  # a document as large as a window, or as a step
    return lengths, shards


@settings(max_examples=60)
@given(drawn=corpora(), mode=st.sampled_from(["shuffled", "streaming"]), joined=st.booleans())
def test_rows_equal_the_explicit_list_of_a_pass(drawn: Any, mode: str, joined: bool) -> None:
    lengths, shards = drawn
    corpus, rows = Memory(lengths, shards), 3
    served = loader(corpus, mode, "joined" if joined else "isolated", rows=rows, seed=SEED)
    read: dict[tuple[int, int], list[Any]] = {}  # (pass, place of the sequence in it)
    taken: Counter[int] = Counter()
    for step in range(2 * served.sequences[0] // rows + 1):
        order = np.concatenate([batch.epochs for batch in served.batches(step)])
        assigned = served._phases.assign(range(step, step + 1), range(rows))
        for batch, epoch, sequence in zip(
            served.batches(step), order.tolist(), assigned.sequence.tolist(), strict=True
        ):
            place = taken[epoch] if mode == "shuffled" else sequence
            taken[epoch] += 1
            read[epoch, place] = [batch.input_ids[0].tolist(), batch.labels[0].tolist(), batch.documents[0].tolist()]
    for epoch in (0, 1):
        windows = spelled_out(lengths, shards, None if joined else BLOCK, epoch)
        sequences, order = sequences_of(windows, epoch, joined)
        assert len(sequences) == served.sequences[0]
        places = range(len(order)) if mode == "shuffled" else order
        complete = [(place, sequence) for place, sequence in zip(places, order, strict=True) if (epoch, place) in read]
        assert len(complete) == len(order) or (epoch == 1 or mode == "streaming")
        for place, sequence in complete:
            inputs, labels, documents = read[epoch, place]
            tokens = sequences[sequence]
            assert inputs == [0 if t is None else int(corpus.begins[t[0]]) + t[1] for t in tokens[:-1]]
            assert documents == [-1 if t is None else t[0] for t in tokens[:-1]]
            if joined:
                follows = [t for s, t in pairwise(tokens) if s is not None]
                wanted = [0 if t is None else int(corpus.begins[t[0]]) + t[1] for t in follows]
                assert labels[: len(wanted)] == wanted


@given(drawn=corpora(), epoch=st.integers(0, 3))
def test_every_shard_is_in_one_window_of_a_pass(drawn: Any, epoch: int) -> None:
    sizes = Memory(*drawn).shard_sizes(None)
    windows = Windows(sizes, (1, 0, epoch))
    shards = [shard for number in range(len(windows)) for shard in windows.shards(number).tolist()]
    assert sorted(shards) == np.flatnonzero(sizes.documents).tolist()
    assert windows.begins[0] == 0 and windows.begins[-1] == sizes.tokens.sum()


def test_window_size_does_not_depend_on_document_length() -> None:
    for tokens, documents in ((300 * 40, 40), (12_000, 1)):  # many short documents, few long ones
        sizes = ShardSizes(*(np.full(1000, each) for each in (documents, tokens, tokens)))
        windows = Windows(sizes, (0, 0, 0))
        weight = max(tokens, documents * DOCUMENT)
        shards = np.array([len(windows.shards(number)) for number in range(len(windows))])
        assert len(windows) == pytest.approx(1000 * weight / (6 * DOCUMENT), rel=0.01) or weight > 6 * DOCUMENT
        assert (shards * weight <= 6 * DOCUMENT + weight).all()


def test_small_corpus_is_read_in_the_order_of_version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [37, 1, 5, 150, 64, 2, 90, 33, 16, 71, 3, 48]
    monkeypatch.setattr(windows_module, "WINDOW_TOKENS", 10 * len(lengths) * DOCUMENT)
    for mode in ("shuffled", "streaming"):
        for documents in ("joined", "isolated"):
            new, old = (loader(Memory(lengths, [5, 4, 3]), mode, documents, seed=SEED) for _ in range(2))
            old.load_state_dict(old.state_dict(0) | {"order": 2})
            assert (old.state_dict(4)["order"], new.state_dict(4)["order"]) == (2, 3)
            for step in range(40):
                for found, expected in zip(new.batches(step), old.batches(step), strict=True):
                    assert np.array_equal(found.input_ids, expected.input_ids)
                    assert np.array_equal(found.continues, expected.continues)


def test_reading_opens_each_window_once_per_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of 64 sequences, located together, covers nine windows of about six documents; a pass has forty."""
    monkeypatch.setattr(rows_module, "_TOGETHER", 64)
    corpus = Memory([40] * 240, [4] * 60)
    served = loader(corpus, rows=1)
    looked: list[int] = []
    real = corpus.shard_lengths
    corpus.shard_lengths = lambda shards: looked.extend(shards) or real(shards)  # type: ignore[method-assign]
    for step in range(63):  # in groups of 1, 2, 4, … 32
        served.batches(step)
    assert 9 <= len(looked) <= 20
    for step in range(64, served.sequences[0]):
        served.batches(step)
    first_pass = looked[: len(looked) - 20]  # the last group continues into the second pass
    assert len(first_pass) == len(set(first_pass)) >= 40


def test_opening_a_window_is_retried_after_a_failure() -> None:
    corpus = Memory([40] * 240, [4] * 60)
    windows, cache = Windows(corpus.shard_sizes(None), (SEED, 0, 0)), WindowCache(corpus, None)
    real, corpus.shard_lengths = corpus.shard_lengths, lambda shards: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cache.get(0, windows, 0, 1)
    corpus.shard_lengths = real
    assert cache.get(0, windows, 0, 1).total == windows.begins[1]


def test_recent_windows_stay_open_and_shards_of_others_are_released() -> None:
    corpus = Memory([40] * 240, [4] * 60)
    released: set[int] = set()
    corpus.release = released.update  # type: ignore[method-assign]
    windows, cache = Windows(corpus.shard_sizes(None), (SEED, 0, 0)), WindowCache(corpus, None)
    opened = [cache.get(0, windows, number, 1) for number in (0, 1)]
    assert [cache.get(0, windows, number, 1) for number in (1, 0)] == opened[::-1] and not released
    cache.get(0, windows, 3, 1)
    assert released == set(opened[1].shards.tolist())  # the least recently used
    assert cache.get(0, windows, 0, 1) is opened[0] and cache.get(0, windows, 1, 1) is not opened[1]
    more = [cache.get(0, windows, number, 9) for number in range(10)]  # as many as there are rows, plus one
    assert [cache.get(0, windows, number, 9) for number in range(10)] == more


def test_first_read_of_a_window_prefetches_it_and_the_next() -> None:
    corpus = Memory([40] * 240, [4] * 60)
    told: list[tuple[list[int], list[int]]] = []
    corpus.fetch_ahead = lambda *shards: told.append(shards)  # type: ignore[method-assign]
    windows = Windows(corpus.shard_sizes(None), (SEED, 0, 0))
    stream = WindowStream(windows, WindowCache(corpus, None), 0)
    for start in range(0, int(windows.begins[-1]), 16):
        stream.pieces(np.array([start]), 17)
    shards = [windows.shards(number).tolist() for number in range(len(windows))]
    # A row whose last label is in the next window belongs to both.
    ends = [now[-len(shards[number]) :] for number, (now, _) in enumerate(told)]
    assert ends == shards
    assert [soon for _, soon in told] == [*shards[1:], []]


def test_a_mixture_resumes_in_any_window_on_any_number_of_ranks() -> None:
    corpora = [Memory([45] * 100, [2] * 50), Memory([90] * 14, [14]), Memory([30, 200] * 30, [3] * 20)]
    for mode in ("shuffled", "streaming"):
        options = {"rows": 6, "weights": [3, 1, 2], "mode": mode}
        whole = loader(corpora, **options)
        for step in (0, 17, 63, 64, 200):
            expected = np.concatenate([batch.input_ids for batch in whole.batches(step)])
            for dp in (1, 2, 3):
                ranks = [loader(corpora, dp=dp, dp_rank=rank, start_step=step, **options) for rank in range(dp)]
                found = np.concatenate([batch.input_ids for each in ranks for batch in next(iter(each))[1]])
                assert np.array_equal(found, expected)


def test_order_version_3_is_pinned() -> None:
    """Existing runs depend on this order. If this fails, plan.ORDER_VERSION must be raised."""
    documents = np.array([3, 1, 2, 4, 1, 1, 2, 3, 2, 1])
    windows = Windows(ShardSizes(documents, documents * 50, documents * 50), (11, 0, 2))
    assert [windows.shards(number).tolist() for number in range(len(windows))] == GOLDEN_SHARDS
    assert windows.begins.tolist() == GOLDEN_BEGINS
    corpus = Memory([50] * 20, documents.tolist())
    served = loader(corpus, rows=4, seed=11)
    firsts = [[int(batch.input_ids[0, 0]) for batch in served.batches(step)] for step in (0, 3, 7, 8, 15, 16)]
    assert firsts == GOLDEN_FIRSTS


def test_window_size_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert (windows_module.WINDOW_TOKENS, windows_module._DOCUMENT) == (2**30, 2**11)


GOLDEN_SHARDS = [[0, 2, 8], [1, 3, 7], [4, 5, 6, 9]]
GOLDEN_BEGINS = [0, 350, 750, 1000]
GOLDEN_FIRSTS = [  # the first tokens of the rows of the steps: which sequence of which pass
    [979, 893, 233, 789],
    [721, 599, 113, 641],
    [151, 537, 319, 447],
    [815, 629, 275, 761],
    [493, 383, 351, 405],
    [871, 297, 39, 111],
]
