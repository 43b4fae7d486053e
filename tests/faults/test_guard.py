"""Steps that the guard refuses: the same decisions on all ranks, in every ZeRO stage, and after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import load_weights, newest_valid
from bst_dist.faults import ledger
from bst_dist.faults.config import GuardConfig
from bst_dist.faults.guard import DivergedError, Guard, RollBack
from bst_dist.faults.ledger import Entry, Ledger
from bst_dist.report.metrics import FILE
from bst_dist.train.run import train
from bst_dist.train.rundir import read_outcome
from bst_dist.train.start.request import Request
from bst_dist.train.step import Trainer
from data_pipeline.serve.order.sizes import BatchSizes

Go = Callable[..., None]


def guard(losses: list[float] = (), **settings: Any) -> Guard:
    return Guard(GuardConfig(spike_window=8, **settings), Ledger(), losses)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_stops_by_default_and_is_recorded(value):
    judge = guard()
    with pytest.raises(DivergedError, match=r"the loss is -?(nan|inf) in step 5"):
        judge.loss(value, step=4, skipped=0, rate=1e-3)
    with pytest.raises(DivergedError, match="the gradient norm is"):
        judge.gradient(value, step=5, skipped=0, rate=1e-3)
    assert [(entry.step, entry.action) for entry in judge.ledger.entries] == [(5, "stop"), (6, "stop")]


def test_a_spike_is_a_loss_far_above_the_median_of_the_window():
    losses = [3.0, 3.1, 2.9, 3.0, 3.2, 2.8, 3.0, 3.1]  # median 3.0, absolute deviations' median 0.1
    judge = guard([9.0, *losses], spike="skip", spike_deviations=5.0)
    limit = 3.0 + 5 * 1.4826 * 0.1
    assert judge.loss(limit - 1e-3, 9, 0, 1.0) is None
    assert judge.loss(limit + 1e-3, 9, 0, 1.0).action == "skip"
    assert judge.loss(judge.limit, 9, 0, 1.0) is None  # the comparison on the device gives the same
    assert guard(losses[1:], spike="skip").loss(1e9, 8, 0, 1.0) is None  # the window is not yet full
    judge.taken(30.0)  # a spike that was taken changes the median by one rank only
    assert judge.loss(limit + 0.1, 10, 0, 1.0).action == "skip"
    assert guard(losses).loss(1e9, 9, 0, 1.0) is None  # ignored unless asked for
    assert guard([3.0] * 8, spike="skip").loss(3.0 + 1e-3, 9, 0, 1.0) is None  # and nothing deviates


def test_skipped_steps_are_limited_within_a_window_of_data():
    judge = guard(non_finite="skip", most=2, within=10)
    for step in (0, 5, 11):  # the first is outside of the limit when the third comes
        assert judge.loss(math.nan, step, 0, 1.0).action == "skip"
    with pytest.raises(DivergedError, match="2 such steps were already skipped within 10"):
        judge.loss(math.nan, 12, 0, 1.0)
    assert judge.ledger.entries[-1].action == "stop"
    entry = guard(non_finite="roll-back").loss(math.nan, 3, 0, 1.0)
    assert entry == Entry(4, 0, "the loss is nan in step 4", "roll-back")
    assert str(RollBack(entry)) == "the loss is nan in step 4"


def test_ledger_entries_are_counted_by_their_data_step():
    """Step 5 was taken twice, the second time with the seventh step's data. Only bad steps count."""
    found = Ledger([Entry(5, 0, "a", "skip"), Entry(5, 2, "b", "skip"), Entry(5, 2, "c", ledger.CHANGE)])
    assert [found.lately(8, within) for within in (1, 2, 3)] == [1, 1, 2]
    assert found.lately(7, 10) == 1


def test_a_ledger_drops_entries_newer_than_the_checkpoint(tmp_path):
    entries = [Entry(2, 0, "a", "skip"), Entry(6, 0, "b", "roll-back", 4), Entry(5, 2, "c", "skip")]
    (tmp_path / ledger.FILE).touch()
    Ledger(entries, tmp_path / ledger.FILE)
    assert ledger.read(tmp_path, step=4, skipped=0) == entries[:1]  # before the roll-back
    assert ledger.read(tmp_path, step=4, skipped=2) == entries[:2]  # after it
    assert ledger.read(tmp_path, step=5, skipped=2) == entries
    again = Ledger(entries[:2], tmp_path / ledger.FILE)
    (gone,) = read_lines(tmp_path / "ledger.dropped.jsonl")
    assert (gone["step"], gone["cause"]) == (5, "c")
    again.add(Entry(7, 2, "d", "skip"))
    assert ledger.read(tmp_path, step=9, skipped=2) == [*entries[:2], Entry(7, 2, "d", "skip")]


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


SPOILT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "loss": lambda total: total * math.nan,
    "gradient": _InfiniteGradient.apply,
    "spike": lambda total: total * 4,
}


@pytest.fixture
def go(recipe_file, tmp_path, on_ranks, unmeasured, monkeypatch) -> Go:
    """``go(run, how, bad, *overrides, …)`` trains on two ranks; the last one corrupts the loss of `bad` data."""
    recipe = recipe_file(
        train={"steps": 14, "sequences": 4, "micro_sequences": 1},
        evaluation={"every": 4},
        guard={"spike_window": 8, "spike_deviations": 20.0},
    )
    original = Trainer.step

    def train_(run: str, how: str, bad: tuple[int, ...], *overrides: str, until: int | None = None) -> None:
        def step(self: Trainer, step: int, *args: Any) -> Any:
            def forward(*args: Any, **named: Any) -> Any:
                losses = honest(*args, **named)
                spoilt = self.ranks.rank == 1 and step + self.skipped in bad
                if not spoilt:
                    return losses
                return losses._replace(total=SPOILT[how](losses.total), per_token=SPOILT[how](losses.per_token))

            honest, self.engine.forward = self.engine.forward, forward
            try:
                return original(self, step, *args)
            finally:
                self.engine.forward = honest

        monkeypatch.setattr(Trainer, "step", step)
        on_ranks(2, lambda ranks: train(Request(recipe, overrides, tmp_path / run, True, until), ranks))

    return train_


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "how"), [(0, "loss"), (1, "gradient"), (2, "spike"), (3, "loss")])
def test_a_skipped_step_changes_no_weight(go, tmp_path, stage, how):
    policy = ("guard.non_finite=skip", "guard.spike=skip", "checkpoint.every=1", "checkpoint.keep_last=9")
    go("run", how, (11,), *policy, f"deepspeed=ds_configs/zero{stage}.json", until=13)
    lines, entries = read_lines(tmp_path / "run" / FILE), ledger.read(tmp_path / "run", 99, 99)
    assert [(entry.step, entry.action) for entry in entries] == [(12, "skip")]
    steps = [(line["step"], line["kind"]) for line in lines if line["kind"] in ("train", "skipped")]
    assert steps == [(n, "skipped" if n == 12 else "train") for n in range(1, 14)]
    before, held, after = (load_weights(tmp_path / "run" / "checkpoints" / f"step-{n:08d}") for n in (11, 12, 13))
    assert all(torch.equal(before[name], held[name]) for name in before)
    assert all(torch.isfinite(after[name]).all() for name in after)
    assert not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.ranks
@pytest.mark.parametrize(("how", "policy"), [("loss", "skip"), ("spike", "roll-back")])
def test_decisions_are_the_same_after_a_stop_at_any_step(go, tmp_path, assert_same_run, how, policy):
    # Two bad steps of data: the second is reached after the roll-back that the first one causes.
    settings = (
        f"guard.non_finite={policy}",
        f"guard.spike={policy}",
        "data.mode=streaming",
        "train.carry=true",
        "checkpoint.every=4",
    )
    go("whole", how, (10, 13), *settings)
    entries = ledger.read(tmp_path / "whole", 99, 99)
    assert [entry.data_step for entry in entries] == [11, 14]
    if policy == "roll-back":  # both times to step 8: with data 11 on, its steps are 9, 10 (data 12), 11 (data 13)
        assert [(entry.step, entry.skipped, entry.back_to) for entry in entries] == [(11, 0, 8), (11, 3, 8)]
        assert json.loads((newest_valid(tmp_path / "whole") / "manifest.json").read_text())["skipped"] == 6
    for until in (10, 11):  # with checkpoints that the whole run does not have; it rolls back to 8
        go("parts", how, (10, 13), *settings, until=until)
    go("parts", how, (10, 13), *settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert read_outcome(tmp_path / "parts")["finished"]


@pytest.mark.ranks
@pytest.mark.parametrize("sequences", [4, 16])
def test_a_roll_back_past_a_change_of_the_batch_reads_no_row_again_and_leaves_none_out(go, tmp_path, sequences):
    """The batch changed at a resume after the checkpoint that the run rolls back to."""
    policy = ("guard.non_finite=roll-back", "checkpoint.every=4")
    go("run", "loss", (), *policy, "train.sequences=8", until=6)
    go("run", "loss", (7,), *policy, f"train.sequences={sequences}")
    entries = [entry for entry in ledger.read(tmp_path / "run", 99, 99) if entry.action == "roll-back"]
    assert [(entry.step, entry.skipped, entry.back_to) for entry in entries] == [(8, 0, 4)]
    manifest = json.loads((newest_valid(tmp_path / "run") / "manifest.json").read_text())
    assert manifest["skipped"] == 4
    sizes = BatchSizes.from_state(manifest["data"])
    assert sizes.first(8) == 6 * 8 + 2 * sequences  # data steps 0 to 7, as they were read before the roll-back
    assert sizes.first(9) == sizes.first(8) + sequences


BRANCH = ("branch.run=../trunk", "branch.step=8")


@pytest.mark.ranks
def test_a_branch_finds_the_spike_that_the_whole_run_finds(go, tmp_path):
    """The window of its first steps holds losses of the trunk."""
    go("trunk", "spike", (10,), "guard.spike=skip", "schedule.decay_fraction=0", "checkpoint.at=[8]", until=8)
    for _ in range(2):  # also when the branch itself is stopped and resumed
        go("branch", "spike", (10,), "guard.spike=skip", *BRANCH, until=10)
    go("branch", "spike", (10,), "guard.spike=skip", *BRANCH)
    go("whole", "spike", (10,), "guard.spike=skip")
    found, expected = (
        [(line["step"], line["kind"], line["loss_nats"]) for line in read_lines(tmp_path / run / FILE) if "mfu" in line]
        for run in ("branch", "whole")
    )
    assert found == expected[8:]
    assert ledger.read(tmp_path / "branch", 99, 99) == ledger.read(tmp_path / "whole", 99, 99)
    assert [(entry.step, entry.action) for entry in ledger.read(tmp_path / "branch", 99, 99)] == [(11, "skip")]


@pytest.mark.ranks
def test_a_branch_counts_the_skipped_steps_of_its_trunk(go, tmp_path):
    policy = ("guard.non_finite=skip", "guard.most=1")
    go("trunk", "loss", (3, 10), *policy, "schedule.decay_fraction=0", "checkpoint.at=[8]", until=8)
    with pytest.raises(AssertionError, match="1 such steps were already skipped within 1000"):
        go("branch", "loss", (3, 10), *policy, *BRANCH)
    assert [(entry.step, entry.action) for entry in ledger.read(tmp_path / "branch", 99, 99)] == [(11, "stop")]


@pytest.mark.ranks
def test_a_diverged_run_stops_by_default_and_keeps_its_checkpoints(go, tmp_path):
    with pytest.raises(AssertionError, match="DivergedError: the loss is nan in step 5"):
        go("run", "loss", (4,))
    assert newest_valid(tmp_path / "run").name == "step-00000004"
    assert [line["step"] for line in read_lines(tmp_path / "run" / FILE) if line["kind"] == "train"] == [1, 2, 3, 4]
    assert "the loss is nan" in read_outcome(tmp_path / "run")["diverged"]


@pytest.mark.ranks
def test_a_roll_back_without_a_checkpoint_stops_the_run(go, tmp_path):
    with pytest.raises(
        AssertionError, match="DivergedError: the loss is nan in step 2, and there is no checkpoint yet"
    ):
        go("run", "loss", (1,), "guard.non_finite=roll-back")
    assert "no checkpoint yet" in read_outcome(tmp_path / "run")["diverged"]
    assert [entry.action for entry in ledger.read(tmp_path / "run", 99, 99)] == ["stop"]
