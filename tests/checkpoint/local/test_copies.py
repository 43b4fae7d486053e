"""Which local copies a run keeps, resumes from and removes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bst_base.json_lines import read_lines
from bst_dist.checkpoint.callbacks import Evaluated
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import committed, newest_valid, step_of
from bst_dist.checkpoint.fragments import MOMENTS, WEIGHT, Fragment
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.local import writing
from bst_dist.checkpoint.local.copies import open_copies
from bst_dist.checkpoint.local.exchange import Exchange, Node
from bst_dist.checkpoint.local.file import Key
from bst_dist.checkpoint.local.search import folders
from bst_dist.checkpoint.shards import Piece
from bst_dist.checkpoint.snapshot import Identity, Position, Snapshots
from bst_dist.faults import status
from bst_dist.faults.signals import Notice
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.ranks import Ranks
from bst_dist.report.metrics import FILE
from bst_dist.train.run import train
from bst_dist.train.rundir import read_outcome
from bst_dist.train.start.request import Request
from bst_dist.train.step import Trainer
from tests.checkpoint.alone import Alone
from tests.checkpoint.damage import flip
from tests.checkpoint.local.written_copy import full


class Tensor:
    """A state with one tensor, filled with the step."""

    def __init__(self) -> None:
        self.values = {kind: torch.zeros(50) for kind in (WEIGHT, *MOMENTS)}

    def held(self) -> list[Fragment]:
        return [Fragment(Piece("a", (50,), 0, 50), self.values)]

    owned = held

    def moments(self) -> dict[str, int]:
        return {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (50,)}

    def updates(self) -> int:
        return int(self.values[WEIGHT][0])

    def filled(self, step: int, updates: int) -> None:
        assert all(tensor.tolist() == [step] * 50 for tensor in self.values.values())


class Run:
    """One start of a run that takes steps like training."""

    def __init__(
        self, folder: Path, epoch: int = 1, resume: bool = True, layout: Layout | None = None, **settings: Any
    ) -> None:
        config = CheckpointConfig(**{"every": 0, "local_every": 1, "local_directory": folder / "memory"} | settings)
        self.ranks, self.state, self.taken = Alone(), Tensor(), 0
        identity = Identity("recipe", {}, 0, layout or Layout(1, 1, 0), Rows(1, 1, Mesh(1, 0)))
        self.snapshots = Snapshots(folder / "run", self.state, self.ranks, identity, config)
        self.copies = open_copies(folder / "run", self.snapshots, self.ranks, epoch, resume)

    def train(self, *steps: int, skipped: int = 0) -> None:
        for step in steps:
            for tensor in self.state.values.values():
                tensor.fill_(step)
            self.copies.settle()
            if self.copies.due(step):
                self.copies.take(at(step, skipped), step / 10)

    def save(self, step: int) -> None:
        self.snapshots.start(at(step), None)
        self.snapshots.finish()

    def find(self, refusal: str | None = None) -> int | None:
        found = self.copies.find(lambda step: step != 99, refusal)
        return found and found[0].step

    def there(self) -> list[int]:
        self.copies.settle()
        return sorted(Key.of(path.name).step for path in folders(self.copies.root))


def at(step: int, skipped: int = 0) -> Position:
    return Position(step, step, {}, [], skipped)


def test_the_newest_local_copy_is_used_unless_a_checkpoint_is_newer(tmp_path):
    first = Run(tmp_path)
    first.train(1, 2, 3)
    assert first.there() == [2, 3]
    assert Run(tmp_path, 2).find() == 3
    first.save(3)
    assert Run(tmp_path, 3).find() == 3  # as new as the checkpoint, and faster to load
    first.save(4)
    assert Run(tmp_path, 4).find() is None


def test_copies_that_do_not_match_the_run_are_not_used(tmp_path):
    run = Run(tmp_path)
    run.train(1, 2)
    run.there()
    other = Run(tmp_path, 2, layout=Layout(1, 1, 2))
    assert other.find() is None
    assert "step 2 are not used: they are of 1 rank (dp 1 x sp 1, ZeRO-0), and this is" in other.ranks.said[0]
    changed = Run(tmp_path, 2)
    assert changed.find("optimizer.learning_rate: 1, 2") is None
    assert changed.ranks.said[0].endswith("step 2 are not used: optimizer.learning_rate: 1, 2")
    run.train(99)  # metrics.jsonl has no line of this step
    run.there()
    again = Run(tmp_path, 3)
    assert again.find() == 2
    flip(Key(0, 2, 1).path(run.copies.root, 0), 200)
    torn = Run(tmp_path, 3)
    assert torn.find() is None
    assert "step 2 are not used: rank 0's: damaged on" in torn.ranks.said[0]


def test_copies_are_kept_until_newer_copies_or_checkpoints_exist(tmp_path):
    run = Run(tmp_path)
    run.train(1, 2, 3)
    run.there()
    again = Run(tmp_path, 2)
    assert again.find() == 3
    again.copies.begin(at(3), until=9)
    assert again.there() == [3]
    again.train(4)
    assert again.there() == [3, 4]
    again.copies.remove()
    assert again.there() == [3, 4]  # newer than any checkpoint, so they stay
    again.save(4)
    again.copies.remove()
    assert not again.copies.root.exists()


def test_a_fresh_start_removes_old_copies(tmp_path):
    for otherwise in ({"resume": False}, {"resume": False, "local_every": 0}):
        run = Run(tmp_path)
        run.train(1)
        run.there()
        later = Run(tmp_path, 2, **otherwise)
        assert not run.copies.root.exists()
        assert later.copies is None or later.find() is None


def no_room(run: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Room(-(10**6)))
    return Run(run, 2)


def no_directory(run: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The other ranks of the node may read it."""

    def here(_: Path) -> Node:
        raise PermissionError(errno.EACCES, "Permission denied", "/dev/shm/bst-run")

    monkeypatch.setattr(Node, "here", here)
    return Run(run, 2)


def no_connection(run: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    def connect(*_: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed")

    monkeypatch.setattr(writing, "Exchange", connect)
    return Run(run, 2)


@pytest.mark.parametrize(
    "start",
    [no_room, no_directory, no_connection, lambda run, _: Run(run, 2, local_every=0)],
    ids=["no room", "no directory", "no connection", "local_every=0"],
)
def test_a_start_that_can_take_no_copies_resumes_from_old_ones(tmp_path, monkeypatch, start):
    run = Run(tmp_path)
    run.train(1, 2, 3)
    run.there()
    with monkeypatch.context() as patch:
        later = start(tmp_path, patch)
    assert later.copies.describe() == ""
    assert later.find() == 3
    later.copies.begin(at(3), until=9)
    assert later.there() == [3]
    later.train(4, 5)
    assert later.there() == [3]  # no new ones, and the old one stays until a checkpoint is as new
    later.snapshots.start(at(5), None, full=False)
    later.snapshots.finish()
    assert later.there() == [3]
    later.save(5)
    later.copies.settle()
    assert not run.copies.root.exists()


def test_a_start_that_takes_no_copies_removes_those_that_it_cannot_use(tmp_path):
    run = Run(tmp_path)
    run.train(1, 2)
    run.save(3)
    run.there()
    later = Run(tmp_path, 2, local_every=0)
    assert later.find() is None
    later.copies.begin(at(3), until=9)
    assert not run.copies.root.exists()


def test_a_copied_run_directory_has_no_local_copies(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    run.there()
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "run")
    copied = open_copies(tmp_path / "elsewhere" / "run", run.snapshots, run.ranks, 2, resume=True)
    assert copied.root.name.startswith("bst-run-")
    assert copied.find(lambda _: True) is None
    assert run.there() == [1]


def test_a_replaced_start_removes_no_copy_of_its_successor(tmp_path):
    dead, successor = Run(tmp_path, 1), Run(tmp_path, 2)
    successor.train(5)
    successor.there()
    dead.train(3, 4, 5)
    assert dead.there() == [4, 5, 5]


def test_a_roll_back_removes_local_copies(tmp_path):
    run = Run(tmp_path)
    run.train(1, 2)
    run.copies.drop()
    assert run.there() == []
    run.train(1, skipped=3)
    assert run.there() == [1]


def test_an_uncommitted_checkpoint_is_written_from_its_local_copy(tmp_path, monkeypatch):
    settings = {"every": 4, "weights_every": 6, "keep_last": 9}
    run = Run(tmp_path, **settings)
    monkeypatch.setattr(type(run.snapshots), "pending", property(lambda self: 4))  # its writing takes long
    run.train(3, 4, 5, 6)
    assert run.there() == [4, 5, 6]
    monkeypatch.undo()
    again = Run(tmp_path, 2, **settings)
    assert again.find() == 6
    assert again.copies.begin(at(6), until=9) == at(6)
    again.snapshots.finish()
    assert [step_of(path) for path in committed(tmp_path / "run")] == [6, 4]
    assert sorted(path.name for path in committed(tmp_path / "run")[0].glob("opt*")) == []  # it has only weights
    assert again.state.values[WEIGHT].tolist() == [6] * 50
    whole = Run(tmp_path, 3, **settings)
    checkpoint, _ = whole.snapshots.newest()
    assert whole.snapshots.load(checkpoint) == at(4)


def test_a_start_that_takes_no_step_still_writes_a_checkpoint(tmp_path):
    run = Run(tmp_path)
    run.train(1, 2)
    run.there()
    again = Run(tmp_path, 2)
    assert again.find() == 2
    again.copies.begin(at(2), until=2)
    assert [step_of(path) for path in committed(tmp_path / "run")] == [2]


def test_a_full_directory_stops_local_copies_but_not_training(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.train(1)
    run.there()
    monkeypatch.setattr(writing, "write_copy", full)
    run.train(2, 3, 4)
    (said,) = run.ranks.said
    assert said.startswith("no new local copies (checkpoint.local_every) in the rest of this start: ")
    assert said.endswith("cannot write /dev/shm/x: No space left on device")
    assert run.there() == [1]  # the last complete one, until a checkpoint is as new
    assert Run(tmp_path, 2).find() == 1
    run.save(4)
    run.copies.settle()
    assert not run.copies.root.exists()


def test_nothing_is_left_when_the_first_copy_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_copy", full)
    run = Run(tmp_path)
    run.train(1, 2)
    assert not run.copies.root.exists()
    run.copies.drop()


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_a_rank_that_cannot_connect_to_its_neighbours_stops_local_copies_but_not_training(
    recipe_file, on_ranks, tmp_path, monkeypatch, capfd
):
    def connect(rank: int, places: list[str]) -> Exchange:
        if rank == 1:
            raise RuntimeError("Gloo connectFullMesh failed")
        return Exchange(rank, places)

    monkeypatch.setattr(writing, "Exchange", connect)
    changes = ["checkpoint.local_every=1", f"checkpoint.local_directory={tmp_path / 'memory'}"]
    request = Request(recipe_file(), changes, tmp_path / "run", False, 2)
    on_ranks(2, lambda ranks: train(request, ranks))
    assert [line["step"] for line in read_lines(tmp_path / "run" / FILE) if line["kind"] == "train"] == [1, 2]
    said = capfd.readouterr().out
    assert "no new local copies (checkpoint.local_every) in the rest of this start: " in said
    assert "Gloo connectFullMesh failed" in said


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("told", ["before the first step", "while it waits for data"])
def test_a_signal_before_the_first_new_step_writes_a_checkpoint_of_the_copies(
    told, recipe_file, on_ranks, tmp_path, monkeypatch
):
    """Other nodes do not have the copies: there the run could not continue."""
    memory, run = tmp_path / "memory", tmp_path / "run"
    recipe = recipe_file(checkpoint={"every": 0, "local_every": 1, "local_directory": str(memory)})
    step = Trainer.step

    def go(ranks: Ranks, resume: bool, notice: Notice | None = None) -> int:
        return train(Request(recipe, [], run, resume, None), ranks, notice)

    def fails(self: Trainer, number: int, *given: Any) -> Any:
        if number == 4:
            raise RuntimeError("killed")
        return step(self, number, *given)

    def stops(ranks: Ranks) -> int:
        def has_no_data(self: Trainer, *_: Any) -> None:
            notice.take(signal.SIGUSR1)
            assert self.context.stop.poll()

        notice = Notice()
        if told == "before the first step":
            notice.take(signal.SIGUSR1)
        else:
            monkeypatch.setattr(Trainer, "step", has_no_data)  # in this forked process
        return go(ranks, True, notice)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fails)
        with pytest.raises(AssertionError, match="killed"):
            on_ranks(1, go, False)
    copied = max(Key.of(path.parent.name).step for path in memory.glob("*/step-*/rank-00000"))
    assert on_ranks(1, stops) == [status.RESUBMIT]
    assert step_of(newest_valid(run)) == read_outcome(run)["step"] == copied >= 3
    assert not list(memory.iterdir())
    assert on_ranks(1, go, True) == [status.DONE]
    assert read_outcome(run)["finished"]


def test_without_room_for_all_copies_none_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Room(1700))
    run = Run(tmp_path)
    assert not run.copies.due(1)
    assert "MB free in" in run.ranks.said[0]
    run.copies.begin(at(0), until=9)
    assert not run.copies.root.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: Room(1800))  # three copies of 50 values, three numbers each
    assert Run(tmp_path).copies.due(1)


class Room:
    def __init__(self, free: int) -> None:
        self.free = free


def test_metrics_are_synced_before_a_copy_is_written(tmp_path, monkeypatch):
    run, synced = Run(tmp_path), []
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / FILE).write_text("{}\n")
    original = writing.write_copy
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(str(Path(f"/proc/self/fd/{file}").readlink())))
    monkeypatch.setattr(writing, "write_copy", lambda *given: synced.append("copy") or original(*given))
    run.train(1)
    run.there()
    assert synced[:2] == [str(tmp_path / "run" / FILE), "copy"]


def test_the_last_step_writes_no_local_copy(tmp_path):
    run = Run(tmp_path)
    (_,), (take,) = run.copies.callbacks(lambda step: at(step), Evaluated())
    take.after_step(Report(1), last=False)
    take.after_step(Report(2), last=True)
    assert run.there() == [1]


class Report:
    def __init__(self, step: int) -> None:
        self.step = step
