"""Count what each rank of a large run does outside its steps, in one process: no cluster, no model, no accelerator.

    bst bench scale
    bst bench scale --ranks 512 --parameters 100 --json scale.json

Saving, loading, reports, the preflight's checks and the ranks' output use the same code as a real run. Instead of a
model there are synthetic parameters with a few values per rank, sharded as ZeRO does. Instead of a network, ranks take
turns in one process (`lockstep`). So the numbers of opened files and of bytes read and received are exact for that
number of parameters and ranks; a real model only has more values. With more than 512 ranks, only 64 of them load and
report; each other rank counts like the next of these. CPU-seconds depend on this machine and its load. The run
directory is written to --directory: three small files per rank.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import socket
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bst_base.arguments import at_least
from bst_base.terminal import Sheet, print_table
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import CHECKPOINTS, INDEX, MANIFEST, directory, read_manifest
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.saving import Failed
from bst_dist.checkpoint.snapshot import Identity, Position, Snapshots
from bst_dist.cluster.channel import Channel
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.preflight import Checked, Needs, record_problems, show
from bst_dist.cluster.space import Space
from bst_dist.faults.watchdog import BEAT_S
from bst_dist.parallel.mesh import Mesh
from bst_dist.report.metrics import StepReport
from bst_dist.report.performance import Performance
from bst_dist.tools.bench.lockstep import Again, Counting, Counts, SimulatedRank, SyntheticState, World

STEP, A_HOST = 100, 8
"""Step of the checkpoint, and ranks per host."""
VALUES = 4
"""Average number of values of one parameter on one rank."""
ALL_LOAD, SOME = 512, 64
"""Up to ALL_LOAD ranks, every rank loads and reports; with more, only SOME of them do."""


@dataclass(frozen=True)
class Cost:
    """Cost of one kind of work. Each field is that of the rank with the highest value, except where stated."""

    work: str
    opens: int
    all_opens: int
    """Files opened by all ranks together."""
    read_bytes: int
    received_bytes: int
    collectives: int
    cpu_s: float
    """CPU-seconds of the first or the last rank, whichever takes more; for "save", the average over ranks."""
    memory_bytes: int | None = None
    """Peak memory that the work adds on the last rank."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=at_least(2),
        nargs="+",
        default=[512, 2048, 4096],
        metavar="N",
        help="numbers of ranks (default: 512 2048 4096)",
    )
    parser.add_argument(
        "--parameters", type=at_least(1), default=300, metavar="N", help="tensors of the model (default: 300)"
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to write (default: a temporary directory)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    found = []
    for ranks in args.ranks:
        folder = Path(tempfile.mkdtemp(prefix="scale-", dir=args.directory))
        try:
            found.append(measure(folder, ranks, args.parameters))
        finally:
            shutil.rmtree(folder)
        _print(found[-1])
    return {"parameters": args.parameters, "worlds": found}


def measure(folder: Path, ranks: int, parameters: int) -> dict[str, Any]:
    """Return all costs of a run with `ranks` ranks."""
    shapes = _shapes(parameters, ranks)
    _save(folder / "warm", 2, _shapes(1, 2))  # warm up: imports at first use must not count
    _load(folder / "warm", 2, 1, _shapes(1, 2), "")
    saved = _save(folder, ranks, shapes)
    path = directory(folder, STEP)
    manifest = read_manifest(path)
    costs = [
        saved,
        _load(folder, ranks, 1, shapes, "load, same layout"),
        _load(folder, ranks // 2, 1, shapes, "load, half the ranks"),
        _alone(folder, ranks // 2, 1, shapes, "  its weights and moments"),
        _alone(folder, ranks // 2, 1, shapes, "  and without the index", but=INDEX),
        _alone(folder, ranks, 3, shapes, "the same ranks, ZeRO-3"),
        _reports(ranks),
    ]
    return {
        "ranks": ranks,
        "files": len(manifest["files"]) + 1,
        "manifest_bytes": (path / MANIFEST).stat().st_size,
        "rank_bytes": max(record["bytes"] for name, record in manifest["files"].items() if name.startswith("rank-")),
        "heartbeats_per_s": ranks / BEAT_S,
        "launcher": {"preflight_cpu_s": _preflight(ranks // A_HOST or 1), "line_cpu_s": _output(ranks)},
        "costs": [asdict(cost) for cost in costs],
    }


def _shapes(parameters: int, ranks: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters: vectors and matrices in turn, on average VALUES elements per rank."""
    return {
        f"layers.{number:04}.weight": (ranks, VALUES) if number % 2 else (ranks * VALUES,)
        for number in range(parameters)
    }


def _snapshots(folder: Path, ranks: Any, stage: int, shapes: dict[str, tuple[int, ...]], filled: bool) -> Any:
    state = SyntheticState(shapes, ranks.rank, ranks.world, stage, filled)
    mesh = Mesh(ranks.world, ranks.rank)
    identity = Identity("", {}, 0, Layout(ranks.world, 1, stage), Rows(2 * ranks.world, 1, mesh))
    return Snapshots(folder, state, ranks, identity, CheckpointConfig(background=False)), state


def _save(folder: Path, ranks: int, shapes: dict[str, tuple[int, ...]]) -> Cost:
    def on_rank(rank: SimulatedRank) -> Counts:
        snapshots, _ = _snapshots(folder, rank, 1, shapes, filled=True)
        rank.counts.collectives = rank.counts.received_bytes = 0
        with Counting(Counts()) as counts:
            outcome = snapshots.start(Position(STEP, STEP, {}, [])) or snapshots.finish()
        if isinstance(outcome, Failed):
            raise RuntimeError(outcome.why)
        return counts

    begin = time.process_time()
    counts, simulated = World(ranks).run(on_rank)
    cost = _cost("save", counts, simulated, folder)
    written = [name for name in read_manifest(directory(folder, STEP))["files"] if f"-{ranks - 1:05d}." in name]
    # A separate thread writes each rank's files, so Counting does not see it: opens are counted from the file names,
    # CPU time is the total divided by the number of ranks.
    return replace(
        cost,
        opens=len(written) + 1,
        all_opens=sum(1 for _ in directory(folder, STEP).iterdir()),
        cpu_s=(time.process_time() - begin) / ranks,
    )


def _load(folder: Path, ranks: int, stage: int, shapes: dict[str, tuple[int, ...]], work: str) -> Cost:
    """Measure finding the newest checkpoint, checking its digests, and reading the part that each rank holds."""

    def load(rank: Any) -> Counts:
        snapshots, state = _snapshots(folder, rank, stage, shapes, filled=False)
        with Counting(Counts()) as counts:
            checkpoint, _ = snapshots.newest()
            snapshots.load(checkpoint)
        if not state.is_right():
            raise RuntimeError(f"rank {rank.rank} has read something else than was written")
        return counts

    counts, simulated = _world(ranks).run(load)
    cost = _cost(work, counts, simulated, folder)
    return replace(cost, memory_bytes=_memory(lambda: load(Again(simulated[-1]))))


def _world(ranks: int) -> World:
    """Return the World for work that is the same on all ranks."""
    return World(ranks, None if ranks <= ALL_LOAD else SOME)


def _alone(folder: Path, ranks: int, stage: int, shapes: dict[str, tuple[int, ...]], work: str, but: str = "") -> Cost:
    """Measure how the last rank reads its weights and moments; `but` names an entry to remove from the manifest.

    Without the index, as in older checkpoints, a rank opens every file to read its header.
    """
    path = directory(folder, STEP)
    manifest = {name: value for name, value in read_manifest(path).items() if name != but}
    snapshots, state = _snapshots(folder, _Alone(ranks), stage, shapes, filled=False)
    with Counting(Counts()) as counts:
        snapshots.fill(path, manifest)
    if not state.is_right():
        raise RuntimeError("the last rank has read something else than was written")
    opens = len(counts.opens)
    return Cost(work, opens, ranks * opens, counts.read_bytes, 0, 0, counts.cpu_s)


class _Alone:
    """The last rank of a world, for work without communication."""

    first, device = False, SimulatedRank.device

    def __init__(self, ranks: int) -> None:
        self.rank, self.world = ranks - 1, ranks


def _reports(ranks: int) -> Cost:
    """Measure one performance report: the second, when the ranks already know the names of their numbers."""
    phases = ("start", "data", "forward", "backward", "optimizer", "communication", "evaluate", "checkpoint", "report")
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "ssm states", "keys and values", "edges")

    def on_rank(rank: SimulatedRank) -> Counts:
        rank.memory_high_water = lambda: 1 << 30
        performance = Performance(1, rank, [], None)
        step = StepReport(
            step=1,
            tokens=1,
            loss_nats=1.0,
            bits_per_byte=1.0,
            gradient_norm=1.0,
            learning_rate=1.0,
            ssm_learning_rate=1.0,
            step_time_s=1.0,
            tokens_per_s=1.0,
            mfu=1.0,
        )
        for number in (1, 2):
            for phase in phases:
                rank.phases.enter(phase)
            for kind in kinds:
                with rank.phases.exchanging(kind, 1e6):
                    pass
            rank.counts.collectives = rank.counts.received_bytes = 0
            with Counting(Counts()) as counts:
                performance.after_step(replace(step, step=number), last=False)
        return counts

    return _cost("a report", *_world(ranks).run(on_rank), Path("/nothing"))


def _cost(work: str, counts: list[Counts], simulated: list[SimulatedRank], folder: Path) -> Cost:
    opens = [sum(path.startswith(str(folder / CHECKPOINTS)) for path in one.opens) for one in counts]
    return Cost(
        work,
        max(opens),
        sum(opens),
        max(one.read_bytes for one in counts),
        max(rank.counts.received_bytes for rank in simulated),
        max(rank.counts.collectives for rank in simulated),
        max(counts[0].cpu_s, counts[-1].cpu_s),
    )


def _memory(work: Callable[[], object]) -> int:
    """Return the peak of the memory that Python and numpy allocate during `work`."""
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def _preflight(hosts: int) -> float:
    """Return the CPU-seconds to judge and show the answers of that many hosts."""
    versions = dict.fromkeys(("python", "torch", "deepspeed", "numpy", "webdataset", "safetensors"), "1.0")
    answer = {
        "versions": versions,
        "code": "0" * 64,
        "files": {"recipe.yaml": "1" * 64},
        "nonce": "job",
        "free_bytes": 10**12,
        "open_files": 2**20,
        "available_memory": 10**12,
        "ranks": [],
        "devices": ["nvidia0"] * A_HOST,
        "memory_errors": {},
    }
    checked = [Checked(Host(f"node-{number:04}", A_HOST), answer=answer, clock_offset_s=0.0) for number in range(hosts)]
    begin = time.process_time()
    record_problems(checked, "job", Needs([], Path("run"), Space(2, 10**9), 10**6))
    with contextlib.redirect_stdout(io.StringIO()):
        show(checked)
    return time.process_time() - begin


def _output(ranks: int) -> float:
    """Return the CPU-seconds to forward a line of output per rank: sent by an agent, read by the launching process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        agent = Channel.connect(*listening.getsockname())
        launching = Channel(listening.accept()[0])
    launching.trust()
    begin = time.process_time()
    taken = 0

    def speak() -> None:
        for rank in range(ranks):
            agent.send("said", rank=rank, stream="out", text="a line of the log " * 5)
        agent.drain(60)

    sending = threading.Thread(target=speak)
    sending.start()
    while taken < ranks:
        taken += len(launching.receive())
    sending.join()
    agent.close()
    launching.close()
    return time.process_time() - begin


COLUMNS = ("", "opens", "of all ranks", "read", "received", "collectives", "memory", "CPU-seconds")


def _print(found: dict[str, Any]) -> None:
    files = f"{found['files']:,} files per checkpoint"
    manifest = _size(found["manifest_bytes"])
    title = f"{found['ranks']:,} ranks: {files}, manifest {manifest}; of one rank, the most of all"
    rows = []
    for cost in found["costs"]:
        opens, all_opens = f"{cost['opens']:,}", f"{cost['all_opens']:,}"
        moved = _size(cost["read_bytes"]), _size(cost["received_bytes"]), str(cost["collectives"])
        memory = "" if cost["memory_bytes"] is None else _size(cost["memory_bytes"])
        rows.append([cost["work"], opens, all_opens, *moved, memory, f"{cost['cpu_s']:.4f}"])
    print_table(Sheet(COLUMNS, rows), title)
    launcher = found["launcher"]
    print(
        f"heartbeats: {found['heartbeats_per_s']:,.0f} per second; launching process: preflight of the hosts "
        f"{launcher['preflight_cpu_s']:.3f} CPU-s, a line of output of every rank {launcher['line_cpu_s']:.3f} CPU-s",
        flush=True,
    )


def _size(count: float) -> str:
    if count >= 1e6:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.1f} kB" if count else "0"
