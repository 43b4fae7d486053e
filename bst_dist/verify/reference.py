"""The reference: a step of the recipe in one process with plain torch, without DeepSpeed, in any precision."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bst_dist.config import Recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.sequence.past import Past
from bst_dist.train.step import on_device
from bst_dist.verify.batches import batches
from data_pipeline.serve.batch import Batch


@dataclass(frozen=True)
class Step:
    """The result of one step."""

    loss: float
    """Mean loss over the step's unmasked tokens, in nats."""
    norm: float
    """Global norm of the gradient."""
    gradients: dict[str, Tensor]
    """The full gradient of every parameter, in double precision."""


def seeded_model(recipe: Recipe) -> LanguageModel:
    """Return the model with the recipe's initial weights and its z-loss."""
    torch.manual_seed(recipe.seed)
    model = LanguageModel(recipe.model)
    model.z_loss = recipe.train.z_loss
    return model


def one_process(recipe: Recipe, precision: str, micro_rows: int) -> Step:
    """Compute the step in one process, `micro_rows` rows at a time; `precision`: fp64, fp32 or bf16 (autocast, as in
    training).

    If the recipe carries a past, compute the second of two steps with the same weights.
    """
    model = seeded_model(recipe)
    model = model.double() if precision == "fp64" else model
    before = batches(recipe, 0, Mesh(1, 0), micro_rows)
    steps = batches(recipe, 1, Mesh(1, 0), micro_rows) if recipe.train.carry else before
    total = torch.zeros((), dtype=torch.float64)
    nats, tokens = 0.0, 0
    for earlier, batch in zip(before, steps, strict=True):
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            losses = model(**on_device(batch, torch.device("cpu")), past=_past(model, recipe, earlier))
        total = total + losses.total.double()
        nats += float(losses.nats)
        tokens += int(batch.loss_mask.sum())
    (total / tokens).backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    gradients = {name: gradient.double() for name, gradient in found.items()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return Step(nats / tokens, float(norm), gradients)


def _past(model: LanguageModel, recipe: Recipe, earlier: Batch) -> Past | None:
    if not recipe.train.carry:
        return None
    left = model.carry()
    with torch.no_grad():
        model(**on_device(earlier, torch.device("cpu")), past=left)
    return model.carry(left.after, recipe.train.sequence_length)
