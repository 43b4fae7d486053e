"""Fixtures shared by the tests of several packages: a small model, corpus and recipe, and several DeepSpeed ranks."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from bst_base.host import free_port
from bst_base.importing import uncollected
from bst_base.json_lines import read_lines
from bst_base.settings import dump, parse
from bst_dist.checkpoint.directory import (
    FORMAT,
    MANIFEST,
    WEIGHTS,
    directory,
    load_weights,
    newest_valid,
    shard_file,
    step_of,
)
from bst_dist.config import Recipe
from bst_dist.faults import ledger
from bst_dist.model.config import MIXER_SECTIONS, ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.devices import device_files
from bst_dist.parallel.ranks import Ranks, choose_accelerator
from bst_dist.report.metrics import FILE
from bst_dist.train.rundir import RECIPE
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import open_workers

# No deadline: how long a test takes on this machine says nothing about correctness.
hypothesis_settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("any_machine")

TIMEOUT_S = 600
BST = (sys.executable, "-m", "bst_dist")
"""The `bst` command; it also works if the project is on the path but not installed."""
OLDER = Path(__file__).parent / "checkpoint" / "data" / "format-2"


def pytest_configure(config: pytest.Config) -> None:
    """Give all test processes one directory for temporary files, and remove it at the end.

    Without it, killed processes and torchrun would leave their files. pytest's own temporary files, which outlive the
    tests, stay in their usual place.
    """
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the environment
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        # A short name, because paths of sockets have a length limit.
        os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="bst-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True))
    if config.option.markexpr != "gpu":
        if device_files():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all tests except those marked gpu run on the CPU
        keep_forkable()


def keep_forkable() -> None:
    """Run a first backward pass now, so that this process can fork ranks after a backward pass (`on_ranks`).

    The first backward pass starts a thread for each device that is not a CPU, and torch then refuses backward passes in
    forks. Now there is no such device. Later there may be: with torch built for CUDA, the first fake tensor adds one.
    """
    torch.zeros((), requires_grad=True).backward()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude the test modules and the thousands of collected tests from garbage collection, which saves time."""
    with uncollected():
        return (yield)


class ByFile(LoadFileScheduling):
    """xdist scheduling (`--dist loadfile`): one worker takes all tests of a file, because they share fixtures.

    One worker also takes all of tests/cluster, because they share one network of hosts.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "tests/cluster" if file.startswith("tests/cluster/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile | None:
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the slowest files first, so that no worker starts one at the end.

    First come tests on several hosts, which run one after another, then files with a test marked long.
    """
    order = {mark: {item.path for item in items if item.get_closest_marker(mark)} for mark in ("cluster", "long")}
    items.sort(key=lambda item: (item.path not in order["cluster"], item.path not in order["long"]))


@pytest.fixture
def make_model():
    """``make_model(mixer, variant, **changes)`` returns a small model in double precision.

    Noise is added to every parameter, so that none has a special initial value such as 0.
    """

    def make(mixer: str = "bst", variant: str = "SH", **changes) -> LanguageModel:
        torch.manual_seed(0)
        sections = {
            "context": {"variant": variant, "states": 3},
            "ssm": {"state": 4, "chunk": 4},
            "mamba2": {"head": 8},
        } | changes
        settings = {
            "vocab_size": 19,
            "width": 16,
            "heads": 2,
            "ffn": 24,
            "block": 8,
            "depth": 3,
            "mixer": mixer,
            "placement": [1, 2],
            **{name: sections[name] for name in MIXER_SECTIONS[mixer] if name in sections},
        }
        model = LanguageModel(ModelConfig(**settings)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture(scope="session")
def link_packages() -> Callable[[Path, Sequence[str]], set[str]]:
    """``link_packages(folder, requirements)`` links installed packages and their dependencies into a folder.

    Extras, and packages for other platforms, are left out. Returns the names of the packages.
    """

    def link(folder: Path, requirements: Sequence[str]) -> set[str]:
        done, waiting = set(), [Requirement(one) for one in requirements]
        while waiting:
            needed = waiting.pop()
            name = canonicalize_name(needed.name)
            if name in done or (needed.marker and not needed.marker.evaluate({"extra": ""})):
                continue
            done.add(name)
            try:
                package = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue  # a package for another platform
            for entry in {path.parts[0] for path in package.files} - {"..", "__pycache__"}:
                (folder / entry).exists() or (folder / entry).symlink_to(package.locate_file(entry))
            waiting += map(Requirement, package.requires or ())
        return done

    return link


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 40 documents of random words."""
    folder, output = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("prepared") / "corpus"
    random = np.random.default_rng(0)
    words = ["for", "x", "=", "(", ")", "\n", "    ", "return", "naïve", "12", "+", "y", ":", "if", "else"]
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(" ".join(random.choice(words, 100 + 20 * number)))
    settings = {
        "source": {"kind": "folder", "path": str(folder), "pattern": "*.txt"},
        "output": str(output),
        "tokenizer": {"vocab_size": 320},
        "validation_fraction": 0.2,
    }
    with open_workers(1) as workers:
        prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
    return output


@pytest.fixture
def settings(corpus: Path) -> dict[str, Any]:
    """A recipe that trains in seconds, as plain data; in fp32, so that runs can be compared for equality."""
    return {
        "name": "small",
        "seed": 3,
        "model": {
            "width": 16,
            "heads": 2,
            "ffn": 32,
            "block": 8,
            "depth": 3,
            "mixer": "bst",
            "placement": [1],
            "ssm": {"state": 4, "chunk": 4},
        },
        "data": {"corpus": str(corpus), "prefetch": 0},
        "train": {"steps": 6, "sequence_length": 32, "sequences": 4, "precision": "fp32"},
        "evaluation": {"every": 3, "sequences": 4},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 2},
        "log": {"tensorboard": False},
        "deepspeed": "ds_configs/zero1.json",
    }


@pytest.fixture
def recipe_file(tmp_path: Path, settings: dict[str, Any]) -> Callable[..., Path]:
    """``recipe_file(**changes)`` writes the small recipe, with sections changed, and returns its path."""

    def write(**changes: Any) -> Path:
        changed = {
            key: {**settings.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in changes.items()
        }
        path = tmp_path / f"recipe-{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(dump(parse(Recipe, settings | changed)))
        return path

    return write


@pytest.fixture
def on_ranks() -> Callable[..., list[Any]]:
    """``on_ranks(world, function, *args)`` runs ``function(ranks, *args)`` on `world` ranks; returns their results.

    Ranks are forked from this process, where DeepSpeed is already imported, so they start at once and `function` may be
    a closure. The first failure ends all of them.
    """
    choose_accelerator()
    import torch._dynamo  # noqa: F401

    import bst_dist.parallel.deepspeed_import  # noqa: F401 (else every forked rank imports both: seconds)

    def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        context, port = multiprocessing.get_context("fork"), free_port()
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_rank, args=(rank, world, port, sender, function, args), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            return _collect([receiver for receiver, _ in pipes], processes)
        finally:
            for process in processes:
                process.kill()
                process.join()

    return run


def _collect(receivers: list[Any], processes: list[Any]) -> list[Any]:
    """Return the result of each rank. Raise AssertionError, with the traceback, if a rank fails or dies."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [rank for rank in range(len(receivers)) if rank not in results]
        events = [event for rank in waiting for event in (receivers[rank], processes[rank].sentinel)]
        assert multiprocessing.connection.wait(events, TIMEOUT_S), f"ranks {waiting} said nothing for {TIMEOUT_S} s"
        for rank in waiting:
            if receivers[rank].poll():
                failed, results[rank] = receivers[rank].recv()
                assert not failed, f"rank {rank}:\n{results[rank]}"
            else:
                assert processes[rank].is_alive(), f"rank {rank} died without a word"
    return [results[rank] for rank in range(len(receivers))]


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """``assert_same_run(run, other)`` asserts that losses, ledger and weights of both runs are bitwise equal."""
    clocked = ("step_time_s", "data_wait_s", "tokens_per_s", "mfu", "hfu", "time_s")

    def contents(run: Path) -> tuple[list[dict[str, str]], list[ledger.Entry], dict[str, bytes]]:
        lines = [line for line in read_lines(run / FILE) if line["kind"] != "performance"]
        lines = [{key: repr(value) for key, value in line.items() if key not in clocked} for line in lines]
        newest = newest_valid(run)
        weights = {name: tensor.numpy().tobytes() for name, tensor in load_weights(newest).items()}
        assert sum(line["kind"] != "'eval'" for line in lines) == step_of(newest)
        return lines, ledger.read(run, 10**9, 10**9), weights

    def check(run: Path, other: Path) -> None:
        for found, expected in zip(contents(run), contents(other), strict=True):
            assert found == expected

    return check


@pytest.fixture
def train_in(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> Callable[[Path], Callable[..., Path]]:
    """``train_in(recipe)`` returns ``go(run, *overrides, world=…, until=…, resume=…)``.

    ``go`` trains in the directory `run` and returns its path.
    """
    from bst_dist.train.run import train  # imports DeepSpeed, for which `on_ranks` has already chosen an accelerator
    from bst_dist.train.start.request import Request

    def of(recipe: Path) -> Callable[..., Path]:
        def go(run: str, *changes: str, world: int = 1, until: int | None = None, resume: bool = False) -> Path:
            on_ranks(world, lambda ranks: train(Request(recipe, changes, tmp_path / run, resume, until), ranks))
            return tmp_path / run

        return go

    return of


@pytest.fixture
def no_room_for_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving a figure fails, as on a full disk."""

    def savefig(self: object, out: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(out))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the measurement of the machine's peak FLOP/s, which takes time."""
    monkeypatch.setattr("bst_dist.train.building.peak_flops", lambda *_: 1e12)


def _rank(rank: int, world: int, port: int, sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
    try:
        ranks = Ranks()
        result = function(ranks, *args)
        ranks.barrier()  # no rank may leave while another still communicates
        sender.send((False, result))
    except BaseException:
        sender.send((True, traceback.format_exc()))


@pytest.fixture
def make_run(tmp_path, corpus):
    """``make_run(name, steps, …)`` makes a run directory with recipe, metrics and checkpoints with random weights."""

    def make(name: str = "run", steps: tuple[int, ...] = (4,), seed: int = 0, documents: str = "joined") -> Path:
        settings = {
            "name": "small",
            "seed": 0,
            "data": {"corpus": str(corpus), "documents": documents},
            "model": {
                "vocab_size": 320,
                "width": 16,
                "heads": 2,
                "ffn": 16,
                "block": 8,
                "depth": 2,
                "mixer": "bst",
                "ssm": {"chunk": 4},
            },
            "train": {"steps": 4, "sequence_length": 32, "sequences": 2, "precision": "fp32"},
        }
        run_dir = tmp_path / name
        run_dir.mkdir(parents=True, exist_ok=True)
        recipe = parse(Recipe, settings)
        for step in steps:
            torch.manual_seed(seed + step)
            write_checkpoint(directory(run_dir, step), LanguageModel(recipe.model))
        (run_dir / RECIPE).write_text(dump(recipe))
        keys = ("loss_nats", "bits_per_byte", "gradient_norm", "learning_rate", "step_time_s", "tokens_per_s")
        lines = [{"kind": "train", "step": i, "tokens": 64 * i, **dict.fromkeys(keys, 1 / i)} for i in range(1, 5)]
        lines.append(
            {"kind": "eval", "split": "validation", "step": 4, "tokens": 9, "loss_nats": 2, "bits_per_byte": 3}
        )
        (run_dir / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run_dir

    return make


def write_checkpoint(path: Path, model: LanguageModel) -> None:
    path.mkdir(parents=True)
    save_file(model.state_dict(), path / shard_file(WEIGHTS, 0))
    data = (path / shard_file(WEIGHTS, 0)).read_bytes()
    files = {shard_file(WEIGHTS, 0): {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rank": 0}}
    (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}))


@pytest.fixture
def bst(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``bst(*arguments, under=…, **environment)`` runs `bst` in `tmp_path`; stderr is merged into `stdout`.

    `under`: a command prefix, such as `unshare --mount`.
    """

    def run(*arguments: object, under: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*under, *BST, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
        )

    return run


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A run of two ranks, stopped after step 4 of 6, written by an older version, with its corpus (test_older)."""
    shutil.copytree(OLDER, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "run" / "recipe.yaml"  # then paths were relative to the working directory
    recipe.write_text(recipe.read_text().replace("corpus: corpus", f"corpus: {tmp_path / 'corpus'}"))
    return tmp_path / "run"


@pytest.fixture
def s3_endpoint() -> Iterator[Callable[[], dict[str, Any]]]:
    """`s3_endpoint()` starts an S3 server on the loopback and returns the fsspec options that reach it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)

    def start() -> dict[str, Any]:
        server.start()
        host, port = server.get_host_and_port()
        return {
            "endpoint_url": f"http://{host}:{port}",
            "key": "key",
            "secret": "secret",
            "client_kwargs": {"region_name": "eu-west-1"},
        }

    yield start
    server.stop()
