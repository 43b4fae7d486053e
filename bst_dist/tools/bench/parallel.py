"""Compare two kinds of sequence parallelism of the same layer, by passing states and by all-to-alls: bytes and time.

    bst bench parallel --layers SH sliding --lengths 4096 --sp 1 2 --width 256

Runs one layer, forward and backward, with its sequence over `sp` ranks of this machine (gloo on CPUs with one thread
per rank, NCCL on GPUs). Bytes are those that the busiest rank sends in one pass. Times are the slowest rank's: the
median of the repeats, with the fastest and the slowest; "CPU ms" is the processor time of the busiest rank, which
depends less on other programs on the machine. Both forms share weights and must give the same numbers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bst_base.terminal import Sheet, print_table
from bst_dist.model.config import LayerConfig
from bst_dist.model.layers import Layer
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.sequence.group import SequenceGroup
from bst_dist.parallel.sequence.neighbour import LeftNeighbour
from bst_dist.parallel.sequence.past import Past
from bst_dist.parallel.sequence.traffic import Traffic
from bst_dist.tools.bench.all_to_all import all_to_all_form

LAYERS = ("sliding", "SH", "MH", "MF")
TOLERANCE = 1e-4
"""Largest relative error, in fp32, at which two forms count as the same layer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], metavar="L", help="sequence lengths")
    parser.add_argument("--sp", type=int, nargs="+", default=[1, 2], metavar="N", help="ranks that share a sequence")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS, help="kinds of layers")
    parser.add_argument("--width", type=int, default=512, help="model width D (default 512); the FFN has 4 D")
    parser.add_argument("--heads", type=int, default=8, help="attention heads H (default 8); sp must divide them")
    parser.add_argument("--block", type=int, default=512, help="block W (default 512)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes, after one untimed (default 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every layer at every length and sp."""
    rows: list[dict[str, Any]] = []
    for sp in args.sp:
        with tempfile.TemporaryDirectory() as directory:
            mp.spawn(_rank, args=(sp, Path(directory), args), nprocs=sp)
            ranks = [torch.load(Path(directory, f"{rank}.pt")) for rank in range(sp)]
        rows += [_over_ranks(measured) for measured in zip(*ranks, strict=True)]
    _print(rows, args)
    passed = all(row["difference"] <= TOLERANCE for row in rows)
    return {"passed": passed, "width": args.width, "heads": args.heads, "block": args.block, "rows": rows}


def _rank(rank: int, sp: int, directory: Path, args: argparse.Namespace) -> None:
    """Measure all layers at all lengths on one rank, and save the figures to a file."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=sp)
    group = Mesh(sp, rank, sp).sp_group()
    measured: list[dict[str, Any]] = []
    for name in args.layers:
        torch.manual_seed(0)
        layer = build_layer(name, args.width, args.heads, args.block).to(device)
        for length in args.lengths:
            x = torch.randn(1, length, args.width, device=device)
            x = x.chunk(sp, dim=1)[rank].contiguous()
            measured += [
                {"layer": name, "L": length, "sp": sp, **row} for row in measure(layer, x, group, args.repeats)
            ]
    torch.save(measured, directory / f"{rank}.pt")
    dist.destroy_process_group()


def build_layer(name: str, width: int, heads: int, block: int) -> Layer:
    """Return the layer with this name in the table, initialized."""
    settings: dict[str, Any] = {"width": width, "heads": heads, "ffn": 4 * width, "block": block}
    if name == "sliding":
        layer = Layer("sliding", LayerConfig(**settings))
    else:
        layer = Layer("bst", LayerConfig(**settings, context={"variant": name}))
    layer.initialize(depth=1)
    return layer


def measure(layer: Layer, x: Tensor, group: SequenceGroup | None, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield bytes, times and difference of each form of `layer` on this rank's slices `x` (B, l, D)."""
    forms: dict[str, Callable[[Tensor], Tensor]] = {"one rank": lambda u: layer(u, Past())}
    if group is not None:
        redistributed = all_to_all_form(layer, group)
        forms = {
            "states passed": lambda u: layer(u, LeftNeighbour(group, u.shape[1])),
            "all-to-all": lambda u: redistributed(u, LeftNeighbour(group, u.shape[1])),
        }
    values, sent = {}, {}
    traffic = Traffic() if group is None else group.traffic
    for name, form in forms.items():  # not timed; this also warms up
        traffic.take()
        values[name] = _forward_backward(form, x)
        sent[name] = traffic.take()
    times: dict[str, list[float]] = {name: [] for name in forms}
    busy: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):  # interleaved, so that other load on the machine affects both forms equally
        for name, form in forms.items():
            elapsed, cpu = _seconds(form, x)
            times[name].append(elapsed)
            busy[name].append(cpu)
    first = next(iter(values.values()))
    for name in forms:
        yield {
            "form": name,
            "sent_bytes": sent[name],
            "times_s": times[name],
            "cpu_s": busy[name],
            "difference": _difference(values[name], first),
        }


def _forward_backward(form: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the output, and the gradient of its sum of squares with respect to the input, as (2, B, l, D)."""
    x = x.clone().requires_grad_()
    out = form(x)
    out.square().sum().backward()
    return torch.stack((out.detach(), x.grad))


def _difference(values: Tensor, wanted: Tensor) -> float:
    """Return the larger of two relative errors: of the outputs, and the median over tokens of the gradients' errors.

    The median, because rounding can turn a ReLU on or off, which changes the gradient of this one token by per cents.
    """
    out, gradient = (values - wanted).unbind()
    outputs = out.norm() / wanted[0].norm()
    gradients = (gradient.norm(dim=-1) / wanted[1].norm(dim=-1)).median()
    return float(max(outputs, gradients))


def _seconds(form: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """Return the wall-clock seconds of one pass, and the CPU seconds that this rank spent in it."""
    dist.barrier()
    start = time.perf_counter()
    cpu = time.process_time()
    _forward_backward(form, x)[0, 0, 0, 0].item()  # waits for the device
    return time.perf_counter() - start, time.process_time() - cpu


def _over_ranks(measured: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Merge the rows of all ranks into one: the slowest time of each repeat, the bytes of the rank that sends most."""
    busiest = max((row["sent_bytes"] for row in measured), key=lambda sent: sum(sent.values()))
    times, busy = (
        [max(repeat) for repeat in zip(*(row[key] for row in measured), strict=True)] for key in ("times_s", "cpu_s")
    )
    return {
        **measured[0],
        "sent_bytes": busiest,
        "sent_total_bytes": sum(busiest.values()),
        "times_s": times,
        "time_s": statistics.median(times),
        "cpu_s": statistics.median(busy),
        "difference": max(row["difference"] for row in measured),
    }


def _print(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    alone = {(row["layer"], row["L"]): row["time_s"] for row in rows if row["sp"] == 1}
    cells = []
    for row in rows:
        baseline = alone.get((row["layer"], row["L"]))
        cells.append(
            [
                row["layer"],
                f"{row['L']:,}",
                str(row["sp"]),
                row["form"],
                f"{row['sent_total_bytes'] / 2**10:,.0f}",
                f"{1e3 * row['time_s']:,.0f}",
                f"{1e3 * min(row['times_s']):,.0f} - {1e3 * max(row['times_s']):,.0f}",
                f"{baseline / row['time_s']:.2f}" if baseline else "",
                f"{1e3 * row['cpu_s']:,.0f}",
            ]
        )
    worst = max(row["difference"] for row in rows)
    print_table(
        Sheet(("layer", "L", "sp", "form", "KiB sent", "ms", "from - to", "speed-up", "CPU ms"), cells),
        f"one layer, D {args.width}, {args.heads} heads, W {args.block}: forward and backward",
        f"largest relative difference between the forms, outputs and gradients: {worst:.1e}",
    )
