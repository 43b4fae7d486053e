"""The parts of `bst bench gpu` that measure layers: the time of each kind, and of every kernel of some."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import torch

from bst_dist.model.layers import Layer
from bst_dist.model.loss import linear_cross_entropy
from bst_dist.parallel.sequence.past import Past
from bst_dist.plan.flops import forward_flops
from bst_dist.plan.hardware import peak_flops
from bst_dist.tools.bench.gpu_sizes import LAYERS, QUEUED, Sizes, sizes_of, stack_sizes
from bst_dist.tools.bench.timing import device as on_device
from bst_dist.tools.bench.timing import seconds_of

DEEP = 4
"""Number of layers that are timed together."""

LOSS = "loss"
"""The name of the loss among the layers whose kernels are measured."""


def layers(small: bool, until: float) -> dict[str, Any]:
    """Time forward plus backward of each kind of layer in bf16, uncompiled and compiled to one graph, interleaved.

    DEEP layers run one after another and the time is divided by DEEP. So, as in a model, the host queues a layer while
    the device computes the previous one, and data that layers share (masks) is made once.
    """
    sizes = sizes_of(small)
    device = on_device()
    begun = _begin(sizes, device, until)
    seconds = {key: [s / DEEP for s in own] for key, own in _in_turn(begun.cases, sizes.rounds, until).items()}
    rows = _layer_rows(seconds, begun.first_s, sizes, peak_flops(device, torch.bfloat16))
    return {"sizes": vars(sizes), "rows": rows, "left_out": begun.left_out}


Key: TypeAlias = tuple[str, bool]
"""A kind of layer, and whether it is compiled."""


class _Begun(NamedTuple):
    """The cases that ran once."""

    cases: dict[Key, Callable[[], None]]
    first_s: dict[Key, float]
    """Seconds of each first pass, which compiles."""
    left_out: list[str]
    """Why each of the other cases did not run."""


def _begin(sizes: Sizes, device: torch.device, until: float) -> _Begun:
    """Run each kind of layer once, on a GPU also compiled, for which there is time up to 60 % of the way to `until`."""
    compile_until = until - 0.4 * (until - time.monotonic())
    begun = _Begun({}, {}, [])
    for compiled in (False, True) if device.type == "cuda" else (False,):
        for name in LAYERS:
            if time.monotonic() > (compile_until if compiled else until):
                begun.left_out.append(f"{name}, compiled: {compiled}: time was over")
                continue
            case = layer_pass(name, sizes, device, compiled, DEEP)
            try:
                begun.first_s[name, compiled] = seconds_of(case)
            except Exception as error:  # a layer that does not compile must not stop the others
                begun.left_out.append(f"{name}, compiled: {compiled}: {type(error).__name__}: {error}"[:400])
                continue
            begun.cases[name, compiled] = case
    return begun


def _layer_rows(
    seconds: dict[Key, list[float]], first_s: dict[Key, float], sizes: Sizes, peak: float
) -> list[dict[str, Any]]:
    """Return a row of figures per case, from the seconds of a pass through one layer in each round.

    `peak`: FLOP/s of the device.
    """
    best = {name: min(median(seconds[key]) for key in seconds if key[0] == name) for name, _ in seconds}
    rows = []
    for (name, compiled), own in seconds.items():
        terms = forward_flops(sizes.config(**LAYERS[name], depth=1), sizes.length)
        flops = 3 * (sum(terms.values()) - terms["head"])
        row = {
            "layer": name,
            "compiled": compiled,
            "first_s": first_s[name, compiled],
            "ms": 1e3 * median(own),
            "ms_low": 1e3 * min(own),
            "ms_high": 1e3 * max(own),
            "of_peak": flops * sizes.rows * sizes.length / median(own) / peak,
            "by_sliding": best["sliding"] / median(own),
            "rounds": len(own),
        }
        if "Block-Recurrent" in best:
            row["by_block_recurrent"] = best["Block-Recurrent"] / median(own)
        rows.append(row)
    return rows


def _in_turn(cases: dict[Key, Callable[[], None]], rounds: int, until: float) -> dict[Key, list[float]]:
    """Return the seconds of each case in each round. At least one round runs; no round begins after `until`."""
    seconds: dict[Key, list[float]] = {key: [] for key in cases}
    for done in range(rounds):
        if done and time.monotonic() > until:
            break
        for key, case in cases.items():
            seconds[key].append(seconds_of(case, QUEUED))
    return seconds


def layer_pass(name: str, sizes: Sizes, device: torch.device, compiled: bool, depth: int = 1) -> Callable[[], None]:
    """Return a function that runs forward and backward of `depth` layers of one kind in bf16.

    Inputs and incoming gradients are random. The layers share their masks, as in a model.
    """
    config = sizes.config(**LAYERS[name], depth=depth)
    layers = [Layer(config.mixer, config).to(device) for _ in range(depth)]
    for layer in layers:
        layer.initialize(depth)
        layer.compiled = compiled
    x = torch.randn(sizes.rows, sizes.length, sizes.width, device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def call() -> None:
        past = Past()
        out = x
        with torch.autocast(device.type, torch.bfloat16):
            for index, layer in enumerate(layers):
                out = layer(out, past.child(str(index)))
        out.backward(gradient)
        x.grad = None
        for layer in layers:
            layer.zero_grad(set_to_none=True)

    return call


def compile_ahead(name: str, width: int) -> None:
    """Compile one kind of layer into torch's cache on disk. Runs in one process per kind, so that all cores compile."""
    layer_pass(name, stack_sizes(width), on_device(), compiled=True)()


AHEAD = [*((name, 1024) for name in LAYERS), ("sliding", 2048), ("BST SH", 2048)]
"""Kinds and widths compiled before anything is measured: those of the layers and stack parts."""


def kernels(small: bool, until: float) -> dict[str, Any]:
    """Measure where the time goes: launches and time of every kernel of both passes of a compiled layer, and of the
    loss. DEEP layers are measured together, and the figures divided by DEEP.

    The last row of a layer is the time of a pass without the profiler, less that of all kernels: gaps between kernels,
    and the lower clock of a longer run, if the card reaches its power limit.
    """
    sizes = sizes_of(small)
    device = on_device()
    rows = []
    for name in ("sliding", "BST SH", "BST MF", LOSS):
        if time.monotonic() > until:
            return {"rows": rows, "left_out": [f"{name}: time was over"]}
        if name == LOSS:
            case = loss_pass(sizes, device)
            count = 1
        else:
            case = layer_pass(name, sizes, device, device.type == "cuda", DEEP)
            count = DEEP
        seconds_of(case, QUEUED)
        whole = 1e6 * median(seconds_of(case, QUEUED) for _ in range(sizes.rounds))
        found = _kernels_of(case, device)
        found.append(("rest", whole - sum(us for _, us, _ in found), 0))
        rows += [
            {"layer": name, "us": us / count, "share": us / whole, "launches": launches / count, "kernel": kernel}
            for kernel, us, launches in found
        ]
    return {"rows": rows}


def loss_pass(sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """Return a function that computes the loss in bf16 and its gradients, compiled on a GPU, from random states."""
    shape = sizes.rows, sizes.length, sizes.width
    hidden = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(sizes.vocabulary, sizes.width, device=device, requires_grad=True)
    labels = sizes.tokens(device)[:, 1:]
    mask = torch.ones_like(labels, dtype=torch.bool)

    def call() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            inputs = hidden, weight, labels, mask, sizes.width**-0.5
            linear_cross_entropy(*inputs, fused=device.type == "cuda")[0].backward()
        hidden.grad = weight.grad = None

    return call


def _kernels_of(case: Callable[[], None], device: torch.device) -> list[tuple[str, float, int]]:
    """Return name, microseconds and launches of all kernels of a call, the longest first; on a CPU, of operators."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        seconds_of(case)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found = [one for one in profile.key_averages() if one.device_type == kind]
    times = [(one.key, one.self_device_time_total if on_gpu else one.self_cpu_time_total, one.count) for one in found]
    return sorted(times, key=lambda kernel: -kernel[1])
