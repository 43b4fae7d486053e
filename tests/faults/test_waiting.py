"""A signal while waiting for data that does not arrive ends the wait, and the last complete step is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bst_base.json_lines import read_lines
from bst_base.stopping import STOP_REQUESTED, Stopped
from bst_dist.checkpoint.directory import committed, newest_valid, step_of
from bst_dist.faults import signals, status
from bst_dist.parallel.ranks import Ranks
from bst_dist.train.objective import LanguageModelling
from bst_dist.train.run import train
from bst_dist.train.rundir import read_outcome
from bst_dist.train.start.request import Request
from data_pipeline.serve.prefetch import Prefetcher
from tests.data_pipeline.server import FaultyServer

pytestmark = pytest.mark.ranks
TAR = "train-000000.tar"
STALLED = ["stall"] * 10_000
NEVER_S = 100_000
"""Timeout of a stalled read, so long that only a signal ends it."""
END_S = 200
"""Timeout for the program to end, far more than it needs; it only detects an endless wait."""


@pytest.fixture
def server(corpus: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(corpus)
    yield server
    server.close()


@pytest.fixture
def recipe(recipe_file, server) -> Path:
    return recipe_file(
        data={"corpus": server.url, "prefetch": 2, "storage": {"timeout_s": NEVER_S, "deadline_s": NEVER_S}},
        train={"steps": 100_000},
        evaluation={"every": 100_000},
        checkpoint={"every": 100_000},
    )


class Training:
    """`bst train` on two ranks, in its own process group."""

    def __init__(self, recipe: Path, run: Path) -> None:
        self.run, self.log = run, run.with_suffix(".log")
        command = [Path(sys.executable).with_name("bst"), "train", recipe, "--ranks", "2", "--run-dir", run, "--resume"]
        with self.log.open("w") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    def steps(self) -> int:
        assert self.process.poll() is None, self.log.read_text()
        return sum(line["kind"] == "train" for line in read_lines(self.run / "metrics.jsonl"))

    def told_by_slurm(self) -> tuple[int, str]:
        """Send SIGTERM to every process of the job step (launcher and ranks), as Slurm does.

        Return the exit status and the output.
        """
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            return self.process.wait(END_S), self.log.read_text()
        finally:
            self.process.kill()


def test_ranks_that_wait_for_a_stalled_server_save_the_last_complete_step(recipe, server, tmp_path):
    training = Training(recipe, tmp_path / "run")
    while training.steps() < 3:
        time.sleep(0.05)
    server.faults[TAR] = list(STALLED)
    done = -1
    while done != (done := training.steps()):  # until prefetched data are used up
        time.sleep(1)
    ended, said = training.told_by_slurm()
    assert ended == status.RESUBMIT, said
    outcome = read_outcome(training.run)
    assert (outcome["stopped"], outcome["step"]) == ("SIGTERM", done), said
    assert [step_of(path) for path in committed(training.run)] == [done]
    server.faults.clear()
    again = Training(recipe, training.run)
    while again.steps() <= done:
        time.sleep(0.05)
    ended, said = again.told_by_slurm()
    assert ended == status.RESUBMIT and f"resumed from step {done}" in said


@pytest.mark.parametrize(("name", "before"), [("manifest.json", 2), ("validation-000000.tar", 0)])
def test_a_server_stall_before_the_first_step_gives_the_resubmit_status(recipe, server, tmp_path, name, before):
    """`before`: number of reads of the file by `bst train` itself, before ranks exist."""
    server.faults[name] = [""] * before + STALLED
    training = Training(recipe, tmp_path / "run")
    while sum(asked == name for asked, _ in server.requests) <= before:
        training.steps()
        time.sleep(0.05)
    ended, said = training.told_by_slurm()
    assert ended == status.RESUBMIT, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "reads", ["token_bytes", "tokenizer", "reading", "_validation_batches"], ids=lambda name: name.strip("_")
)
def test_a_signal_that_ends_a_read_of_one_rank_ends_the_start_of_all(
    recipe_file, on_ranks, unmeasured, tmp_path, monkeypatch, reads
):
    """The other rank has read its data, and would wait in the next collective."""
    recipe = recipe_file(log={"tensorboard": True})
    whole = getattr(LanguageModelling, reads)

    def on_rank(ranks: Ranks) -> None:
        def read(*args: Any) -> Any:
            if ranks.rank == (0 if reads == "tokenizer" else 1):
                raise Stopped(f"{TAR}: reading was interrupted")
            return whole(*args)

        monkeypatch.setattr(LanguageModelling, reads, read)
        with pytest.raises(Stopped, match="reading was interrupted"):
            train(Request(recipe, [], tmp_path / "run", True, None), ranks)

    on_ranks(2, on_rank)


def test_a_store_outage_ends_a_run_that_a_restart_continues(recipe_file, server, bst):
    """An outage longer than all attempts is no wrong setting: schedulers and `bst launch` must start the run again."""
    recipe = recipe_file(data={"corpus": server.url, "storage": {"attempts": 2, "backoff_s": 0.01}})
    command = ("train", recipe, "--ranks", 2, "--run-dir", "run", "--resume")
    assert bst(*command, "--until", 4).returncode == status.DONE
    server.faults[TAR] = ["503"] * 10_000
    out = bst(*command)
    assert out.returncode == status.UNREADABLE, out.stdout
    assert f"{server.url}/{TAR}: not read in 2 attempts" in out.stdout and "Traceback" not in out.stdout
    server.faults.clear()
    again = bst(*command)
    assert again.returncode == status.DONE and "resumed from step 4" in again.stdout, again.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": "zero3"},
        {"parallel": {"sp": 2}, "data": {"mode": "streaming", "documents": "isolated"}, "train": {"carry": True}},
    ],
    ids=["dp", "sp"],
)
def test_a_run_stopped_while_one_rank_lacks_data_resumes_exactly(
    recipe_file, on_ranks, unmeasured, tmp_path, monkeypatch, assert_same_run, changes: dict[str, Any]
):
    """The waiting rank must take part in the others' collectives. The resumed run equals one without a stop."""
    own = {**changes, "data": {**changes.get("data", {}), "prefetch": 1}}
    recipe = recipe_file(**own)

    def on_rank(ranks: Ranks, run: str, lacking: int | None) -> int:
        notice = signals.listen()
        found = Prefetcher._next

        def next_of(self: Prefetcher, number: int) -> Any:
            if ranks.rank == 1 and number == lacking:
                os.kill(os.getpid(), signal.SIGTERM)
                assert STOP_REQUESTED.wait(60)
                found(self, number)
                return None
            return found(self, number)

        monkeypatch.setattr(Prefetcher, "_next", next_of)
        return train(Request(recipe, [], tmp_path / run, True, None), ranks, notice)

    for lacking in (0, 3, 4):  # before the first step, one step after a checkpoint, at a checkpoint
        assert on_ranks(2, on_rank, "parts", lacking) == [status.RESUBMIT] * 2
        outcome = read_outcome(tmp_path / "parts")
        assert (outcome["stopped"], outcome.get("step", 0)) == ("SIGTERM", lacking)
        assert not lacking or step_of(newest_valid(tmp_path / "parts")) == lacking
    assert on_ranks(2, on_rank, "parts", None) == [status.DONE] * 2
    assert on_ranks(2, on_rank, "whole", None) == [status.DONE] * 2
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
