"""The training speed of each shape: measured in a few steps of every distinct model, or predicted as by `bst plan`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from bst_base.errors import UserError
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.accelerators import Accelerator
from bst_dist.plan.search import Planner
from bst_dist.plan.speed import Cluster
from bst_dist.study.sweep.design import Run
from bst_dist.study.sweep.price import shape_key


def measure(runs: Sequence[Run], for_s: float, say: Callable[[str, float], None]) -> dict[str, float]:
    """Measure the training FLOP/s of every shape among `runs`, as the median of the steps in `for_s` seconds.

    A step is the forward and backward pass of one micro-batch, without the optimizer. It uses the threads of this
    process. Returns shape key -> FLOP/s.
    """
    rates: dict[str, float] = {}
    for run in runs:
        key = shape_key(run.cell)
        if key not in rates:
            rates[key] = _rate(run, for_s)
            say(key, rates[key])
    return rates


def planned(
    runs: Sequence[Run], device: Accelerator, per_node: int, say: Callable[[str, float], None]
) -> dict[str, float]:
    """Predict the training FLOP/s of a device for every shape among `runs`, as `bst plan` does.

    The ranks, the micro-batch and the ZeRO stage are those of the run's recipe. Returns shape key -> FLOP/s. Raises
    UserError for a run that does not fit.
    """
    rates: dict[str, float] = {}
    for run in runs:
        key, recipe = shape_key(run.cell), run.recipe
        if key not in rates:
            ranks = recipe.ranks or 1
            nodes = -(-ranks // per_node)
            if ranks % nodes:
                raise UserError(f"{run.name}: {ranks} ranks cannot be divided over {nodes} nodes of {per_node}")
            way = Planner(recipe, Cluster(nodes, ranks // nodes, device)).as_written()
            if not way.fits:
                raise UserError(
                    f"{run.name} does not fit: it needs {way.excess / 1e9:.1f} GB more than {device.title} has, with "
                    f"micro-batches of {way.work.slice.rows} sequences (train.micro_sequences)"
                )
            tokens = recipe.train.sequences * recipe.train.sequence_length
            rates[key] = 6 * run.counts.parameters * tokens / way.speed.total / ranks
            say(key, rates[key])
    return rates


def _rate(run: Run, for_s: float) -> float:
    recipe = run.recipe
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = LanguageModel(recipe.model).to(device)
    rows, length = recipe.train.micro_sequences, recipe.train.sequence_length
    ids = torch.randint(recipe.model.vocab_size, (rows, length), device=device)
    bf16 = recipe.train.precision == "bf16"
    times: list[float] = []
    end = time.perf_counter() + for_s
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            losses = model(ids, ids)
        losses.total.backward()
        losses.total.item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 6 * run.counts.parameters * rows * length / median(times[1:])
