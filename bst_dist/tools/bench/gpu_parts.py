"""The parts of `bst bench gpu`.

Each part is a function of `small` (use small sizes) and `until` (its deadline on time.monotonic()) and returns a
dictionary with its table rows.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from bst_base.json_lines import read_lines
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.activation.policy import policy
from bst_dist.checkpoint.directory import load_weights, newest_valid
from bst_dist.generation.decoding import Generation
from bst_dist.generation.sampling import SamplingConfig
from bst_dist.model.config import ModelConfig
from bst_dist.model.layers import Layer
from bst_dist.model.lm import LanguageModel
from bst_dist.model.loss import linear_cross_entropy
from bst_dist.parallel.sequence.past import Past
from bst_dist.plan.accelerators import Accelerator, accelerator, of_device
from bst_dist.plan.flops import forward_flops, train_flops_per_token
from bst_dist.plan.hardware import peak_flops
from bst_dist.plan.launches import host_seconds
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.memory.parts import Slice
from bst_dist.plan.memory.peak import Work
from bst_dist.plan.memory.zero import Strategy
from bst_dist.plan.speed import Cluster, Moved
from bst_dist.plan.speed import speed as step_speed
from bst_dist.report.metrics import FILE
from bst_dist.tools.bench.timing import device as on_device
from bst_dist.tools.bench.timing import seconds_of

LAYERS: dict[str, dict[str, Any]] = {
    "sliding": {"mixer": "sliding"},
    "BST SH": {"mixer": "bst", "context": {"variant": "SH"}},
    "BST MF": {"mixer": "bst", "context": {"variant": "MF"}},
    "Block-Recurrent": {"mixer": "block-recurrent"},
    "BST MH": {"mixer": "bst", "context": {"variant": "MH"}},
    "Transformer-XL": {"mixer": "transformer-xl"},
    "full": {"mixer": "full"},
    "GSS": {"mixer": "gss", "ssm": {"state": 512, "chunk": 128}},
}
"""Settings of each kind of layer, in the order in which they are compiled while there is time."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and its batch. The defaults are those of the project's performance goals."""

    width: int = 1024
    heads: int = 8
    block: int = 512
    length: int = 4096
    rows: int = 8
    depth: int = 12
    vocabulary: int = 32_000
    rounds: int = 10

    def config(self, **settings: Any) -> ModelConfig:
        """Return the model settings, with RoPE in every layer.

        Block-Recurrent has as many states as a block has tokens; Transformer-XL has a window of four blocks.
        """
        sizes = {"width": self.width, "heads": self.heads, "ffn": 4 * self.width, "block": self.block}
        own = {
            "attention": {"position": "rope"},
            "block_recurrent": {"states": self.block},
            "transformer_xl": {"window": 4 * self.block},
        }
        return ModelConfig(**sizes, **own | {"depth": self.depth} | settings, vocab_size=self.vocabulary)


WIDTHS = (1024, 2048)


def stack_sizes(width: int) -> Sizes:
    """Return the sizes of whole models: the residual stream of one pass has 2^25 numbers."""
    return Sizes(width=width, heads=width // 128, rows=8 * 1024 // width)


SMALL = Sizes(width=32, heads=2, block=16, length=64, rows=1, depth=2, vocabulary=64, rounds=1)
DEEP = 4
"""Number of layers that are timed together."""

QUEUED = 3
"""Passes that are timed together, as in a step of three micro-batches: only the first finds the device idle."""

BST = {"mixer": "bst", "context": {"variant": "SH"}}


def layers(small: bool, until: float) -> dict[str, Any]:
    """Time forward plus backward of each kind of layer in bf16, uncompiled and compiled to one graph, interleaved.

    DEEP layers run one after another and the time is divided by DEEP. So, as in a model, the host queues a layer while
    the device computes the previous one, and data that layers share (masks) is made once.
    """
    sizes, device = _sizes(small), on_device()
    compile_until = until - 0.4 * (until - time.monotonic())
    cases: dict[tuple[str, bool], Callable[[], None]] = {}
    rows, left_out = [], []
    for compiled in (False, True) if device.type == "cuda" else (False,):
        for name in LAYERS:
            if time.monotonic() > (compile_until if compiled else until):
                left_out.append(f"{name}, compiled: {compiled}: time was over")
                continue
            case = layer_pass(name, sizes, device, compiled, DEEP)
            try:
                first = seconds_of(case)
            except Exception as error:  # a layer that does not compile must not stop the others
                left_out.append(f"{name}, compiled: {compiled}: {type(error).__name__}: {error}"[:400])
                continue
            terms = forward_flops(sizes.config(**LAYERS[name], depth=1), sizes.length)
            cases[name, compiled] = case
            rows.append(
                {
                    "layer": name,
                    "compiled": compiled,
                    "first_s": first,
                    "flops": 3 * (sum(terms.values()) - terms["head"]),
                }
            )
    seconds = {key: [s / DEEP for s in own] for key, own in _in_turn(cases, sizes.rounds, until).items()}
    peak = peak_flops(device, torch.bfloat16)
    best = {name: min(median(seconds[key]) for key in seconds if key[0] == name) for name, _ in seconds}
    for row in rows:
        own = seconds[row["layer"], row["compiled"]]
        reached = row.pop("flops") * sizes.rows * sizes.length / median(own) / peak
        row |= {
            "ms": 1e3 * median(own),
            "ms_low": 1e3 * min(own),
            "ms_high": 1e3 * max(own),
            "of_peak": reached,
            "by_sliding": best["sliding"] / median(own),
            "rounds": len(own),
        }
        if "Block-Recurrent" in best:
            row["by_block_recurrent"] = best["Block-Recurrent"] / median(own)
    return {"sizes": vars(sizes), "rows": rows, "left_out": left_out}


def _in_turn(cases: dict[tuple[str, bool], Callable[[], None]], rounds: int, until: float) -> dict[Any, list[float]]:
    """Return the seconds of each case in each round. At least one round runs; no round begins after `until`."""
    seconds: dict[Any, list[float]] = {key: [] for key in cases}
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
        past, out = Past(), x
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
    sizes, device, rows = _sizes(small), on_device(), []
    for name in ("sliding", "BST SH", "BST MF", LOSS):
        if time.monotonic() > until:
            return {"rows": rows, "left_out": [f"{name}: time was over"]}
        if name == LOSS:
            case, count = loss_pass(sizes, device), 1
        else:
            case, count = layer_pass(name, sizes, device, device.type == "cuda", DEEP), DEEP
        seconds_of(case, QUEUED)
        whole = 1e6 * median(seconds_of(case, QUEUED) for _ in range(sizes.rounds))
        found = _kernels_of(case, device)
        found.append(("rest", whole - sum(us for _, us, _ in found), 0))
        rows += [
            {"layer": name, "us": us / count, "share": us / whole, "launches": launches / count, "kernel": kernel}
            for kernel, us, launches in found
        ]
    return {"rows": rows}


LOSS = "loss"


def loss_pass(sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """Return a function that computes the loss in bf16 and its gradients, compiled on a GPU, from random states."""
    shape = sizes.rows, sizes.length, sizes.width
    hidden = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(sizes.vocabulary, sizes.width, device=device, requires_grad=True)
    labels = _tokens(sizes, device)[:, 1:]
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


def stack(small: bool, until: float) -> dict[str, Any]:
    """Measure tokens per second and MFU of whole models: forward, loss and backward, layers compiled on a GPU."""
    device, rows = on_device(), []
    for width in WIDTHS:
        sizes = SMALL if small else stack_sizes(width)
        for name in ("sliding", "BST SH"):
            places = {"placement": [1, 7, 9]} if name == "BST SH" and not small else {}
            model = LanguageModel(sizes.config(**LAYERS[name], **places)).to(device)
            for layer in model.layers:
                layer.compiled = device.type == "cuda"
            model.fused_loss = device.type == "cuda"
            step = _model_pass(model, _tokens(sizes, device))
            first = seconds_of(step)
            measured = [seconds_of(step, QUEUED) for _ in range(sizes.rounds) if time.monotonic() < until]
            if not measured:
                return {"rows": rows, "left_out": [f"{name}, D {width}: time was over"]}
            speed = sizes.rows * sizes.length / median(measured)
            mfu = speed * train_flops_per_token(model.config, sizes.length) / peak_flops(device, torch.bfloat16)
            plan = planned(model.config, sizes, _card(device))
            rows.append(
                {
                    "model": name,
                    "width": sizes.width,
                    "tokens_per_s": speed,
                    "mfu": mfu,
                    "planned_mfu": plan.mfu,
                    "of_plan": plan.seconds / median(measured),
                    "first_s": first,
                    "peak_bytes": _peak(device),
                }
            )
    return {"rows": rows}


class Planned(NamedTuple):
    """Time and MFU that `bst plan` predicts."""

    seconds: float
    mfu: float


def _card(device: torch.device) -> Accelerator | None:
    """Return the plan's figures for this card, None if it has none. On a CPU (a rehearsal), return those of an H100."""
    return of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else accelerator("h100-80gb")


def planned(config: ModelConfig, sizes: Sizes, card: Accelerator | None) -> Planned:
    """Return the plan for both passes of a compiled model, without the update; NaN if the card is unknown."""
    if card is None:
        return Planned(float("nan"), float("nan"))
    part, activations = Slice(sizes.rows, sizes.length), Activations(config, bf16=True)
    work = Work(Strategy("zero0", 0), 1, part, 1, ActivationCheckpointingConfig(), config.depth, compiled=True)
    host_s = host_seconds(activations, config.mixers(), work)
    moved = Moved(
        activations.whole(part, compiled=True), activations.head(part).moved, host=0, updated=0, host_s=host_s
    )
    flops, cluster = forward_flops(config, sizes.length), Cluster(1, 1, card)
    found = step_speed(flops, work, moved, {}, {}, cluster, bf16=True)
    return Planned(found.total, found.flops / found.total / (1e12 * card.bf16_tflops))


def longest(small: bool, until: float) -> dict[str, Any]:
    """Find the longest sequence, doubling each time, for which a BST SH model of 12 layers can compute gradients.

    Every layer is checkpointed (policy every-layer).
    """
    sizes, device, rows = _sizes(small), on_device(), []
    model = LanguageModel(sizes.config(**BST)).to(device)
    model.checkpoint = policy(ActivationCheckpointingConfig(policy="every-layer"), model.layers)
    length, most = 8 * sizes.length, 16 * sizes.length if small else 2**30
    while length <= most and time.monotonic() < until:
        ids = torch.randint(sizes.vocabulary, (1, length + 1), device=device)
        try:
            seconds = seconds_of(_model_pass(model, ids))
        except torch.OutOfMemoryError:
            rows.append({"tokens": length, "s": float("nan"), "peak_bytes": 0, "fits": False})
            break
        rows.append({"tokens": length, "s": seconds, "peak_bytes": _peak(device), "fits": True})
        length *= 2
    return {"rows": rows, "longest_tokens": max(row["tokens"] for row in rows if row["fits"])}


def generation(small: bool, until: float) -> dict[str, Any]:
    """Measure generated tokens per second of a BST SH model of 12 layers, after two blocks of prompt, 1 and 16 rows."""
    sizes, device, rows = _sizes(small), on_device(), []
    model = LanguageModel(sizes.config(**BST)).to(device)
    count = 8 if small else 128
    for samples in (1, 16):
        prompt = list(range(1, 2 * sizes.block)) if small else [1] * (2 * sizes.block)
        prompt = [token % sizes.vocabulary for token in prompt]
        writing = Generation(model, {0: prompt}, [(0, number) for number in range(samples)], SamplingConfig())
        while not writing.step():  # the rest of the prompt
            pass
        begin, written = time.monotonic(), 0
        while written < count and time.monotonic() < until:
            writing.step()
            written += 1
        seconds = time.monotonic() - begin
        rows.append(
            {
                "rows": samples,
                "tokens_per_s": samples * written / seconds,
                "ms_a_step": 1e3 * seconds / written,
                "state_bytes": writing.state_bytes,
            }
        )
    return {"rows": rows}


def resume(small: bool, until: float) -> dict[str, Any]:
    """Train six deterministic steps twice, once stopped after three and resumed; compare losses and weights bitwise."""
    sizes = SMALL if small else Sizes(depth=4, length=2048, rows=2, vocabulary=64)
    model = {name: getattr(sizes, name) for name in ("width", "heads", "block", "depth")}
    recipe = {
        "name": "resume",
        "ranks": 1,
        "deterministic": True,
        "model": model | BST | {"ffn": 4 * sizes.width},
        "data": {"synthetic": {"task": "copy", "lag": 8}},
        "train": {"steps": 6, "sequence_length": sizes.length, "sequences": sizes.rows},
        "schedule": {"warmup_steps": 2},
        "evaluation": {"every": 0, "sequences": 1},
        "log": {"tensorboard": False},
        "deepspeed": "zero1",
    }
    with tempfile.TemporaryDirectory(prefix="bst-bench-gpu-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        for arguments in (["whole"], ["stopped", "--until", "3"], ["stopped", "--resume"]):
            _train(path, Path(folder), arguments, until)
        whole, stopped = (Path(folder) / name for name in ("whole", "stopped"))
        losses = [
            [line["loss_nats"] for line in read_lines(run / FILE) if line["kind"] == "train"]
            for run in (whole, stopped)
        ]
        weights = [load_weights(newest_valid(run)) for run in (whole, stopped)]
    equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return {"rows": [{"steps": len(losses[0]), "losses_equal": losses[0] == losses[1], "weights_equal": equal}]}


def _train(recipe: Path, folder: Path, arguments: list[str], until: float) -> None:
    run_dir, *more = arguments
    command = [sys.executable, "-m", "bst_dist", "train", str(recipe), "--run-dir", str(folder / run_dir)]
    left = max(1.0, until - time.monotonic())
    done = subprocess.run([*command, *more], check=False, capture_output=True, text=True, timeout=left)
    if done.returncode:
        raise RuntimeError(f"bst train ended with status {done.returncode}: {done.stderr[-2000:]}")


def _model_pass(model: LanguageModel, ids: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            losses = model(ids[:, :-1], ids[:, 1:])
        (losses.total / ids.numel()).backward()
        model.zero_grad(set_to_none=True)

    return call


def _tokens(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.randint(sizes.vocabulary, (sizes.rows, sizes.length + 1), device=device)


def _sizes(small: bool) -> Sizes:
    return SMALL if small else Sizes()


def _peak(device: torch.device) -> int:
    """Return the most bytes that torch has allocated on the device since the previous call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


PARTS: dict[str, Callable[[bool, float], dict[str, Any]]] = {
    "layers": layers,
    "kernels": kernels,
    "stack": stack,
    "longest": longest,
    "generation": generation,
    "resume": resume,
}
