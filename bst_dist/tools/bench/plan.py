"""Compare the plan with real training steps: bytes of memory and bytes sent, on ranks of this machine.

    bst bench plan
    bst bench plan --only sp2

Every configuration trains a few steps with the real engine, on gloo ranks on the CPU. Memory is the peak during the
last step of all tensors allocated since the model was built, from the events of torch's allocator. Bytes sent are
counted in torch.distributed, below DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bst_base.terminal import Sheet, print_table
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.activation.policy import policy
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.sequence.neighbour import past_of_slice
from bst_dist.parallel.sequence.slices import EdgesHere, go_backward
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.memory.parts import Slice
from bst_dist.plan.memory.peak import Memory, Work, memory
from bst_dist.plan.memory.zero import Strategy
from bst_dist.plan.traffic import GATHER, REDUCE, SCATTER, sent, sequence_traffic, zero_traffic

if TYPE_CHECKING:
    from bst_dist.parallel.sequence.group import SequenceGroup
    from bst_dist.parallel.sequence.past import EarlierCall
    from bst_dist.train.engine import Engine

MEMORY_TOLERANCE, TRAFFIC_TOLERANCE = 0.10, 0.02
"""Largest relative errors at which a plan counts as correct."""
STEPS = 4
"""Number of steps; the last is measured. By then moments exist, and ZeRO-3 has recorded the order of the modules."""
SETTLING_S = 0.01
"""Seconds to wait after each collective. Gloo's thread releases the tensors of a collective a moment after it is done.
The profiler sees only the thread that started it. If gloo's thread were the last owner, the profiler would miss the
release."""


@dataclass(frozen=True)
class Case:
    """One configuration to plan and measure."""

    name: str
    stage: int = 1
    world: int = 2
    sp: int = 1
    rows: int = 2
    """Sequences per micro-batch."""
    micro_batches: int = 1
    mixer: str = "bst"
    variant: str = "SH"
    policy: str = "none"
    precision: str = "bf16"
    slices: int = 1
    """Slices per sequence. Their edges stay on the device."""
    edges_every: int = 1
    """One in this many edges is kept."""
    tied: bool = True
    """Whether the embedding is also the output head."""
    zero: dict[str, int] = field(default_factory=dict)
    """Further settings of `zero_optimization`, besides the small buckets."""

    LENGTH, VOCABULARY = 512, 2000

    def model(self) -> ModelConfig:
        """Return the model: small enough for a CPU, with more memory in activations than in model states."""
        context = {"context": {"variant": self.variant, "states": 8}, "ssm": {"state": 8, "chunk": 16}}
        return ModelConfig(
            width=256,
            heads=4,
            ffn=1024,
            block=64,
            depth=4,
            vocab_size=self.VOCABULARY,
            mixer=self.mixer,
            tied=self.tied,
            placement=[1, 3],
            **(context if self.mixer == "bst" else {}),
        )

    def section(self) -> dict[str, Any]:
        """Return DeepSpeed's `zero_optimization`. Buckets are small, because a large one would hide every error."""
        sizes = {"reduce_bucket_size": 500_000, "stage3_prefetch_bucket_size": 200_000}
        return {"stage": self.stage, **sizes, "stage3_param_persistence_threshold": 1000, **self.zero}

    def work(self) -> Work:
        """Return the same configuration in the plan's terms."""
        return Work(
            strategy=Strategy.of(self.section(), self.name),
            world=self.world,
            slice=Slice(self.rows, self.share, self.sp, stream=self.slices > 1),
            accumulation=self.backward_passes,
            checkpointing=ActivationCheckpointingConfig(policy=self.policy),
            depth=self.model().depth,
            slices=self.slices,
            edges_every=self.edges_every,
        )

    @property
    def share(self) -> int:
        """Tokens of one rank's part of a slice."""
        return self.LENGTH // (self.sp * self.slices)

    @property
    def backward_passes(self) -> int:
        """Backward passes per step."""
        return self.micro_batches * self.slices


CASES = (
    Case("one rank", stage=0, world=1, mixer="sliding"),
    Case("zero0", stage=0),
    Case("zero0, accumulated", stage=0, micro_batches=2, variant="MF"),
    Case("zero1", stage=1, variant="MH"),
    Case("zero1, accumulated", stage=1, micro_batches=2, policy="every-layer"),
    Case("zero1, sp2", stage=1, sp=2, rows=4),
    Case("zero1, fp32", stage=1, precision="fp32", variant="MF"),
    Case("zero2", stage=2, variant="MF"),
    Case("zero2, four ranks", stage=2, world=4, micro_batches=2, rows=1, policy="selective"),
    Case("zero2, sp2 of four", stage=2, world=4, sp=2, rows=2, variant="MF", zero={"overlap_comm": True}),
    Case("zero2, one in two", stage=2, policy="every-kth-layer", rows=4),
    Case("zero2, head of its own", stage=2, tied=False),
    Case("zero3", stage=3),
    Case("zero3, head of its own", stage=3, tied=False),
    Case("zero3, partly kept", stage=3, policy="every-layer", zero={"stage3_max_reuse_distance": 2_000_000}),
    Case("zero3, sp2, accumulated", stage=3, sp=2, micro_batches=2, variant="MF"),
    Case("zero1, slices", stage=1, slices=4),
    Case("zero3, slices", stage=3, slices=4),
    Case("zero3, one edge in two", stage=3, slices=8, edges_every=2, sp=2),
    Case("zero3, slices, gathered once", stage=3, slices=4, zero={"stage3_param_persistence_threshold": 10**12}),
    Case("zero1, offload", stage=1, policy="offload", mixer="sliding"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="WORD", default="", help="only configurations whose name contains this")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan and measure every configuration. `passed` is False if an error exceeds its tolerance."""
    rows = [compare(case) for case in CASES if args.only in case.name]
    _print(rows)
    passed = all(
        abs(row["memory_error"]) <= MEMORY_TOLERANCE and abs(row["traffic_error"]) <= TRAFFIC_TOLERANCE for row in rows
    )
    return {"passed": passed, "rows": rows}


def compare(case: Case) -> dict[str, Any]:
    """Return planned and measured figures: memory of the rank that holds most, bytes of the rank that sends most."""
    planned, planned_traffic = plan(case)
    ranks = measure(case)
    highest = max(rank["memory_bytes"] for rank in ranks)
    busiest = max((rank["sent_bytes"] for rank in ranks), key=lambda kinds: sum(kinds.values()))
    return {
        "case": asdict(case),
        "planned_memory_bytes": planned.total,
        "planned_peak": planned.phase,
        "measured_memory_bytes": highest,
        "memory_error": planned.total / highest - 1,
        "planned_sent_bytes": planned_traffic,
        "measured_sent_bytes": busiest,
        "traffic_error": _error(sum(planned_traffic.values()), sum(busiest.values())),
    }


def plan(case: Case) -> tuple[Memory, dict[str, float]]:
    """Return the planned peak memory, and the planned bytes sent by kind."""
    model = case.model()
    work = case.work()
    activations = Activations(model, case.precision == "bf16", fused=False)
    traffic = zero_traffic(activations.sizes, work)
    messages = activations.messages(replace(work.slice, rows=1))
    between = sum(sequence_traffic(model, work, messages).values())
    needs = memory(activations.sizes, model.mixers(), activations, work)
    return needs, traffic | ({"sequence": between} if between else {})


def measure(case: Case) -> list[dict[str, Any]]:
    """Train with real ranks, and return what each rank measured."""
    from bst_base.host import free_port
    from bst_dist.parallel.ranks import choose_accelerator

    choose_accelerator()
    from bst_dist.parallel.deepspeed_import import deepspeed  # noqa: F401  # ranks are forked from here, and start at once

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        arguments = (case, free_port(), Path(directory))
        mp.start_processes(_rank, args=arguments, nprocs=case.world, start_method="fork")
        return [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(case.world)]


def _rank(rank: int, case: Case, port: int, directory: Path) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.world, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    from bst_dist.parallel.ranks import Ranks

    ranks = Ranks()
    wire = Wire(case.world)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step = _trainer(case, Mesh(case.world, rank, case.sp))
        for number in range(STEPS):
            wire.take()
            with record_function(f"step {number}"), wire:
                step()
    found = {"memory_bytes": high_water(profiled, f"step {STEPS - 1}"), "sent_bytes": wire.take()}
    Path(directory, f"{rank}.json").write_text(json.dumps(found))
    ranks.barrier()
    os._exit(0)  # the profiler's and the backend's threads would race each other to the end


def _trainer(case: Case, mesh: Mesh) -> Callable[[], None]:
    """Build a model with a DeepSpeed engine, and return a function that trains one step on random tokens."""
    from bst_dist.train.config import OptimizerConfig
    from bst_dist.train.deepspeed_json import Intent, complete
    from bst_dist.train.engine import Engine

    model = LanguageModel(case.model())
    model.checkpoint = policy(ActivationCheckpointingConfig(policy=case.policy), model.layers)
    intent = Intent(case.world, case.rows, case.backward_passes, 1.0, case.precision)
    engine = Engine(model, OptimizerConfig(), complete({"zero_optimization": case.section()}, intent, case.name))
    ids = torch.randint(case.VOCABULARY, (case.rows, case.LENGTH // case.sp))

    def step() -> None:
        engine.set_rates(1.0)
        for index in range(case.micro_batches):
            last = index == case.micro_batches - 1
            go_backward(_Sequence(case, engine, mesh.sp_group(), ids, last), EdgesHere(), every=case.edges_every)
        engine.update()

    return step


@dataclass
class _Sequence:
    """This rank's part of one micro-batch, for `go_backward`: runs its slices through the engine."""

    case: Case
    engine: Engine
    group: SequenceGroup | None
    ids: Tensor
    last: bool
    """Whether this is the last micro-batch of the step."""

    @property
    def lengths(self) -> list[int]:
        return [self.case.share * self.case.sp] * self.case.slices

    def needs_no_edge(self, s: int) -> bool:
        return False

    def run_for_edge(self, s: int, past: EarlierCall) -> None:
        self.engine.forward(self._part(s), past=past_of_slice(self.group, self.case.share, past))

    def loss(self, s: int, past: EarlierCall | None) -> Tensor:
        ids = self._part(s)
        return self.engine.forward(ids, ids, past=past_of_slice(self.group, self.case.share, past)).total

    def backward(self, s: int, loss: Tensor) -> None:
        self.engine.accumulate(loss / self.ids.numel(), last=self.last and s == 0)

    def _part(self, s: int) -> Tensor:
        return self.ids[:, s * self.case.share : (s + 1) * self.case.share]


class Wire(TorchDispatchMode):
    """Counts the bytes that this rank sends through torch.distributed, whoever calls it."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            for kind, count in self._count(func.__name__.partition(".")[0], args):
                self.sent[kind] += count
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and isinstance(out, tuple):  # a collective, not a point-to-point message
            out[-1].wait()
            time.sleep(SETTLING_S)
        return out

    def take(self) -> dict[str, float]:
        """Return the bytes sent since the last call, by kind."""
        taken = dict(self.sent)
        self.sent = Counter()
        return taken

    def _count(self, name: str, args: tuple) -> Iterator[tuple[str, float]]:
        first, second = (_nbytes(arg) for arg in (*args, None, None)[:2])
        if name == "allreduce_" and first > 16:  # the plan leaves out norms and flags
            yield REDUCE, sent(REDUCE, first, self.world)
        elif name == "_allgather_base_":
            yield GATHER, sent(GATHER, first, self.world)
        elif name == "_reduce_scatter_base_":
            yield SCATTER, sent(SCATTER, second, self.world)
        elif name == "allgather_":  # between the ranks that share a sequence
            yield "sequence", first - second
        elif name == "send":
            yield "sequence", first


def _nbytes(value: Any) -> int:
    return sum(x.nbytes for x in tree_iter(value) if isinstance(x, torch.Tensor))


def high_water(profiled: profile, during: str) -> int:
    """Return the peak of allocated bytes during the range `during`, counted from the start of the profile."""
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    (part,) = (event for event in events if event.name() == during)
    now = highest = 0
    for at, change in changes:
        now += change
        if part.start_ns() <= at <= part.start_ns() + part.duration_ns():
            highest = max(highest, now)
    return highest


def _error(planned: float, measured: float) -> float:
    return planned / measured - 1 if measured else float(planned > 0)


def _print(rows: list[dict[str, Any]]) -> None:
    columns = (
        "configuration",
        "ranks",
        "ZeRO",
        "sp",
        "layers",
        "checkpointing",
        "micro",
        "planned MiB",
        "measured",
        "error",
        "planned KiB",
        "measured",
        "error",
    )
    cells = []
    for row in rows:
        case = Case(**row["case"])
        layers = case.mixer if case.mixer != "bst" else case.variant
        wire = (sum(row["planned_sent_bytes"].values()), sum(row["measured_sent_bytes"].values()))
        cells.append(
            [
                case.name,
                str(case.world),
                str(case.stage),
                str(case.sp),
                layers,
                case.policy,
                f"{case.micro_batches} x {case.rows}",
                *(f"{row[key] / 2**20:,.1f}" for key in ("planned_memory_bytes", "measured_memory_bytes")),
                f"{row['memory_error']:+.1%}",
                *(f"{count / 2**10:,.0f}" for count in wire),
                f"{row['traffic_error']:+.1%}",
            ]
        )
    print_table(Sheet(columns, cells), "one rank's memory and what it sends in a step, planned and measured")
