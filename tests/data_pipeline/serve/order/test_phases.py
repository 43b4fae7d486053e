"""Sequences whose length changes within a run, compared with a walk through the stream and a count of every token."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bst_base.errors import UserError
from data_pipeline.serve.loader import Loader
from data_pipeline.serve.order import windows as windows_module
from data_pipeline.serve.order.permutation import Permutation
from data_pipeline.serve.order.sizes import StepValues
from tests.data_pipeline.serve.memory import Memory, loader
from tests.data_pipeline.serve.order.test_windows import BLOCK, DOCUMENT, LENGTH, SEED, corpora, spelled_out

LENGTHS = st.sampled_from([8, 16, 24, 32, 56])
changes_of = st.lists(st.tuples(st.integers(1, 25), LENGTHS), min_size=1, max_size=3, unique_by=lambda each: each[0])
schedules = st.tuples(LENGTHS, changes_of.map(sorted)).filter(
    lambda each: all(a != b for a, b in pairwise([each[0], *(length for _, length in each[1])]))
)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use windows of about six short documents."""
    monkeypatch.setattr(windows_module, "WINDOW_TOKENS", 6 * DOCUMENT)


def served(drawn: Any, schedule: Any, **others: Any) -> Loader:
    first, changes = schedule
    return loader(drawn, sequence_length=first, lengths=changes, seed=SEED, **{"rows": 3} | others)


def walked(drawn: Any, schedule: Any, rows: int, steps: int, joined: bool) -> list[list[list[int]]]:
    """Return the inputs of every row of every step, by walking through the stream phase by phase; 0 is padding."""
    begins = Memory(*drawn).begins
    epoch, position, found = 0, 0, []
    phases = [(0, schedule[0]), *schedule[1]]
    for (start, length), (until, _) in zip(phases, [*phases[1:], (None, 0)], strict=True):
        wanted, rest = rows * ((until or steps) - start), []
        while len(rest) < wanted:
            windows = spelled_out(*drawn, None if joined else BLOCK, epoch)
            stream = [0 if t is None else int(begins[t[0]]) + t[1] for window in windows for t in window]
            inputs = len(stream) - joined
            starts = list(range(position, inputs, length))
            own = starts if until is None else starts[: wanted - len(rest)]
            low = 0
            for number, window in enumerate(windows):
                group = [each for each in own if low <= each < low + len(window)]
                low += len(window)
                keyed = (SEED, 0, epoch, number) if len(windows) > 1 else (SEED, 0, epoch)
                order = Permutation(len(group), "sequences", *keyed).all().tolist() if group else []
                rest += [(stream + [0] * length)[group[place] :][:length] for place in order]
            ended = len(own) == len(starts)
            epoch, position = (epoch + 1, 0) if ended else (epoch, own[-1] + length)
        found += [rest[at : at + rows] for at in range(0, wanted, rows)]
    return found


@settings(max_examples=60, deadline=None)
@given(drawn=corpora(), schedule=schedules, joined=st.booleans())
def test_steps_equal_a_walk_through_the_stream(drawn: Any, schedule: Any, joined: bool) -> None:
    steps = schedule[1][-1][0] + 6
    own = served(Memory(*drawn), schedule, documents="joined" if joined else "isolated")
    for step, wanted in enumerate(walked(drawn, schedule, 3, steps, joined)):
        found = [row for batch in own.batches(step) for row in batch.input_ids.tolist()]
        if joined:  # the last input of a pass is followed by its last label; the walk has padding there
            assert [row[: len(row) - row.count(0)] for row in wanted] == [
                [t for t in row if t][: len(row) - w.count(0)] for row, w in zip(found, wanted, strict=True)
            ]
        else:
            assert found == wanted


ANY = {
    "mode": st.sampled_from(["shuffled", "streaming"]),
    "documents": st.sampled_from(["joined", "isolated", "masked"]),
    "packing": st.sampled_from(["stream", "best_fit"]),
}


def inputs_of(own: Loader, step: int, read: dict[tuple[int, int], Counter]) -> None:
    """Count the inputs of a step, by corpus and pass."""
    for batch in own.batches(step):
        passes = zip(batch.corpora.tolist(), batch.epochs.tolist(), strict=True)
        for key, row in zip(passes, batch.input_ids, strict=True):
            read.setdefault(key, Counter()).update(row[row > 0].tolist())


def require_exact(
    own: Loader, step: int, read: dict[tuple[int, int], Counter], memories: list[Memory], joined: bool, ends: bool
) -> None:
    """Assert that each token of each pass is read once, and at the end of a phase exactly those before a position."""
    assert not any(count > 1 for each in read.values() for count in each.values())
    for corpus, place in enumerate(own._phases.at(step).places(step)):
        total = int(memories[corpus].lengths.sum())
        for epoch in range(place.epoch):
            assert len(read[corpus, epoch]) in ((total - 1, total) if joined else (total,))  # the last may label only
        if ends and joined:
            assert len(read.get((corpus, place.epoch), ())) == place.position


def read_on(own: Loader, first: int, steps: int, read: dict[tuple[int, int], Counter]) -> int:
    """Read that many steps, and streaming rows to the end of their stretch; return the next step."""
    step, streams = first, own.config.mode == "streaming"
    while step < first + steps or (streams and own._phases.at(step).plan.begun(step) != [None]):
        inputs_of(own, step, read)
        step += 1
    return step


@settings(max_examples=80, deadline=None)
@given(drawn=st.lists(corpora(), min_size=2, max_size=2), schedule=schedules, **ANY)
def test_every_token_of_a_pass_is_read_once(drawn: Any, schedule: Any, mode: str, documents: str, packing: str) -> None:
    memories, joined = [Memory(*each) for each in drawn], documents != "isolated"
    weights = {"weights": [2.0, 1.0], "weight_changes": [{"step": 9, "weights": [1.0, 3.0]}]}
    more = {} if mode == "streaming" else {"changes": [(4, 5), (11, 2)]}
    own = served(memories, schedule, mode=mode, documents=documents, packing=packing, **weights, **more)
    read: dict[tuple[int, int], Counter] = {}
    starts = [step for step, _ in schedule[1]]
    for step in range(starts[-1] + 8):
        assert {batch.input_ids.shape[1] for batch in own.batches(step)} == {own._phases.at(step).cuts.length}
        if step in starts:
            require_exact(own, step, read, memories, joined, ends=True)
        inputs_of(own, step, read)
    end = read_on(own, starts[-1] + 8, 0, read)
    require_exact(own, end, read, memories, joined, ends=False)


@settings(max_examples=80, deadline=None)
@given(
    drawn=st.lists(corpora(), min_size=2, max_size=2),
    before=schedules,
    after=changes_of,
    at=st.integers(1, 20),
    same=st.booleans(),
    rows=st.sampled_from([3, 3, 4]),
    **ANY,
)
def test_a_resumed_run_reads_every_token_once_or_is_refused(
    drawn: Any, before: Any, after: Any, at: int, same: bool, rows: int, mode: str, documents: str, packing: str
) -> None:
    memories, joined = [Memory(*each) for each in drawn], documents != "isolated"
    settings_ = {"mode": mode, "documents": documents, "packing": packing}
    old = served(memories, before, weights=[2.0, 1.0], **settings_)
    read: dict[tuple[int, int], Counter] = {}
    for step in range(at):
        inputs_of(old, step, read)
    state = json.loads(json.dumps(old.state_dict(at)))
    weights = {"weights": [2.0, 1.0], "weight_changes": [{"step": at, "weights": [1.0, 1.0]}]}
    changes = [] if mode == "streaming" or rows == 3 else [(at, rows)]
    new = served(memories, (before[0], before[1] if same else sorted(after)), changes=changes, **weights, **settings_)
    try:
        new.load_state_dict(state)
    except UserError as error:
        assert "train.length_changes: at step" in str(error) and "initial_weights.run" in str(error)
        return
    end = read_on(new, at, 20, read)
    require_exact(new, end, read, memories, joined, ends=False)


@pytest.mark.parametrize("mode", ["shuffled", "streaming"])
def test_rows_do_not_depend_on_resuming_or_sequence_parallelism(mode: str) -> None:
    memory, schedule = Memory([70, 300, 9, 40, 800, 33] * 6), (32, [(5, 64), (9, 16)])
    whole = served(memory, schedule, mode=mode, documents="masked", rows=4)
    for step in (4, 5, 6, 9, 12):
        again = served(memory, schedule, mode=mode, documents="masked", rows=4)
        again.load_state_dict(json.loads(json.dumps(whole.state_dict(step))))
        assert again.state_dict(step) == whole.state_dict(step)
        rows = np.concatenate([batch.input_ids for batch in whole.batches(step)])
        assert np.array_equal(np.concatenate([batch.input_ids for batch in again.batches(step)]), rows)
        for sp, dp in ((2, 1), (1, 2), (2, 2)):
            parts = [
                [
                    np.concatenate(
                        [
                            batch.input_ids
                            for batch in served(
                                memory,
                                schedule,
                                mode=mode,
                                documents="masked",
                                rows=4,
                                dp=dp,
                                dp_rank=i,
                                sp=sp,
                                sp_rank=j,
                            ).batches(step)
                        ]
                    )
                    for j in range(sp)
                ]
                for i in range(dp)
            ]
            assert np.array_equal(np.concatenate([np.concatenate(each, 1) for each in parts]), rows)


def test_length_change_inside_a_shuffled_window_is_refused() -> None:
    memory = Memory([LENGTH] * 300, [2] * 150)  # 50 windows of 6 sequences, 3 to a step
    plain = served(memory, (LENGTH, []))
    for at, allowed in ((7, 8), (8, 8)):
        state = plain.state_dict(at)
        assert "begun" not in state and "lengths" not in state
        with_change = served(memory, (LENGTH, [(at, 64)]))
        if at == allowed:
            with_change.load_state_dict(state)
            continue
        with pytest.raises(UserError, match=rf"at step {at} a shuffle window is partly read.* from {allowed} on"):
            with_change.load_state_dict(state)
    served(memory, (LENGTH, [(12, 64)])).load_state_dict(plain.state_dict(7))  # after the windows already begun
    planned = served(memory, (LENGTH, [(7, 64)]))
    with pytest.raises(UserError, match="at step 7"):
        served(memory, (LENGTH, [])).load_state_dict(planned.state_dict(5) | {"begun": [[0, 9999]]} | {"step": 7})


def test_length_change_error_names_the_corpus_without_weight() -> None:
    memories = [Memory([LENGTH] * 300, [2] * 150) for _ in range(2)]
    ends = {"weights": [1.0, 1.0], "weight_changes": [{"step": 3, "weights": [1.0, 0.0]}]}
    state = served(memories, (LENGTH, []), **ends).state_dict(5)
    with pytest.raises(UserError, match=r"no step can .* while corpus 2 of data.corpus has no weight"):
        served(memories, (LENGTH, [(5, 64)]), **ends).load_state_dict(state)
    again = ends | {"weight_changes": [*ends["weight_changes"], {"step": 5, "weights": [1.0, 1.0]}]}
    with pytest.raises(UserError, match=r"at a step from \d+ on, or start") as refusal:
        served(memories, (LENGTH, [(5, 64)]), **again).load_state_dict(state)
    first = int(str(refusal.value).split("at a step from ")[1].split()[0])
    served(memories, (LENGTH, [(first, 64)]), **again).load_state_dict(state)
    with pytest.raises(UserError, match=f"at a step from {first} on"):
        served(memories, (LENGTH, [(first - 1, 64)]), **again).load_state_dict(state)


def test_invalid_sequence_lengths_are_refused() -> None:
    memory = Memory([500])
    for schedule, said in (
        ((32, [(3, 36)]), "sequence length 36 is not a multiple of block x sp"),
        ((32, [(3, 512)]), "are fewer than one sequence of 512"),
    ):
        with pytest.raises(UserError, match=said):
            served(memory, schedule)
    state = served(memory, (32, [])).state_dict(3)
    with pytest.raises(UserError, match="older version of the data order"):
        served(memory, (32, [(9, 64)])).load_state_dict(state | {"order": 2})


@pytest.mark.parametrize("mode", ["shuffled", "streaming"])
def test_a_change_to_the_same_length_changes_nothing(mode: str) -> None:
    memory = Memory([70, 300, 9, 40, 800, 33] * 6)
    plain, changed = (served(memory, (32, changes), mode=mode) for changes in ([(9, 16)], [(5, 32), (9, 16), (12, 16)]))
    for step in range(16):
        again = served(memory, (32, [(5, 32), (9, 16), (12, 16)]), mode=mode)
        again.load_state_dict(json.loads(json.dumps(changed.state_dict(step))))
        for own in (changed, again):
            assert [batch.input_ids.tolist() for batch in own.batches(step + 3)] == [
                batch.input_ids.tolist() for batch in plain.batches(step + 3)
            ]


def test_a_run_with_a_change_to_the_same_length_continues_without_it() -> None:
    """Versions before cut the stream at such a change. Their checkpoints name it, so that a resumed run has the cut."""
    memory = Memory([70, 300, 9, 40, 800, 33] * 6)
    old = served(memory, (32, []))
    old._lengths = StepValues(((0, 32), (5, 32)))
    old._use_order(old._order, old._planned)
    own = served(memory, (32, []))
    own.load_state_dict(json.loads(json.dumps(old.state_dict(7))))
    for step in (7, 8, 12):
        assert [batch.input_ids.tolist() for batch in own.batches(step)] == [
            batch.input_ids.tolist() for batch in old.batches(step)
        ]
