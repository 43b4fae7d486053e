"""The loader serves every token exactly once, in the same order for any number of ranks, from any step on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bst_base.errors import UserError
from bst_base.settings import parse
from data_pipeline.serve import rows as rows_module
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.reader import Corpus
from data_pipeline.serve.rows import RowReader
from data_pipeline.serve.slices import slices_of
from data_pipeline.serve.spread import MASKED
from tests.data_pipeline.serve.memory import Memory, loader

LENGTHS = [37, 1, 5, 150, 64, 2, 90, 33, 16, 71, 3, 48]
MODES = st.sampled_from(["shuffled", "streaming"])
DOCUMENTS = st.sampled_from(["joined", "isolated", "masked"])
PACKINGS = st.sampled_from(["stream", "best_fit"])


def whole_rows(corpora: Any, steps: range, dp: int = 1, sp: int = 1, **settings: Any) -> np.ndarray:
    """Return input, label, mask and document of every position, assembled from all ranks: (steps, G, 4, L).

    Masked rows are left out; assert that they have no unmasked label.
    """
    ranks = [[loader(corpora, dp=dp, dp_rank=d, sp=sp, sp_rank=s, **settings) for s in range(sp)] for d in range(dp)]
    result = []
    for step in steps:
        rows = []
        for group in ranks:
            for slices in zip(*(each.batches(step) for each in group), strict=True):
                own = slices[0].rows != MASKED
                for part in slices:
                    assert not part.loss_mask[~own].any()
                    assert (part.documents[~own] == -1).all()
                    assert part.continues[~own].all()
                parts = [np.stack([b.input_ids, b.labels, b.loss_mask, b.documents], axis=1) for b in slices]
                rows.append(np.concatenate(parts, axis=-1)[own])
        result.append(np.concatenate(rows))
    return np.stack(result)


@settings(max_examples=40)
@given(
    mode=MODES,
    documents=DOCUMENTS,
    packing=PACKINGS,
    lengths=st.lists(st.integers(1, 120), min_size=6, max_size=30),
    seed=st.integers(0, 99),
    rows=st.integers(1, 6),
)
def test_every_token_is_served_exactly_once_in_a_pass(
    mode: str, documents: str, packing: str, lengths: list[int], seed: int, rows: int
) -> None:
    corpus = Memory([*lengths, 200])
    served = loader(corpus, mode, documents, packing=packing, rows=rows, seed=seed)
    labels, contexts = Counter(), Counter()
    for epoch, batch, row in rows_of_passes(served, passes=2):
        mask = batch.loss_mask[row]
        labels.update((epoch, token) for token in batch.labels[row][mask].tolist())
        contexts.update((epoch, token) for token in batch.input_ids[row][batch.documents[row] >= 0].tolist())
    total = int(corpus.lengths.sum())
    firsts = set(corpus.begins.tolist())
    for epoch in range(2):
        own = {token: count for (e, token), count in labels.items() if e == epoch}
        assert set(own.values()) == {1}
        missing = set(range(1, total + 1)) - set(own)
        if documents != "joined":
            assert missing == firsts  # a document's first token is context only
        else:
            assert len(missing) == 1 and missing <= firsts  # the pass's first token is context only
        seen = {token: count for (e, token), count in contexts.items() if e == epoch}
        assert set(seen.values()) == {1}
        # Without padding, the last token of a pass may be only a label.
        assert total - len(seen) in ((0,) if documents == "isolated" else (0, 1))


def rows_of_passes(served: Loader, passes: int) -> Iterator[tuple[int, Any, int]]:
    """Yield (epoch, batch, row of the batch) until every row is past the first `passes` passes."""
    for step in range(10_000):
        batches = served.batches(step)
        for batch in batches:
            for row, epoch in enumerate(batch.epochs.tolist()):
                if epoch < passes:
                    yield epoch, batch, row
        if min(batch.epochs.min() for batch in batches) > passes:
            return


@pytest.mark.long
@settings(max_examples=20)
@given(
    mode=MODES,
    documents=DOCUMENTS,
    packing=PACKINGS,
    dp=st.sampled_from([1, 2, 3, 4, 5, 8, 11]),
    sp=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 3]),
    start=st.integers(0, 50),
)
def test_rows_are_identical_for_every_number_of_ranks(
    mode: str, documents: str, packing: str, dp: int, sp: int, micro: int, start: int
) -> None:
    corpus, steps = Memory(LENGTHS), range(start, start + 3)
    settings = {"mode": mode, "documents": documents, "packing": packing, "rows": 8}
    expected = whole_rows(corpus, steps, **settings)
    found = whole_rows(corpus, steps, dp=dp, sp=sp, micro_rows=micro, **settings)
    assert np.array_equal(found, expected)


@given(mode=MODES, start=st.integers(0, 30))
def test_labels_are_the_inputs_shifted_by_one(mode: str, start: int) -> None:
    """With joined documents: within a slice, across slices of one row, and in streaming mode across steps."""
    rows = whole_rows(Memory(LENGTHS), range(start, start + 8), sp=2, mode=mode)
    inputs, labels, mask = rows[:, :, 0], rows[:, :, 1], rows[:, :, 2].astype(bool)
    assert np.array_equal(labels[:, :, :-1][mask[:, :, :-1]], inputs[:, :, 1:][mask[:, :, :-1]])


def test_streaming_rows_continue_their_documents() -> None:
    served = loader(Memory(LENGTHS), "streaming")
    before: dict[int, Any] = {}
    continued = 0
    for step in range(60):
        for batch in served.batches(step):
            row = int(batch.rows[0])
            if batch.continues[0]:
                assert before[row].labels[0, -1] == batch.input_ids[0, 0]
                assert before[row].epochs == batch.epochs
                continued += 1
            before[row] = batch
    assert continued > 100  # of 240; the passes are short here


def test_shuffled_rows_never_continue_the_previous_step() -> None:
    assert not any(batch.continues.any() for batch in loader(Memory(LENGTHS)).batches(3))


@given(mode=MODES, lengths=st.lists(st.integers(1, 60), min_size=10, max_size=20), step=st.integers(0, 20))
def test_isolated_documents_start_at_block_boundaries_and_are_marked(mode: str, lengths: list[int], step: int) -> None:
    corpus = Memory([*lengths, 100])
    for batch in loader(corpus, mode, "isolated").batches(step):
        firsts = np.isin(batch.input_ids, corpus.begins)
        assert not firsts.reshape(-1, 8)[:, 1:].any()
        assert np.array_equal(firsts[:, ::8], batch.starts)
        documents, mask = batch.documents, batch.loss_mask
        assert np.array_equal(batch.input_ids == 0, documents < 0)
        last = np.isin(batch.input_ids, corpus.begins + corpus.lengths - 1)
        assert np.array_equal(mask, (documents >= 0) & ~last)
        assert np.array_equal(batch.labels, np.where(mask, batch.input_ids + 1, 0))


@given(
    mode=MODES,
    packing=PACKINGS,
    lengths=st.lists(st.integers(1, 60), min_size=10, max_size=20),
    sp=st.sampled_from([1, 2]),
    step=st.integers(0, 20),
)
def test_masked_documents_are_the_joined_stream_with_document_starts(
    mode: str, packing: str, lengths: list[int], sp: int, step: int
) -> None:
    """The same tokens at the same positions; the same labels, except the first token of another document."""
    corpus = Memory([*lengths, 100])
    for rank in range(sp):
        joined, masked = (
            loader(corpus, mode, documents, packing=packing, sp=sp, sp_rank=rank) for documents in ("joined", "masked")
        )
        assert joined.state_dict(step) == masked.state_dict(step)
        for plain, batch in zip(joined.batches(step), masked.batches(step), strict=True):
            assert np.array_equal(plain.input_ids, batch.input_ids)
            assert np.array_equal(batch.starts, np.isin(batch.input_ids, corpus.begins))
            assert np.array_equal(batch.loss_mask, plain.loss_mask & ~np.isin(plain.labels, corpus.begins))
            assert np.array_equal(batch.labels, np.where(batch.loss_mask, batch.input_ids + 1, 0))


def test_joined_batches_have_no_starts() -> None:
    assert loader(Memory(LENGTHS)).batches(0)[0].starts is None


@given(mode=MODES, documents=DOCUMENTS, sp=st.sampled_from([1, 2, 4]), step=st.integers(0, 40))
def test_cuts_give_the_origin_of_each_token(mode: str, documents: str, sp: int, step: int) -> None:
    corpus = Memory(LENGTHS)
    for rank in range(sp):
        begin = rank * 32 // sp
        for batch in loader(corpus, mode, documents, sp=sp, sp_rank=rank).batches(step):
            cuts, covered = batch.cuts, 0
            for row, place, count, document, offset in zip(
                cuts.row, cuts.place, cuts.count, cuts.document, cuts.offset, strict=True
            ):
                tokens = batch.input_ids[row, place - begin : place - begin + count]
                assert np.array_equal(tokens, corpus.begins[document] + offset + np.arange(count))
                covered += count
            assert covered == (batch.input_ids != 0).sum()


@pytest.mark.parametrize("mode", ["shuffled", "streaming"])
def test_iteration_from_a_later_step_serves_the_same_batches(mode: str) -> None:
    whole = loader(Memory(LENGTHS), mode)
    rest = loader(Memory(LENGTHS), mode, start_step=7)
    for (step, batches), expected in zip(rest, range(7, 12), strict=False):
        assert step == expected
        for found, wanted in zip(batches, whole.batches(step), strict=True):
            assert np.array_equal(found.input_ids, wanted.input_ids)


@pytest.mark.parametrize("mode", ["shuffled", "streaming"])
def test_resuming_does_not_read_consumed_tokens(mode: str) -> None:
    corpus = Memory([500] * 200)
    served = loader(corpus, mode, start_step=400)
    next(iter(served))
    assert corpus.tokens_read <= 4 * (32 + 1)


def test_number_of_steps_located_together_grows_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    located: list[range] = []
    real = RowReader._locate

    def noted(self: RowReader, steps: range, part: int) -> Any:
        located.append(steps)
        return real(self, steps, part)

    monkeypatch.setattr(RowReader, "_locate", noted)
    monkeypatch.setattr(rows_module, "_TOGETHER", 64)
    corpus = Memory([500] * 200)
    served = loader(corpus, start_step=21, rows=6)  # ten steps of six rows each, at most
    for step in range(21, 60):
        served.batches(step)
    bounds = [21, 22, 24, 28, 38, 48, 58]
    assert located == [range(*each) for each in pairwise([*bounds, 68])]
    located.clear()
    for step in range(21):  # an earlier step may also be requested
        served.batches(step)
    assert located == [range(1), range(1, 11), range(11, 21)]
    located.clear()
    changed = loader(corpus, start_step=21, rows=6, changes=[(25, 7)])
    for step in range(21, 28):
        changed.batches(step)
    assert located == [range(*each) for each in pairwise([21, 22, 24, 25, 26, 28])]


@example(mode="streaming", documents="joined", step=41, dp=1)
@example(mode="streaming", documents="isolated", step=91, dp=2)
@given(mode=MODES, documents=DOCUMENTS, step=st.integers(0, 200), dp=st.sampled_from([1, 2, 5]))
def test_a_mixture_draws_each_row_from_its_corpus_for_every_number_of_ranks(
    mode: str, documents: str, step: int, dp: int
) -> None:
    corpora = [Memory([170] * 8), Memory([90] * 14)]
    changes = [{"step": 40, "weights": [1, 4]}, {"step": 90, "weights": [0, 1]}]
    settings = {"mode": mode, "documents": documents, "rows": 10, "weights": [3, 2], "weight_changes": changes}
    served = [loader(corpora, dp=dp, dp_rank=rank, **settings) for rank in range(dp)]
    batches = [batch for each in served for batch in each.batches(step)]
    whole = loader(corpora, **settings).batches(step)
    for found, expected in zip(batches, whole, strict=True):
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert found.rows == expected.rows and found.corpora == expected.corpora
        cuts = found.cuts
        for place, count, document, offset in zip(cuts.place, cuts.count, cuts.document, cuts.offset, strict=True):
            first = corpora[int(found.corpora[0])].begins[document] + offset
            assert np.array_equal(found.input_ids[0, place : place + count], first + np.arange(count))
    # In streaming mode a row stays with its corpus for a stretch. At first it has 7 steps, in which 6 rows read at most
    # the 43 sequences of a pass; then 5 (8 rows, 40 sequences). Weights change at the end of the stretch of their step.
    second, third = (40, 90) if mode == "shuffled" else (42, 92)
    first = 6 if step < second else 2 if step < third else 0  # of ten rows, ± 1 if a step is short
    assert abs(sum(int(batch.corpora[0]) == 0 for batch in batches) - first) <= (first > 0)


def test_invalid_weight_changes_are_refused() -> None:
    corpora = [{"corpus": "a", "weight": 1}, {"corpus": "b", "weight": 1}]
    for changes, message in (
        ([{"step": 5, "weights": [1]}], "1 weights at step 5 for 2 corpora"),
        ([{"step": 5, "weights": [0, 0]}], "one positive"),
        ([{"step": 5, "weights": [1, 2]}, {"step": 5, "weights": [2, 1]}], "steps must increase"),
    ):
        with pytest.raises(UserError, match=message):
            parse(DataConfig, {"corpus": corpora, "weight_changes": changes})


def test_stored_tokens_contain_inputs_and_labels() -> None:
    served = loader(Memory(LENGTHS))
    for tokens, batch in zip(served.tokens(3), served.batches(3), strict=True):
        assert np.array_equal(tokens[:, :-1], batch.input_ids) and np.array_equal(tokens[:, 1:], batch.labels)


def test_state_is_small_and_mismatch_error_names_the_setting() -> None:
    served = loader(Memory(LENGTHS))
    state = json.loads(json.dumps(served.state_dict(10**9)))
    assert len(json.dumps(state)) < 300
    served.load_state_dict(state)
    with pytest.raises(UserError, match="seed: 3 then, 4 now"):
        loader(Memory(LENGTHS), seed=4).load_state_dict(state)
    with pytest.raises(UserError, match="order: 0 then, 3 now"):
        served.load_state_dict(state | {"order": 0})
    with pytest.raises(UserError, match="mode: shuffled then, streaming now"):
        loader(Memory(LENGTHS), "streaming").load_state_dict(state)


@pytest.mark.parametrize("mode", ["shuffled", "streaming"])
def test_resumed_run_keeps_its_order_version(mode: str) -> None:
    """The state is as written by version 1, with its hash of the weights; the rows are pinned."""
    corpora, settings = [Memory([170] * 8), Memory([90] * 14)], {"rows": 10, "weights": [3, 2], "mode": mode}
    resumed, fresh = loader(corpora, **settings), loader(corpora, **settings)
    state = fresh.state_dict(7) | {
        "order": 1,
        "corpus": "45725791c47b32618cc57b88343e2bceec3b0a01b83bc97d144a2cbc11a20c3d",
        "weights": "4eae9429cedfaa73",
    }
    resumed.load_state_dict(state)
    assert resumed.state_dict(7) == state
    own = [batch.corpora[0] for batch in resumed.batches(7)]
    assert own == ([0] * 6 + [1] * 4 if mode == "streaming" else VERSION_1_ROWS)
    assert own != [batch.corpora[0] for batch in fresh.batches(7)]
    with pytest.raises(UserError, match="weights: "):
        loader(corpora, **settings | {"weights": [2, 3]}).load_state_dict(state)


VERSION_1_ROWS = [1, 1, 0, 0, 0, 1, 0, 0, 1, 1]


@given(mode=MODES)
def test_weights_may_change_only_after_the_current_step(mode: str) -> None:
    corpora = [Memory([170] * 8), Memory([90] * 14), Memory([80] * 14)]
    settings = {"rows": 10, "mode": mode}
    state = loader(corpora[:2], **settings, weights=[7, 3]).state_dict(50)
    changes = [{"step": 50, "weights": [1, 1, 4]}]
    other = loader(corpora, **settings, weights=[0.7, 0.3, 0], weight_changes=changes)
    other.load_state_dict(state)
    before = loader(corpora[:2], **settings, weights=[7, 3])
    for step in (0, 49):
        assert all(
            np.array_equal(a.input_ids, b.input_ids)
            for a, b in zip(before.batches(step), other.batches(step), strict=True)
        )
    with pytest.raises(UserError, match="weights: "):
        loader(
            corpora, **settings, weights=[0.7, 0.3, 0], weight_changes=[{"step": 49, "weights": [1, 1, 4]}]
        ).load_state_dict(state)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dp", [1, 3])
@settings(max_examples=15)
@given(documents=DOCUMENTS, batches=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=3))
def test_changed_batch_size_continues_with_the_next_row(
    order: int, dp: int, documents: str, batches: list[tuple[int, int]]
) -> None:
    """Compared with steps of one row each, which read the series row by row."""
    corpora, mixed = [Memory([170] * 8), Memory([90] * 14)], {"documents": documents, "weights": [3, 2]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.serve.loader.ORDER_VERSION", order)
        first, step, rows, state = 0, 0, 7, loader(corpora, rows=7, **mixed).state_dict(0)
        for later, count in batches:
            first, step, rows = first + later * rows, step + later, count
            resumed = loader(corpora, rows=count, **mixed)
            resumed.load_state_dict(json.loads(json.dumps(state | {"step": step})))
            state = resumed.state_dict(step)
        single = loader(corpora, rows=1, **mixed)
    ranks = [loader(corpora, rows=rows, dp=dp, dp_rank=rank, micro_rows=2, **mixed) for rank in range(dp)]
    for rank in ranks:
        rank.load_state_dict(state)
    for late in range(3):
        found = [batch.input_ids[batch.rows != MASKED] for rank in ranks for batch in rank.batches(step + late)]
        expected = [single.batches(first + late * rows + place)[0].input_ids for place in range(rows)]
        assert np.array_equal(np.concatenate(found), np.concatenate(expected))
        assert ranks[0].consumed(step + late).tolist() == single.consumed(first + late * rows).tolist()


@pytest.mark.parametrize("dp", [1, 3])
@settings(max_examples=15)
@given(
    documents=DOCUMENTS,
    plan=st.lists(
        st.tuples(st.integers(1, 12), st.integers(3, 9)), min_size=1, max_size=3, unique_by=lambda each: each[0]
    ),
    stops=st.lists(st.integers(0, 14), max_size=2),
    changed=st.booleans(),
)
def test_planned_batch_sizes_do_not_depend_on_restarts_or_ranks(
    dp: int, documents: str, plan: list[tuple[int, int]], stops: list[int], changed: bool
) -> None:
    """Compared with steps of one row each, which read the series row by row; a weight changes during the run."""
    corpora = [Memory([170] * 8), Memory([90] * 14)]
    plan = sorted(plan)
    rows_at = [next(rows for start, rows in [*reversed(plan), (0, 4)] if start <= step) for step in range(17)]
    firsts = [sum(rows_at[:step]) for step in range(18)]
    weights = [{"step": 6, "weights": [1, 4]}]
    mixed = {"documents": documents, "weights": [3, 2]}
    single = loader(corpora, rows=1, **mixed, weight_changes=[{"step": firsts[6], "weights": [1, 4]}])
    ranks = [
        loader(corpora, rows=4, changes=plan, dp=dp, dp_rank=rank, micro_rows=2, **mixed, weight_changes=weights)
        for rank in range(dp)
    ]
    state = None
    for step in range(17):
        if step in stops:  # the run is resumed here, on other ranks, and the rest may be planned again
            state = json.loads(json.dumps(ranks[0].state_dict(step)))
            assert state["rows"] == rows_at[step]
            for rank in ranks:
                rank.load_state_dict(state)
        found = [batch.input_ids[batch.rows != MASKED] for rank in ranks for batch in rank.batches(step)]
        expected = [single.batches(firsts[step] + place)[0].input_ids for place in range(rows_at[step])]
        assert np.array_equal(np.concatenate(found), np.concatenate(expected))
        assert ranks[0].consumed(step).tolist() == single.consumed(firsts[step]).tolist()
    if changed and state is not None:
        step = state["step"]
        other = loader(corpora, rows=5, changes=[(step + 1, 2)], **mixed, weight_changes=weights)
        other.load_state_dict(state)
        for late, begin, count in [(0, firsts[step], 5), (1, firsts[step] + 5, 2), (2, firsts[step] + 7, 2)]:
            # Only before the weights change, or after: the two runs change them at different rows of the series.
            if step >= 6 or (step + late < 6 and begin + count <= firsts[6]):
                expected = [single.batches(begin + place)[0].input_ids for place in range(count)]
                assert np.array_equal(
                    np.concatenate([b.input_ids for b in other.batches(step + late)]), np.concatenate(expected)
                )


def test_changing_the_number_of_streaming_rows_is_refused() -> None:
    state = loader(Memory(LENGTHS), "streaming").state_dict(5)
    with pytest.raises(UserError, match="6 rows per step from step 5 on: each streaming row reads its own part"):
        loader(Memory(LENGTHS), "streaming", rows=6).load_state_dict(state)


def test_passes_over_each_corpus_are_counted() -> None:
    served = loader([Memory([170] * 8), Memory([90] * 14)], rows=10, weights=[3, 2])
    assert served.sequences == [43, 40]
    read = Counter(int(b.corpora[0]) for step in range(60) for b in served.batches(step))
    assert served.consumed(60).tolist() == [read[0], read[1]] == [360, 240]
    assert served.passes(60) == [360 / 43, 240 / 40]


@pytest.mark.parametrize("dp, sp", [(1, 1), (2, 2), (4, 1)])
def test_state_does_not_depend_on_the_number_of_ranks(dp: int, sp: int) -> None:
    assert loader(Memory(LENGTHS), dp=dp, sp=sp).state_dict(5) == loader(Memory(LENGTHS)).state_dict(5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sequence_length": 36}, "36 is not a multiple of block x sp = 8 x 1"),
        ({"sp": 3}, "32 is not a multiple of block x sp = 8 x 3"),
        ({"sequence_length": 4096}, "are fewer than one sequence of 4096"),
        ({"mode": "streaming", "rows": 64}, "64 rows, but only"),
    ],
)
def test_invalid_sizes_give_one_clear_message(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader(Memory(LENGTHS), **settings)


def test_served_tokens_equal_the_prepared_corpus(make_corpus: Any) -> None:
    from_disk = Corpus.open(str(make_corpus([30_000, 12, 700, 9_000])))
    served = loader(from_disk, sequence_length=512, block=64)
    for step in range(3):
        for batch in served.batches(step):
            cuts = batch.cuts
            for place, count, document, offset in zip(cuts.place, cuts.count, cuts.document, cuts.offset, strict=True):
                expected = from_disk.document(document)[offset : offset + count]
                assert np.array_equal(batch.input_ids[0, place : place + count], expected)


def test_corpora_with_different_tokenizers_are_refused(make_corpus: Any, tmp_path: Path) -> None:
    first, second = make_corpus([90], "first"), make_corpus([90], "second")
    manifest = second / "manifest.json"
    sha = json.loads(manifest.read_text())["tokenizer"]["sha256"]
    model = (second / "tokenizer.model").read_bytes() + b"\x52\x00"
    (second / "tokenizer.model").write_bytes(model)
    manifest.write_text(manifest.read_text().replace(sha, hashlib.sha256(model).hexdigest()))
    with pytest.raises(UserError, match="another tokenizer"):
        open_corpora(DataConfig(corpus=[{"corpus": str(first)}, {"corpus": str(second)}]))


@pytest.mark.parametrize("documents", ["joined", "isolated"])
@pytest.mark.parametrize("sp", [1, 2])
def test_concatenated_slices_equal_the_sequence(documents, sp):
    """Every rank's part of every slice, in order, equals the whole sequences that a single rank gets."""
    sizes = {"documents": documents, "micro_rows": 2}
    whole = loader(Memory(LENGTHS), **sizes).batches(3)
    ranks = [loader(Memory(LENGTHS), slice_tokens=16, sp=sp, sp_rank=rank, **sizes).batches(3) for rank in range(sp)]
    for index, micro_batch in enumerate(whole):
        parts = [rank[index][s] for s in range(2) for rank in ranks]
        assert [part.begin for part in parts] == list(range(0, 32, 16 // sp))
        for name in ("input_ids", "labels", "loss_mask", "starts"):
            wanted = getattr(micro_batch, name)
            if wanted is None:
                assert all(getattr(part, name) is None for part in parts)
            else:
                assert np.array_equal(np.concatenate([getattr(part, name) for part in parts], axis=1), wanted)


def test_tokens_of_slices_are_held_once_in_memory():
    (slices,) = loader(Memory([5000]), sequence_length=4096, rows=1, slice_tokens=64).batches(0)
    held = sum(stored.tokens.nbytes for stored in slices._stored)
    assert held == 4 * (4096 + 64)  # four bytes per token; the label after each slice is the next one's first token
    assert slices[0] is not slices[0]  # created again at every access


def test_invalid_slice_sizes_are_refused():
    for tokens, sp in ((24, 1), (4, 1), (8, 2)):
        with pytest.raises(UserError, match=f"slices of {tokens} tokens"):
            loader(Memory(LENGTHS), slice_tokens=tokens, sp=sp)


@pytest.mark.parametrize("sizes", [{}, {"slice_tokens": 16}, {"sp": 2}])
@pytest.mark.parametrize("documents", ["joined", "isolated", "masked"])
def test_arrays_of_a_batch_are_contiguous(documents: str, sizes: dict[str, int]) -> None:
    (found,) = loader(Memory([40, 90, 17]), documents=documents, rows=2, micro_rows=2, **sizes).batches(0)
    for part in slices_of(found):
        arrays = {name: value for name, value in vars(part).items() if isinstance(value, np.ndarray)}
        assert {"input_ids", "labels", "loss_mask"} <= arrays.keys()
        assert [name for name, array in arrays.items() if not array.flags.c_contiguous] == []
