"""The checks that the ranks share at the start: what one finds ends all, with the same message."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bst_base.errors import StorageError, UserError
from bst_base.host import free_port
from bst_base.settings import parse
from bst_base.stopping import Stopped
from bst_dist.tools.bench.lockstep import World
from bst_dist.train.start import request
from bst_dist.train.start.request import Request, load, resolve, resolve_together
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import open_workers
from data_pipeline.store.storage import UnreadableShardError

HOST, SPLITS = socket.gethostname(), ("train", "validation")


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory) -> Path:
    """A corpus with several shards in both splits."""
    folder, output = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("prepared") / "corpus"
    random, words = np.random.default_rng(0), ["for", "x", "=", "(", ")", "\n", "return", "naïve", "12", "+", "y", ":"]
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(" ".join(random.choice(words, 300)))
    settings = {
        "source": {"kind": "folder", "path": str(folder), "pattern": "*.txt"},
        "output": str(output),
        "tokenizer": {"vocab_size": 320},
        "validation_fraction": 0.3,
        "shard_bytes": 2500,
    }
    with open_workers(1) as workers:
        prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
    assert all(len(list(output.glob(f"{split}-*.tar"))) > 2 for split in SPLITS)
    return output


@pytest.fixture
def asked(recipe_file, in_shards, tmp_path) -> Request:
    data = {"corpus": str(in_shards)}
    evaluation = {"corpora": {"again": str(in_shards)}}
    return Request(recipe_file(data=data, evaluation=evaluation), [], tmp_path / "run", resume=False, until=None)


def looked_at(monkeypatch, work) -> list[str]:
    """Return the names of the shards whose size is asked for during `work`."""
    found, stat = [], Path.stat
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda path, **how: found.append(path.name) or stat(path, **how))
        work()
    return [name for name in found if name.endswith(".tar")]


def test_the_ranks_look_at_each_shard_once_in_all(asked, in_shards, monkeypatch):
    """Each rank asks about its share only, of both splits and of a further corpus."""
    recipe, world = load(asked), 512

    def asked_for(checked: slice) -> list[str]:
        return looked_at(monkeypatch, lambda: resolve(recipe, asked, 2, checked))

    train, validation = (sorted(path.name for path in in_shards.glob(f"{split}-*.tar")) for split in SPLITS)
    every = sorted(train + 2 * validation)
    assert sorted(asked_for(slice(None))) == every
    shares = [asked_for(slice(rank, None, world)) for rank in range(max(len(train), len(validation)) + 1)]
    assert max(map(len, shares)) <= 3
    assert sorted(name for share in shares for name in share) == every


def test_two_ranks_share_the_shards(asked, in_shards, monkeypatch):
    recipe = load(asked)
    every = looked_at(monkeypatch, lambda: World(2).run(lambda rank: resolve_together(recipe, asked, rank)))
    assert sorted(every) == sorted(looked_at(monkeypatch, lambda: resolve(recipe, asked, 2)))


SHARD = "/data/train-000002.tar"


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (UserError(f"{SHARD}: the shard is missing"), UserError, f"{SHARD}: the shard is missing"),
        (UnreadableShardError(f"{SHARD}: cannot be read"), StorageError, f"{SHARD}: cannot be read"),
        (OSError(errno.EIO, "bad disk", SHARD), StorageError, f"{HOST} cannot read {SHARD}: bad disk"),
        (Stopped(f"{SHARD}: reading was interrupted"), Stopped, f"{SHARD}: reading was interrupted"),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all_with_its_host(monkeypatch, raised, kind, said):
    def fail(recipe, asked, world, checked):
        if checked.start == 2:
            raise raised
        return "start"

    where = "" if kind is Stopped else "rank 2: " if said.startswith(HOST) else f"rank 2 on {HOST}: "
    assert errors_of(monkeypatch, fail) == [(kind, where + said)] * 4


def test_an_error_of_one_rank_comes_before_the_stop_of_others(monkeypatch):
    def fail(recipe, asked, world, checked):
        raise UserError("the shard is missing") if checked.start == 3 else Stopped(f"{checked.start}: interrupted")

    assert errors_of(monkeypatch, fail) == [(UserError, f"rank 3 on {HOST}: the shard is missing")] * 4


def test_an_error_of_all_ranks_names_none(monkeypatch):
    def fail(*_):
        raise request.ConfigError("recipe.yaml: unknown key")

    assert errors_of(monkeypatch, fail) == [(request.ConfigError, "recipe.yaml: unknown key")] * 4


def errors_of(monkeypatch, resolve) -> list[tuple[type[Exception], str]]:
    """Return (type, message) of what each of four ranks raises, with this function in place of `resolve`."""
    monkeypatch.setattr(request, "resolve", resolve)

    def on_rank(rank):
        try:
            resolve_together(None, None, rank)
        except UserError as error:
            return type(error), str(error)
        raise AssertionError("nothing was raised")

    return World(4).run(on_rank)[0]


@pytest.mark.ranks
def test_a_shard_that_only_rank_1_looks_at_ends_both_ranks(recipe_file, in_shards, tmp_path):
    """Both end with status 2 and one message; neither waits for the other until a limit."""
    missing, kept = in_shards / "train-000001.tar", tmp_path / "kept.tar"
    missing.rename(kept)
    command = [sys.executable, "-m", "bst_dist.train", str(recipe_file(data={"corpus": str(in_shards)}))]
    command += ["--run-dir", str(tmp_path / "run")]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | names | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    numbers = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    ranks = [
        subprocess.Popen(command, env=environment | number, stderr=subprocess.PIPE, text=True) for number in numbers
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
        kept.rename(missing)
    assert [process.returncode for process in ranks] == [2, 2], said
    told = re.findall(r"^bst train: .*", "".join(said), re.MULTILINE)
    assert told == [
        f"bst train: rank 1 on {HOST}: {missing}: the shard is missing; copy it again, or prepare the corpus again"
    ]
    assert not (tmp_path / "run").exists()
