"""Time what a checkpoint costs training, compared with DeepSpeed's `save_checkpoint`.

    bst bench saving
    bst bench saving --ranks 2 --zero 3 --width 512 --depth 8

A model trains on random tokens. In each round every way of saving is used once, between equal numbers of steps without
saving. "waits" is how long training stands still. "costs" is how much longer the steps take until the checkpoint is
complete; this includes CPU and disk use in the background. "ratio" is relative to DeepSpeed, paired by round. When
DeepSpeed's call returns, its files are neither synced to disk nor have digests; our files have both when a checkpoint
is committed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bst_base.errors import UserError
from bst_base.host import free_port
from bst_base.shipped import STRATEGIES, find
from bst_base.terminal import Sheet, print_table
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import committed
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.snapshot import Identity, Position, Snapshots
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.ranks import Ranks, choose_accelerator
from bst_dist.tools.bench.timing import Spread

LENGTH, VOCABULARY = 128, 4096
WAYS = ("DeepSpeed", "ours, waiting", "ours, background")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes to start")
    parser.add_argument("--zero", type=int, default=1, choices=range(4), help="ZeRO stage (default: 1)")
    parser.add_argument("--width", type=int, default=512, metavar="D", help="width of the model")
    parser.add_argument("--depth", type=int, default=8, metavar="N", help="layers of the model")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="minimum steps per turn (default: 6)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns for every way of saving")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to write (default: a temporary directory)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    choose_accelerator()
    folder = Path(tempfile.mkdtemp(prefix="saving-", dir=args.directory))
    context = multiprocessing.get_context("spawn")
    port = free_port()
    receiver, sender = context.Pipe(duplex=False)
    processes = [context.Process(target=_rank, args=(rank, port, folder, args, sender)) for rank in range(args.ranks)]
    try:
        for process in processes:
            process.start()
        while not receiver.poll(1):
            if any(process.exitcode for process in processes):
                raise UserError("a rank has failed; see its output above")
        found = receiver.recv()
    finally:
        for process in processes:
            process.terminate()
            process.join()
        shutil.rmtree(folder)
    _print(args, found)
    return {"ranks": args.ranks, "zero_stage": args.zero, **found}


def _rank(rank: int, port: int, folder: Path, args: argparse.Namespace, sender: Any) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // args.ranks))
    ranks = Ranks()
    bench = Bench(ranks, folder, args)
    found = bench.measure()
    if ranks.first:
        sender.send(found)
    ranks.barrier()
    ranks.leave()


class Bench:
    """One rank's part of the measurement."""

    def __init__(self, ranks: Ranks, folder: Path, args: argparse.Namespace) -> None:
        from bst_dist.checkpoint.fragments import EngineState
        from bst_dist.train.config import OptimizerConfig
        from bst_dist.train.engine import Engine

        self.ranks, self.folder, self.args = ranks, folder, args
        torch.manual_seed(0)
        model = LanguageModel(_model(args))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = Engine(model, OptimizerConfig(), _completed(args))
        state = EngineState(self.engine.deepspeed)
        identity = _identity(args, ranks)
        self.snapshots = {
            background: Snapshots(
                folder / str(background), state, ranks, identity, CheckpointConfig(background=background, keep_last=1)
            )
            for background in (False, True)
        }
        self.batch = torch.randint(VOCABULARY, (1, LENGTH + 1), device=ranks.device)
        self.step = 0

    def measure(self) -> dict[str, Any]:
        """Return the seconds of each round by way of saving, and the bytes of a checkpoint."""
        turns: dict[str, tuple[Callable[[], None], Snapshots | None]] = {
            "DeepSpeed": (self._deepspeed, None),
            "ours, waiting": (lambda: self._start(False), self.snapshots[False]),
            "ours, background": (lambda: self._start(True), self.snapshots[True]),
        }
        waits: dict[str, list[float]] = {way: [] for way in WAYS}
        costs: dict[str, list[float]] = {way: [] for way in WAYS}
        steps: list[float] = []
        for round_ in range(self.args.rounds + 1):  # the first warms up memory and disk and is not counted
            for way, (save, snapshots) in turns.items():
                alone = median(self._timed(self._take_step) for _ in range(self.args.steps))
                waited, taken, count = self._turn(save, snapshots)
                if round_:
                    steps.append(alone)
                    waits[way].append(waited)
                    costs[way].append(taken - count * alone)
        sizes = {"DeepSpeed": _bytes(self.folder / "deepspeed"), "ours": _bytes(committed(self.folder / "True")[0])}
        return {"parameters": self.parameters, "step_s": steps, "waits_s": waits, "costs_s": costs, "bytes": sizes}

    def _turn(self, save: Callable[[], None], snapshots: Snapshots | None) -> tuple[float, float, int]:
        """Save, and train until the checkpoint is complete; return seconds training waited, all seconds, and steps."""
        begin = time.perf_counter()
        count = 0
        waited = self._timed(save)
        done = snapshots is None
        while not done or count < self.args.steps:
            self._take_step()
            count += 1
            if not done:
                start = time.perf_counter()
                done = snapshots.poll() is not None
                waited += time.perf_counter() - start
        return waited, time.perf_counter() - begin, count

    def _timed(self, work: Callable[[], object]) -> float:
        """Run `work`, and return the seconds until all ranks have done it."""
        self.ranks.barrier()
        start = time.perf_counter()
        work()
        self.ranks.barrier()
        return time.perf_counter() - start

    def _take_step(self) -> None:
        self.step += 1
        self.engine.set_rates(1.0)
        losses = self.engine.forward(input_ids=self.batch[:, :-1], labels=self.batch[:, 1:])
        self.engine.accumulate(losses.total / LENGTH, last=True)
        self.engine.update()

    def _deepspeed(self) -> None:
        self.engine.deepspeed.save_checkpoint(str(self.folder / "deepspeed"), tag="tag")

    def _start(self, background: bool) -> None:
        failed = self.snapshots[background].start(Position(self.step, 0, {}, []))
        if failed:
            raise UserError(failed.why)


def _model(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY, width=args.width, heads=8, ffn=4 * args.width, block=128, depth=args.depth, mixer="bst"
    )


def _completed(args: argparse.Namespace) -> dict[str, Any]:
    from bst_dist.train import deepspeed_json

    path = find(f"zero{args.zero}", STRATEGIES)
    intent = deepspeed_json.Intent(args.ranks, 1, 1, 1.0, "fp32")
    return deepspeed_json.complete(deepspeed_json.read(path), intent, where=str(path))


def _identity(args: argparse.Namespace, ranks: Ranks) -> Identity:
    rows = Rows(args.ranks, 1, Mesh(args.ranks, ranks.rank))
    return Identity("", {}, 0, Layout(args.ranks, 1, args.zero), rows)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _print(args: argparse.Namespace, found: dict[str, Any]) -> None:
    title = (
        f"{found['parameters'] / 1e6:.1f} M parameters, {args.ranks} ranks, ZeRO-{args.zero}: "
        f"seconds, median of {args.rounds} rounds (range)"
    )
    rows = []
    base = {kind: found[kind]["DeepSpeed"] for kind in ("waits_s", "costs_s")}
    for way in WAYS:
        cells = []
        for kind, seconds in base.items():
            own = found[kind][way]
            share = median(a / b for a, b in zip(own, seconds, strict=True))
            cells += [str(Spread.of(own)), f"{share:.1%}"]
        size = found["bytes"]["DeepSpeed" if way == "DeepSpeed" else "ours"]
        rows.append([way, *cells, f"{size / 1e6:,.0f}"])
    print_table(
        Sheet(("", "waits", "ratio", "costs", "ratio", "MB"), rows),
        title,
        f"a step without saving takes {Spread.of(found['step_s'])} s",
    )
