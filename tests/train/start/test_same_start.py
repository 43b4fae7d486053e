"""Ranks that were asked for different runs: all refuse, and name the rank and what differs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bst_base.errors import StorageError, UserError
from bst_base.host import free_port
from bst_dist.tools.bench.lockstep import World
from bst_dist.train.start.request import Request, Start, load, resolve
from bst_dist.train.start.same_start import require_same

HOST = socket.gethostname()


@pytest.fixture
def asked(recipe_file, tmp_path) -> Request:
    return Request(recipe_file(), [], tmp_path / "run", resume=False, until=None)


def said(world: int, odd: int, asked: Request, other: Request, of_other=lambda start: start) -> tuple[type, str] | None:
    """Return what all ranks raise when rank `odd` has the request `other`; None when they start."""

    def on_rank(rank):
        request = other if rank.rank == odd else asked
        start = resolve(load(request), request, world)
        try:
            require_same(of_other(start) if rank.rank == odd else start, request, rank)
        except UserError as error:
            return type(error), str(error)
        return None

    results = World(world).run(on_rank)[0]
    assert len(set(results)) == 1, results
    return results[0]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"overrides": ["train.steps=8"]}, "train.steps: 8, 6"),
        ({"overrides": ["evaluation.every=2"]}, "evaluation.every: 2, 3"),
        ({"overrides": ["checkpoint.every=3"]}, "checkpoint.every: 3, 2"),
        ({"overrides": ["guard.spike=skip"]}, "guard.spike: 'skip', 'ignore'"),
        ({"overrides": ["deepspeed=zero2"]}, "DeepSpeed: zero_optimization.stage: 2, 1"),
        ({"until": 4}, "--until: 4, 6"),
        ({"resume": True}, "--resume: True, False"),
        ({"from_zero": True}, "--from-zero: True, False"),
        ({"replan": True}, "--replan-schedule: True, False"),
    ],
)
def test_a_rank_with_another_request_is_named_with_what_differs(asked, change, line):
    kind, message = said(4, 2, asked, replace(asked, **change))
    head, *lines = message.splitlines()
    assert kind is UserError
    assert head.startswith(f"rank 2 on {HOST} was asked for another run than rank 0 on {HOST}: ")
    assert f"  {line}" in lines


def test_the_rank_that_differs_from_most_is_named(asked):
    assert said(3, 0, asked, replace(asked, until=2))[1].startswith(f"rank 0 on {HOST} was asked for another run")


def test_another_corpus_at_the_same_place_is_refused(asked):
    def of_other(start: Start) -> Start:
        corpus = SimpleNamespace(sha256="0" * 64)
        return replace(start, objective=replace(start.objective, corpora=[corpus]))

    kind, message = said(2, 1, asked, asked, of_other)
    assert kind is UserError
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == ["data.corpus"]


def test_the_same_corpus_at_another_place_is_accepted(asked, corpus, tmp_path):
    """Places differ between hosts: of corpora, local copies, and the recipe itself."""
    copy = shutil.copytree(corpus, tmp_path / "elsewhere" / "corpus")
    recipe = shutil.copy(asked.recipe, tmp_path / "elsewhere" / "other.yaml")
    overrides = [f"data.corpus={copy}", f"checkpoint.local_directory={tmp_path}", "ranks=3"]
    assert said(2, 1, asked, replace(asked, recipe=Path(recipe), overrides=overrides)) is None


def test_hosts_that_see_another_recipe_in_the_run_directory_may_start_again(asked):
    """Status 74: a stale view of a shared file system passes."""

    def of_other(start: Start) -> Start:
        return replace(start, changed=["optimizer.learning_rate: 0.1, 0.2"])

    kind, message = said(2, 1, asked, asked, of_other)
    assert kind is StorageError
    assert str(asked.run_dir) in message and f"rank 1 on {HOST}" in message


def test_settings_are_sent_only_where_they_differ(asked):
    """At equal settings each of 512 ranks sends a digest and its host's name."""
    world = World(512, at_work=2)
    start = resolve(load(asked), asked, 1)
    _, ranks = world.run(lambda rank: require_same(start, asked, rank))
    assert [rank.counts.collectives for rank in ranks] == [1, 1]
    assert ranks[0].counts.received_bytes < 512 * 256


@pytest.mark.ranks
def test_two_ranks_with_different_recipes_end_with_one_message(recipe_file, tmp_path):
    files = [recipe_file(), recipe_file(evaluation={"every": 2})]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | names | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "bst_dist.train", str(file), "--run-dir", str(tmp_path / "run")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        errors = "".join(process.communicate(timeout=300)[1] for process in ranks)
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2, 2], errors
    assert errors.count("was asked for another run") == 1
    assert "evaluation.every: 2, 3" in errors
    assert not (tmp_path / "run").exists()
