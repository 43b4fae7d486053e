"""Time one layer of every model and of two other packages, in one run.

    bst bench layers --lengths 4096 --dtypes fp32 --rounds 3 --only "BST SH"
    bst bench layers --no-peers

Each layer includes its feed-forward network; batch 1, random input. Times are medians over interleaved rounds, with
their range. "speed" is relative to our sliding-window layer, paired by round. "of peak" is the layer's FLOP/s divided
by those of a 2048 x 2048 matrix product measured in the same rounds.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table, say
from bst_dist.model.config import ModelConfig
from bst_dist.model.layers import Layer
from bst_dist.parallel.sequence.past import Past
from bst_dist.plan.flops import forward_flops
from bst_dist.tools.bench import peers, timing
from bst_dist.tools.bench.timing import Spread, interleaved, matmul_flops_per_s, ratios

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FULL_ATTENTION_LIMIT = 16_384
"""Longest sequence that full attention is measured at, because its cost is quadratic."""

# Our layers by their name in the table: the mixer, and the settings that differ from the defaults.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding": ("sliding", {}),
    "BST SH": ("bst", {"context": {"variant": "SH"}}),
    "BST MH": ("bst", {"context": {"variant": "MH"}}),
    "BST MF": ("bst", {"context": {"variant": "MF"}}),
    "BST SH hyena": ("bst", {"context": {"variant": "SH"}, "ssm": {"kernel": "hyena"}}),
    "BST MF explicit": ("bst", {"context": {"variant": "MF"}, "ssm": {"kernel": "explicit"}}),
    "BST SH s4-dplr": ("bst", {"context": {"variant": "SH"}, "ssm": {"kernel": "s4-dplr"}}),
    "Transformer-XL": ("transformer-xl", {}),
    "Block-Recurrent": ("block-recurrent", {}),
    "GSS": ("gss", {}),
    "pure SSM": ("ssm", {}),
    "full attention": ("full", {}),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    width: int
    heads: int
    block: int


SHAPES = {"paper": Shape(512, 8, 512), "latency": Shape(64, 4, 32)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="paper", help="paper: D 512, W 512; latency: D 64, W 32")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384], metavar="L", help="tokens of a sequence"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="precisions")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"which of our layers to measure: {', '.join(OURS)}")
    parser.add_argument("--no-peers", action="store_true", help="leave out (and do not install) the other packages")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="timed rounds")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print one table per length and precision, and return every figure."""
    unknown = set(args.only or ()) - set(OURS)
    if unknown:
        raise UserError(f"no layer named {', '.join(sorted(unknown))}; there are: {', '.join(OURS)}")
    if not args.no_peers:
        peers.install()
    device = timing.device()
    shape, rows = SHAPES[args.shape], []
    say(
        f"{_machine(device)}, {torch.get_num_threads()} threads, {args.rounds} rounds; layer D {shape.width}, "
        f"{shape.heads} heads, W {shape.block}, FFN {4 * shape.width}, batch 1"
    )
    for dtype in args.dtypes:
        for length in args.lengths:
            measured = _measure(shape, length, dtype, device, args)
            _print(measured, length, dtype)
            rows += measured
    return {
        "machine": _machine(device),
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "shape": vars(shape),
        "layers": rows,
    }


def _layers(shape: Shape, length: int, args: argparse.Namespace) -> dict[str, tuple[nn.Module, float | None]]:
    """Return the modules by name, with their forward FLOPs per token (None for those of other packages)."""
    layers: dict[str, tuple[nn.Module, float | None]] = {}
    for name, (mixer, sections) in OURS.items():
        wanted = args.only is None or name in args.only or name == "sliding"
        if not wanted or (mixer == "full" and length > FULL_ATTENTION_LIMIT):
            continue
        if sections.get("ssm", {}).get("kernel") in ("hyena", "explicit"):
            sections = sections | {"ssm": sections["ssm"] | {"length": length}}
        if mixer == "block-recurrent":  # as many states as a block has tokens, like the layer of the other package
            sections = {"block_recurrent": {"states": shape.block}}
        config = ModelConfig(
            width=shape.width,
            heads=shape.heads,
            ffn=4 * shape.width,
            block=shape.block,
            depth=1,
            mixer=mixer,
            vocab_size=2,
            **sections,
        )
        layer = Layer(mixer, config)
        layer.initialize(1)
        terms = forward_flops(config, length)
        layers[name] = layer, sum(terms.values()) - terms["head"]
    if not args.no_peers:
        layers["block-recurrent-transformer-pytorch"] = (
            peers.BlockRecurrentPeer(shape.width, shape.heads, shape.block, length),
            None,
        )
        layers["local-attention"] = peers.LocalAttentionPeer(shape.width, shape.heads, shape.block), None
    return layers


def _measure(shape: Shape, length: int, dtype: str, device: torch.device, args: argparse.Namespace) -> list[dict]:
    layers = {name: (layer.to(device), flops) for name, (layer, flops) in _layers(shape, length, args).items()}
    x = torch.randn(1, length, shape.width, device=device, requires_grad=True)
    cases: dict[str, Callable[[], object]] = {}
    for name, (layer, _) in layers.items():
        cases[f"{name}/forward"] = _forward(layer, x, DTYPES[dtype])
        cases[f"{name}/training"] = training_pass(layer, x, DTYPES[dtype])
    peaks: list[float] = []
    cases["peak"] = lambda: peaks.append(matmul_flops_per_s(DTYPES[dtype], device))
    with Progress(transient=True) as progress:
        task = progress.add_task(f"{length} tokens, {dtype}", total=len(cases) * (args.rounds + 1))
        seconds = interleaved(cases, args.rounds, lambda: progress.advance(task))
    rows = [_row(name, flops, seconds, peaks[1:], length) for name, (_, flops) in layers.items()]
    return [{"dtype": dtype, "length_tokens": length, **row} for row in rows]


def _row(name: str, flops: float | None, seconds: dict[str, list[float]], peaks: list[float], length: int) -> dict:
    """Return every figure of one layer; `flops` are those of one token's forward pass."""
    training = seconds[f"{name}/training"]
    reached = [3 * (flops or 0) * length / s / peak for s, peak in zip(training, peaks, strict=True)]
    return {
        "layer": name,
        "forward_s": vars(Spread.of(seconds[f"{name}/forward"])),
        "training_s": vars(Spread.of(training)),
        "speed_vs_sliding": vars(ratios(seconds["sliding/training"], training)),
        "fraction_of_peak": vars(Spread.of(reached)) if flops else None,
        "peak_gflops_per_s": Spread.of(peaks).median / 1e9,
    }


def _forward(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    def run_() -> None:
        with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            _call(layer, x)

    return run_


def training_pass(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that runs forward and backward of a layer on `x` (B, L, D), under autocast unless fp32.

    The incoming gradient is random: matrix products of equal numbers take less power, and so less time.
    """
    gradient = torch.randn_like(x)

    def run_() -> None:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            out = _call(layer, x)
        out.backward(gradient.to(out.dtype))
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return run_


def _call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x, Past()) if isinstance(layer, Layer) else layer(x)


def _print(rows: list[dict], length: int, dtype: str) -> None:
    cells = []
    for row in rows:
        training = Spread(*(1e3 * row["training_s"][key] for key in ("median", "low", "high")))
        reached = row["fraction_of_peak"]
        cells.append(
            [
                row["layer"],
                f"{1e3 * row['forward_s']['median']:.0f}",
                f"{training.median:.0f} ({training.low:.0f}–{training.high:.0f})",
                str(Spread(**row["speed_vs_sliding"])),
                f"{reached['median']:.0%}" if reached else "",
            ]
        )
    print_table(
        Sheet(("layer", "fwd ms", "fwd+bwd ms", "speed vs sliding", "of peak"), cells),
        f"{length} tokens, {dtype} (matmul peak {rows[0]['peak_gflops_per_s']:.0f} GFLOP/s)",
    )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import cpuinfo

    name = cpuinfo.get_cpu_info().get("brand_raw", platform.processor())
    return f"{name}, {torch.get_num_threads()} cores used at most"
