"""The parts of `bst bench gpu` that measure whole models: speed, the longest sequence, and generation."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.activation.policy import policy
from bst_dist.generation.decoding import Generation
from bst_dist.generation.sampling import SamplingConfig
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.accelerators import Accelerator, accelerator, of_device
from bst_dist.plan.flops import forward_flops, train_flops_per_token
from bst_dist.plan.hardware import peak_flops
from bst_dist.plan.kernel_launches import host_seconds
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.memory.parts import Slice
from bst_dist.plan.memory.peak import Work
from bst_dist.plan.memory.zero import Strategy
from bst_dist.plan.speed import Cluster, Moved
from bst_dist.plan.speed import speed as step_speed
from bst_dist.tools.bench.gpu_sizes import BST, LAYERS, QUEUED, SMALL, Sizes, sizes_of, stack_sizes
from bst_dist.tools.bench.timing import device as on_device
from bst_dist.tools.bench.timing import seconds_of

WIDTHS = (1024, 2048)


def stack(small: bool, until: float) -> dict[str, Any]:
    """Measure tokens per second and MFU of whole models: forward, loss and backward, layers compiled on a GPU."""
    device = on_device()
    rows = []
    for width in WIDTHS:
        sizes = SMALL if small else stack_sizes(width)
        for name in ("sliding", "BST SH"):
            places = {"placement": [1, 7, 9]} if name == "BST SH" and not small else {}
            model = LanguageModel(sizes.config(**LAYERS[name], **places)).to(device)
            for layer in model.layers:
                layer.compiled = device.type == "cuda"
            model.fused_loss = device.type == "cuda"
            step = _model_pass(model, sizes.tokens(device))
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
    part = Slice(sizes.rows, sizes.length)
    activations = Activations(config, bf16=True)
    work = Work(Strategy("zero0", 0), 1, part, 1, ActivationCheckpointingConfig(), config.depth, compiled=True)
    host_s = host_seconds(activations, config.mixers(), work)
    moved = Moved(
        activations.whole(part, compiled=True), activations.head(part).moved, host=0, updated=0, host_s=host_s
    )
    flops = forward_flops(config, sizes.length)
    cluster = Cluster(1, 1, card)
    found = step_speed(flops, work, moved, {}, {}, cluster, bf16=True)
    return Planned(found.total, found.flops / found.total / (1e12 * card.bf16_tflops))


def longest(small: bool, until: float) -> dict[str, Any]:
    """Find the longest sequence, doubling each time, for which a BST SH model of 12 layers can compute gradients.

    Every layer is checkpointed (policy every-layer).
    """
    sizes = sizes_of(small)
    device = on_device()
    rows = []
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
    sizes = sizes_of(small)
    device = on_device()
    rows = []
    model = LanguageModel(sizes.config(**BST)).to(device)
    count = 8 if small else 128
    for samples in (1, 16):
        prompt = list(range(1, 2 * sizes.block)) if small else [1] * (2 * sizes.block)
        prompt = [token % sizes.vocabulary for token in prompt]
        writing = Generation(model, {0: prompt}, [(0, number) for number in range(samples)], SamplingConfig())
        while not writing.step():  # the rest of the prompt
            pass
        begin = time.monotonic()
        written = 0
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


def _model_pass(model: LanguageModel, ids: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            losses = model(ids[:, :-1], ids[:, 1:])
        (losses.total / ids.numel()).backward()
        model.zero_grad(set_to_none=True)

    return call


def _peak(device: torch.device) -> int:
    """Return the most bytes that torch has allocated on the device since the previous call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
