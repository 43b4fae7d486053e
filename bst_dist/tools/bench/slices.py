"""Run one long sequence forward and backward, in slices and whole: time, memory and bytes of edges.

    bst bench slices
    bst bench slices --lengths 1048576 --slice-tokens 4096 --edges disk

Each case runs in a separate process, with random tokens and without an optimizer: one gradient of one sequence. Memory
is the peak resident size of the process, torch and its libraries included; on a GPU, torch's peak allocated memory.
Page faults count pages of host memory that are touched for the first time; memory that is freed and allocated again
counts again. Progress is printed to standard error, one line every few slices.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bst_base.terminal import Sheet, print_table
from bst_dist.activation import policy as activation
from bst_dist.activation.edges import Place, edges_in
from bst_dist.activation.policy import ActivationCheckpointingConfig
from bst_dist.model.lm import LanguageModel, ModelConfig
from bst_dist.parallel.sequence.past import EarlierCall
from bst_dist.parallel.sequence.slices import Spacing, go_backward
from bst_dist.tools.bench.timing import device as on_device

LENGTHS = (16384, 65536, 262144, 1048576)
SLICES = (2048, 4096, 16384)
AT_ONCE = 65536
"""Longest sequence that is also run whole, by default."""
REPORTS = 32
"""Number of progress lines in each pass."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="L", help="tokens of the sequence")
    parser.add_argument("--slice-tokens", nargs="+", type=int, default=SLICES, metavar="N", help="tokens of a slice")
    parser.add_argument("--edges", nargs="+", choices=get_args(Place), default=["device"], help="where to keep edges")
    parser.add_argument(
        "--edges-every",
        nargs="+",
        type=int,
        default=[1],
        metavar="K",
        help="keep one edge in K, and recompute the slices between (default 1)",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=AT_ONCE,
        metavar="L",
        help=f"also run sequences up to this length whole (default {AT_ONCE}; 0: none)",
    )
    parser.add_argument(
        "--checkpointing",
        default="every-layer",
        metavar="POLICY",
        help="activation checkpointing policy for whole sequences; slices use none",
    )
    parser.add_argument("--mixer", default="bst", help="mixer of all layers, a value of model.mixer")
    parser.add_argument("--variant", default="SH", help="context variant of bst: SH, MH or MF")
    sizes = {
        "width": (256, "model width D"),
        "heads": (4, "attention heads"),
        "depth": (12, "layers"),
        "block": (512, "block W in tokens"),
        "vocabulary": (4096, "vocabulary size"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every case in turn, and print the table."""
    settings = {name: getattr(args, name) for name in ("mixer", "variant", "width", "heads", "depth", "block")}
    settings["vocabulary"] = args.vocabulary
    cases = []
    for length in args.lengths:
        if length <= args.at_once:
            cases.append(
                {"length": length, "slice": length, "edges": "device", "every": 1, "checkpointing": args.checkpointing}
            )
        for size in args.slice_tokens:
            if size < length:
                cases += [
                    {"length": length, "slice": size, "edges": place, "every": every, "checkpointing": "none"}
                    for place in args.edges
                    for every in args.edges_every
                ]
    rows = [_measured(settings | case) for case in cases]
    _print(settings, rows)
    return {"model": settings, "threads": torch.get_num_threads(), "cases": rows}


def _measured(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a separate process, so that its peak memory is not affected by other cases."""
    found = subprocess.run(
        [sys.executable, "-m", "bst_dist.tools.bench.slices", json.dumps(case)],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = found.stdout.splitlines()
    return case | (json.loads(lines[-1]) if found.returncode == 0 and lines else {"failed": found.returncode})


class _Sequence:
    """The slices of one sequence of random tokens, for `go_backward`; prints the progress."""

    def __init__(self, model: LanguageModel, ids: Tensor, size: int, device: torch.device) -> None:
        self.model, self.ids, self.size, self.device = model, ids, size, device
        self.lengths = [size] * (-(-(ids.shape[1] - 1) // size))
        self.start = time.perf_counter()
        self.passes = 0
        """Forward passes of slices so far."""
        self.edge_bytes = 0
        """Bytes of one edge."""

    def needs_no_edge(self, s: int) -> bool:
        return False

    def run_for_edge(self, s: int, past: EarlierCall) -> None:
        self.model(self._tokens(s)[0], past=past)
        self.edge_bytes = sum(x.nbytes for x in past.after.values())
        self.passes += 1
        self._tell("forward for an edge", s)

    def loss(self, s: int, past: EarlierCall | None) -> Tensor:
        self.passes += 1
        return self.model(*self._tokens(s), past=past).total

    def backward(self, s: int, loss: Tensor) -> None:
        (loss / (self.ids.shape[1] - 1)).backward()
        self._tell("backward", len(self.lengths) - 1 - s)

    def _tokens(self, s: int) -> tuple[Tensor, Tensor]:
        part = self.ids[:, s * self.size : (s + 1) * self.size + 1].to(self.device)
        return part[:, :-1], part[:, 1:]

    def _tell(self, way: str, done: int) -> None:
        if (done + 1) % max(1, len(self.lengths) // REPORTS) == 0 or done + 1 == len(self.lengths):
            seconds = time.perf_counter() - self.start
            peak = _peak(self.device) / 2**30
            print(
                f"{len(self.lengths) * self.size:,} tokens, {way}: {done + 1} of {len(self.lengths)} slices, "
                f"{seconds:,.0f} s, {time.process_time():,.0f} s of processor, peak {peak:.2f} GiB",
                file=sys.stderr,
                flush=True,
            )


def _one_case(case: dict[str, Any]) -> dict[str, Any]:
    """Compute the gradient of one sequence; return time, memory and bytes of edges."""
    device = on_device()
    torch.manual_seed(0)
    model = _model(case).to(device)
    checkpointing = ActivationCheckpointingConfig(policy=case["checkpointing"])
    model.checkpoint = activation.policy(checkpointing, model.layers)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(case["vocabulary"], (1, case["length"] + 1), generator=generator)
    before = _peak(device)
    sequence = _Sequence(model, ids, case["slice"], device)
    spacing = Spacing(len(sequence.lengths), case["every"])
    begin = time.perf_counter()
    processor = time.process_time()
    faults = _page_faults()
    go_backward(sequence, edges_in(case["edges"]), every=case["every"])
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {
        "s": time.perf_counter() - begin,
        "processor_s": time.process_time() - processor,
        "peak_bytes": _peak(device),
        "before_bytes": before,
        "page_faults": _page_faults() - faults,
        "forward_passes": sequence.passes / len(sequence.lengths),
        "edge_bytes": sequence.edge_bytes,
        "edges_bytes": sequence.edge_bytes * (spacing.waiting + spacing.between),
        "gradient_norm": float(norm),
        "threads": torch.get_num_threads(),
    }


def _model(case: dict[str, Any]) -> LanguageModel:
    context = {"context": {"variant": case["variant"]}} if case["mixer"] == "bst" else {}
    return LanguageModel(
        ModelConfig(
            width=case["width"],
            heads=case["heads"],
            ffn=4 * case["width"],
            block=case["block"],
            depth=case["depth"],
            vocab_size=case["vocabulary"],
            mixer=case["mixer"],
            **context,
        )
    )


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not from getrusage, where a process starts with its parent's peak.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _print(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    cells = []
    columns = (
        "tokens",
        "a slice",
        "edges",
        "forward passes",
        "s",
        "processor s",
        "ms per token",
        "page faults per token",
        "peak GiB",
        "edge MiB",
        "edges MiB",
    )
    for row in rows:
        size = "at once" if row["slice"] == row["length"] else f"{row['slice']:,}"
        place = row["edges"] if row["every"] == 1 else f"{row['edges']}, one in {row['every']}"
        head = (f"{row['length']:,}", size, "" if size == "at once" else place)
        if "failed" in row:
            cells.append([*head, f"failed ({row['failed']})", *[""] * (len(columns) - 4)])
            continue
        time_, faults = (row[key] / row["length"] for key in ("processor_s", "page_faults"))
        cells.append(
            [
                *head,
                f"{row['forward_passes']:.2f}",
                f"{row['s']:,.0f}",
                f"{row['processor_s']:,.0f}",
                f"{1000 * time_:.2f}",
                f"{faults:.2f}",
                f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['edge_bytes'] / 2**20:.2f}",
                f"{row['edges_bytes'] / 2**20:,.1f}",
            ]
        )
    print_table(Sheet(columns, cells), f"one sequence forward and backward: {title}")


if __name__ == "__main__":
    print(json.dumps(_one_case(json.loads(sys.argv[1]))))
