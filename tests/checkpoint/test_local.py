"""Local copies: their files, which of them a run resumes from, and a killed run that resumes from them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bst_base.json_lines import read_lines
from bst_base.settings import dump, parse
from bst_dist.checkpoint import local, local_copy, neighbours
from bst_dist.checkpoint.callbacks import Evaluated
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import CheckpointError, committed, step_of
from bst_dist.checkpoint.fragments import MOMENTS, WEIGHT, Fragment
from bst_dist.checkpoint.host_copy import Copied
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.local import LocalCopies
from bst_dist.checkpoint.local_copy import Key, LocalCopy, write_copy
from bst_dist.checkpoint.local_search import Found, fetch_copies
from bst_dist.checkpoint.neighbours import Neighbours, keepers
from bst_dist.checkpoint.shards import Piece
from bst_dist.checkpoint.snapshot import Identity, Position, Snapshots
from bst_dist.config import Recipe
from bst_dist.faults import ledger
from bst_dist.parallel.mesh import Mesh
from bst_dist.report.metrics import FILE
from bst_dist.study.comparison.equality import equality
from bst_dist.train.run import train
from bst_dist.train.start.request import Request
from tests.checkpoint.alone import Alone
from tests.checkpoint.damage import flip

BST = Path(sys.executable).with_name("bst")

# Neighbours


def test_a_copy_is_kept_by_the_same_local_rank_of_the_next_node():
    assert keepers(["a", "a", "b", "b", "c", "c"]) == [2, 3, 4, 5, 0, 1]
    assert keepers(["b", "a", "b", "a"]) == [1, 0, 3, 2]  # ranks of a node are not consecutive
    assert keepers(["a"] * 4) == [None] * 4


@given(st.lists(st.integers(1, 6), min_size=2, max_size=7))
def test_no_rank_keeps_two_copies_or_one_of_its_own_node(sizes):
    nodes = [str(node) for node, size in enumerate(sizes) for _ in range(size)]
    found = keepers(nodes)
    kept = [keeper for keeper in found if keeper is not None]
    assert len(kept) == len(set(kept))
    assert all(nodes[keeper] != nodes[rank] for rank, keeper in enumerate(found) if keeper is not None)
    if 2 * max(Counter(nodes).values()) <= len(nodes):
        assert len(kept) == len(nodes)


def exchange(ranks: Any, folder: Path, sizes: list[int], nodes: list[str]) -> None:
    """Let every rank send its file to its neighbour; some files are larger than one message."""
    neighbours.CHUNK = 1000
    own, kept = folder / f"own-{ranks.rank}", folder / f"kept-{ranks.rank}"
    if sizes[ranks.rank]:
        own.write_bytes(os.urandom(sizes[ranks.rank]))
    around = Neighbours(ranks.rank, nodes)
    for _ in range(2):
        around.exchange(own, kept)
    ranks.barrier()
    if around.kept is not None:
        there = folder / f"own-{around.kept}"
        assert (kept.read_bytes() if kept.exists() else b"") == (there.read_bytes() if there.exists() else b"")
    assert [path.name for path in folder.glob("*.partial")] == []


@pytest.mark.ranks
def test_copies_of_any_size_reach_the_neighbour(on_ranks, tmp_path):
    on_ranks(3, exchange, tmp_path, [2500, 0, 999], ["a", "b", "b"])


def lend(ranks: Any, roots: list[Path]) -> tuple[tuple[list[int], str | None], str | None, int]:
    """Fetch copies when rank 1's node has lost its copy and rank 0's node has it; rank 2's node has its own."""
    key, root = Key(0, 7, 1), roots[ranks.rank]
    root.mkdir(exist_ok=True)
    for rank in {0: (0, 1), 1: (), 2: (2,)}[ranks.rank]:
        write(key.path(root, rank))
    ranks.barrier()
    found = Found(key, Layout(3, 1, 1), {0: [0], 1: [0], 2: [2]})
    taken = fetch_copies(ranks, root, [0, 1, 2], found)
    assert LocalCopy(key.path(root, ranks.rank)).intact()
    if ranks.rank == 1:  # it cannot be read any more
        flip(key.path(root, 1), 40)
    found.holders[1] = [1]
    return taken, fetch_copies(ranks, root, [0, 1, 2], found)[1], ranks.phases.exchanges


@pytest.mark.ranks
def test_a_lost_copy_is_fetched_from_the_node_that_keeps_it(on_ranks, tmp_path):
    ended = on_ranks(3, lend, [tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    for taken, damaged, _ in ended:
        assert taken == ([1], None)
        assert damaged.startswith("rank 1's: damaged on ")
    assert len({exchanges for *_, exchanges in ended}) == 1  # the watchdog compares them at a later hang


# Files


def write(path: Path) -> dict[str, Any]:
    values = {kind: torch.arange(5.0) + place for place, kind in enumerate((WEIGHT, *MOMENTS))}
    copied = [Copied(Piece("a", (10,), 5, 5), kind, [value[:2], value[2:]]) for kind, value in values.items()]
    own = {"rng": {"torch": torch.get_rng_state()}, "carried": []}
    write_copy(path, copied, own, {"step": 7, "layout": vars(Layout(2, 1, 1))})
    return own


def test_a_copy_is_read_as_it_was_written(tmp_path):
    own = write(tmp_path / "a" / "rank-00001")
    copy = LocalCopy(tmp_path / "a" / "rank-00001")
    assert copy.intact()
    assert copy.manifest["step"] == 7
    assert torch.equal(copy.own()["rng"]["torch"], own["rng"]["torch"])
    for place, name in enumerate(("weight/a", "exp_avg/a", "exp_avg_sq/a")):
        into = torch.empty(3)
        copy.shards().fill([(name, 6, into)])
        assert into.tolist() == [1.0 + place, 2.0 + place, 3.0 + place]


def test_a_truncated_or_changed_copy_is_rejected(tmp_path):
    path = tmp_path / "rank-00000"
    write(path)
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 97), len(whole) - 1]:
        for torn in (whole[:place], whole[:place] + bytes(len(whole) - place)):
            path.write_bytes(torn)
            assert not trusted(path) or torn == whole
        path.write_bytes(whole)
        flip(path, place)
        assert not trusted(path)


def trusted(path: Path) -> bool:
    try:
        return LocalCopy(path).intact()
    except CheckpointError:
        return False


def test_a_writer_that_fails_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(local_copy, "write", lambda *_: full())
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "rank-00000")
    assert not list(tmp_path.iterdir())


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/dev/shm/x")


# One rank's life


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
        self.copies = LocalCopies(folder / "run", self.snapshots, self.ranks, epoch, resume)

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
        return sorted(Key.of(path.name).step for path in self.copies.root.iterdir())


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


def test_a_fresh_start_or_disabled_copies_remove_old_copies(tmp_path):
    for otherwise in ({"resume": False}, {"local_every": 0}):
        run = Run(tmp_path)
        run.train(1)
        run.there()
        later = Run(tmp_path, 2, **otherwise)
        assert not run.copies.root.exists()
        assert later.find() is None


def test_a_copied_run_directory_has_no_local_copies(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    run.there()
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "run")
    copied = LocalCopies(tmp_path / "elsewhere" / "run", run.snapshots, run.ranks, 2, resume=True)
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
    monkeypatch.setattr(local, "write_copy", full)
    run.train(2, 3, 4)
    (said,) = run.ranks.said
    assert said.startswith("no local copies (checkpoint.local_every) in the rest of this start: ")
    assert said.endswith("cannot write /dev/shm/x: No space left on device")
    assert not run.copies.root.exists()


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_a_rank_that_cannot_connect_to_its_neighbours_stops_local_copies_but_not_training(
    recipe_file, on_ranks, tmp_path, monkeypatch, capfd
):
    def connect(rank: int, places: list[str]) -> Neighbours:
        if rank == 1:
            raise RuntimeError("Gloo connectFullMesh failed")
        return Neighbours(rank, places)

    monkeypatch.setattr(local, "Neighbours", connect)
    changes = ["checkpoint.local_every=1", f"checkpoint.local_directory={tmp_path / 'memory'}"]
    request = Request(recipe_file(), changes, tmp_path / "run", False, 2)
    on_ranks(2, lambda ranks: train(request, ranks))
    assert [line["step"] for line in read_lines(tmp_path / "run" / FILE) if line["kind"] == "train"] == [1, 2]
    said = capfd.readouterr().out
    assert "no local copies (checkpoint.local_every) in the rest of this start: " in said
    assert "Gloo connectFullMesh failed" in said


def test_without_room_for_all_copies_none_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Room(1700))
    run = Run(tmp_path)
    assert not run.copies.on
    assert "MB free in" in run.ranks.said[0]
    assert not run.copies.root.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: Room(1800))  # three copies of 50 values, three numbers each
    assert Run(tmp_path).copies.on


class Room:
    def __init__(self, free: int) -> None:
        self.free = free


def test_metrics_are_synced_before_a_copy_is_written(tmp_path, monkeypatch):
    run, synced = Run(tmp_path), []
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / FILE).write_text("{}\n")
    original = local.write_copy
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(str(Path(f"/proc/self/fd/{file}").readlink())))
    monkeypatch.setattr(local, "write_copy", lambda *given: synced.append("copy") or original(*given))
    run.train(1)
    run.there()
    assert synced[:2] == [str(tmp_path / "run" / FILE), "copy"]


# The whole program


@pytest.mark.ranks
@pytest.mark.long
def test_a_run_with_killed_ranks_resumes_from_local_copies(tmp_path, settings):
    """There is no checkpoint before the end, so the run can only resume from local copies."""
    memory = tmp_path / "memory"
    settings["train"] |= {"steps": 60}
    settings["evaluation"] |= {"every": 7}
    settings["checkpoint"] = {"every": 0, "local_every": 1, "local_directory": str(memory)}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(parse(Recipe, settings)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = [BST, "train", recipe, "--ranks", "2", "--run-dir", whole, "checkpoint.local_every=0"]
    subprocess.run(list(map(str, command)), check=True, env=environment, timeout=600)

    command = [BST, "launch", recipe, "ranks=2", "--run-dir", run, "--launcher", "local", "--max-restarts", "3"]
    with (tmp_path / "log").open("wb") as log:
        launched = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
    reached = []
    try:
        for rank in (1, 0):
            wait_for_steps(run, (reached[-1] if reached else 0) + 8, launched)
            psutil.Process(pid_of(launched, rank)).send_signal(signal.SIGKILL)
            reached.append(wait_for_start(run, len(reached) + 2, launched))
        assert launched.wait(600) == 0, (tmp_path / "log").read_text()
    finally:
        launched.kill()
    said = (tmp_path / "log").read_text()
    assert said.count("of the local copies in") == 2, said
    assert f"copies every step in {memory}, one node; up to" in said
    found = equality(run, whole)
    assert found.passed, found
    entries = ledger.read(run, 99, 99)
    assert [(entry.action, entry.step) for entry in entries] == [("resumed", step) for step in reached]
    dropped = [line for line in read_lines(run / "metrics.dropped.jsonl") if line["kind"] == "train"]
    assert len(dropped) <= len(reached)  # at most one repeated step for each kill
    assert not list(memory.iterdir())


def wait_for_steps(run: Path, steps: int, launched: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while sum(line["kind"] == "train" for line in read_lines(run / FILE)) < steps:
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_start(run: Path, number: int, launched: subprocess.Popen[bytes]) -> int:
    """Wait for the run's start with this number, counted from 1; return the step that it continues from."""
    deadline = time.monotonic() + 600
    while len(starts := json.loads((run / "environment.json").read_text())["starts"]) < number:
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "from_local_copies" in starts[-1]
    return starts[-1]["from_step"]


def pid_of(launched: subprocess.Popen[bytes], rank: int) -> int:
    for process in psutil.Process(launched.pid).children(recursive=True):
        if "bst_dist.train" in process.cmdline() and process.environ().get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"there is no rank {rank}")


def test_a_key_is_read_back_from_its_text():
    assert Key.of(str(Key(3, 12, 4))) == Key(3, 12, 4)
    assert Key.of("step-00000012") is None
    assert max(Key(0, 12, 4), Key(3, 8, 2)) == Key(3, 8, 2)  # newer: more steps were skipped in a roll-back


def test_the_last_step_writes_no_local_copy(tmp_path):
    run = Run(tmp_path)
    (_,), (take,) = run.copies.callbacks(lambda step: at(step), Evaluated())
    take.after_step(Report(1), last=False)
    take.after_step(Report(2), last=True)
    assert run.there() == [1]


class Report:
    def __init__(self, step: int) -> None:
        self.step = step
