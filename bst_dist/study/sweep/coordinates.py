"""The coordinate check: whether activations change equally much in wide or deep models as in small ones.

A learning rate transfers across width and depth only if the change of each coordinate in a few steps does not depend on
width and depth (Yang et al., arXiv 2203.03466, appendix D.1; in depth: Dey et al., CompleteP, arXiv 2505.01618). The
check works on any LanguageModel: it finds the activations by their names in the module tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from bst_base.files import write_json
from bst_dist.model.lm import LanguageModel
from bst_dist.model.ssm.kernels import KERNELS
from bst_dist.study.report.formatting import plain
from bst_dist.study.statistics import Equality, Estimate, equality, mean
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.optimizer import build_for

FILE = "coordinates.json"
SLOPE = 0.2
"""The slope of ln(change) over ln(width or depth) below which there is no dependence: 2^0.2 is 15 % per doubling."""


@dataclass(frozen=True)
class Coordinate:
    """How the change of one kind of activation, or of the SSM dynamics, depends on the width or the depth."""

    watched: str
    along: str
    """"width" or "depth"."""
    changes: dict[int, float]
    """Width or depth -> root mean square of the change after the steps, geometric mean over seeds."""
    slope: Estimate
    """Slope of ln(change) over ln(width or depth), mean over seeds."""

    @property
    def answer(self) -> Equality:
        """ "equal" if an equivalence test shows that the slope is within ±SLOPE. A slope not seen is not enough."""
        return equality(self.slope, SLOPE)


@dataclass(frozen=True)
class Check:
    """The result of the coordinate check of a sweep's architectures, as stored in the sweep's directory."""

    parametrisation: str
    widths: list[int]
    depths: list[int]
    steps: int
    rate: float
    """Learning rate as a share of the peak rate."""
    architectures: dict[str, list[Coordinate]]

    @property
    def answer(self) -> str:
        """ "passed": no change depends on width or depth; "failed": at least one does; "undecided": use more seeds."""
        answers = {one.answer for found in self.architectures.values() for one in found}
        return "failed" if "different" in answers else "undecided" if "undecided" in answers else "passed"

    def report(self) -> dict[str, Any]:
        """Return the check for a machine-readable report, with the answers."""
        found = plain(self)
        for name, every in self.architectures.items():
            for one, entry in zip(every, found["architectures"][name], strict=True):
                entry["answer"] = one.answer
        return {"passed": self.answer == "passed", "answer": self.answer, **found}

    def write(self, root: Path) -> None:
        """Write the check into the sweep's directory."""
        write_json(root / FILE, self.report())


def read_check(root: Path) -> Check | None:
    """Read the check from the sweep's directory; None if none was made."""
    path = root / FILE
    return TypeAdapter(Check).validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def coordinates(
    make: Callable[[int, int], LanguageModel],
    widths: Sequence[int],
    depths: Sequence[int],
    optimizer: OptimizerConfig,
    ids: Tensor,
    steps: int = 4,
    seeds: Sequence[int] = range(6),
) -> list[Coordinate]:
    """Train models of all `widths` at the first depth, and of all `depths` at the first width, for a few steps.

    Args:
        make: builds the model from a width and a depth.
        widths: the first width and multiples of it.
        ids: (B, l + 1) int64 tokens. Every step trains on them, and the changes are measured on them.
        seeds: seeds of the initial weights. Each seed has its own slope, over models with the same kernels, and the
            slopes are averaged. Seeds are not pooled, because a few channels of high gain make the change of one seed
            many times that of another.
    """
    found = []
    for along, values in (("width", widths), ("depth", depths)):
        shapes = [(value, depths[0]) if along == "width" else (widths[0], value) for value in values]
        changes = [_changes(make, shape, widths[0], optimizer, ids, steps, seeds) for shape in shapes]
        for watched in changes[0]:
            logs = np.log([change[watched] for change in changes])  # (values, seeds)
            slopes = np.polyfit(np.log(list(values)), logs, 1)[0]
            by_value = dict(zip(values, np.exp(logs.mean(1)).tolist(), strict=True))
            found.append(Coordinate(watched, along, by_value, mean(slopes, "seeds")))
    return found


def _changes(
    make: Callable[[int, int], LanguageModel],
    shape: tuple[int, int],
    narrow: int,
    optimizer: OptimizerConfig,
    ids: Tensor,
    steps: int,
    seeds: Sequence[int],
) -> dict[str, list[float]]:
    """Return, for one shape, the root mean square of the change of each watched quantity, one value per seed."""
    every = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = make(*shape)
        if shape[0] != narrow:
            torch.manual_seed(seed)
            repeat_kernels(model, make(narrow, shape[1]))
        every.append(changes_of(model, optimizer, ids, steps))
    return {watched: [change[watched] for change in every] for watched in every[0]}


def repeat_kernels(wide: LanguageModel, narrow: LanguageModel) -> None:
    """Fill the kernels of the wide model with repetitions of the narrow model's kernels, channel by channel.

    The gains of channels vary widely. With independent draws, the root mean square over 8 channels of one model and
    over 64 of another would differ by more than the effect that the check looks for.
    """
    kernels = ([module for module in model.modules() if _is_kernel(module)] for model in (wide, narrow))
    with torch.no_grad():
        for many, few in zip(*kernels, strict=True):
            for p, q in zip(many.parameters(), few.parameters(), strict=True):
                p.copy_(q.repeat(*(a // b for a, b in zip(p.shape, q.shape, strict=True))))


def _is_kernel(module: nn.Module) -> bool:
    return isinstance(module, tuple(KERNELS.values()))


def changes_of(model: LanguageModel, optimizer: OptimizerConfig, ids: Tensor, steps: int) -> dict[str, float]:
    """Return the root mean square of the change of each watched quantity after `steps` steps on the same tokens."""
    inputs, labels = ids[:, :-1], ids[:, 1:]
    dynamics = model.parameter_groups()["ssm"]
    before, parameters = _activations(model, inputs, labels), [p.detach().clone() for p in dynamics]
    adam = build_for(model, optimizer)
    for _ in range(steps):
        adam.zero_grad()
        (model(inputs, labels).total / labels.numel()).backward()
        adam.step()
    after = _activations(model, inputs, labels)
    found = {watched: _rms([a - b for a, b in zip(after[watched], before[watched], strict=True)]) for watched in before}
    if dynamics:
        found["ssm dynamics"] = _rms([p.detach() - q for p, q in zip(dynamics, parameters, strict=True)])
    return found


def _activations(model: LanguageModel, inputs: Tensor, labels: Tensor) -> dict[str, list[Tensor]]:
    """Return outputs by kind: mixers, FFNs, SSMs, the residual stream after the last layer, the labels' mean logit.

    The mean over the labels' logits is taken because the gradient moves all of them in the same direction. Single
    logits also have a random part, at first and in their change, which depends on the width. The mean removes it.
    """
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad(), _watched(model, seen):
        model(inputs, labels)
        scale = model.config.parametrisation.logit_scale(model.config.width)
        last = model.norm(seen["stream"][0])
        seen["logits"] = [scale * (last * F.embedding(labels, model.head_matrix)).sum(-1).mean()]
    return seen


@contextmanager
def _watched(model: LanguageModel, seen: dict[str, list[Tensor]]) -> Iterator[None]:
    handles = []
    last = str(len(model.layers) - 1)
    for name, module in model.named_modules():
        kind = _kind(name, module, last)
        if kind is not None:
            handles.append(module.register_forward_hook(lambda _, __, out, kind=kind: _keep(seen, kind, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kind(name: str, module: nn.Module, last: str) -> str | None:
    match name.split("."):
        case ["layers", place]:
            return "stream" if place == last else None
        case ["layers", _, ("mixer" | "ffn") as part]:
            return part
    return "ssm" if _is_kernel(module) else None


def _keep(seen: dict[str, list[Tensor]], kind: str, out: object) -> None:
    if isinstance(out, Tensor):
        seen.setdefault(kind, []).append(out.detach().clone())


def _rms(tensors: list[Tensor]) -> float:
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors)
    return (squares / sum(tensor.numel() for tensor in tensors)) ** 0.5
