"""A step of the trainer on all ranks, with its gradients before the update."""

from __future__ import annotations

import time
from typing import Any

import torch

from bst_dist.activation import policy as activation
from bst_dist.config import Recipe, deepspeed_file
from bst_dist.faults.signals import Stop
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.ranks import Ranks
from bst_dist.parallel.sequence.group import SequenceGroup
from bst_dist.report.utilisation import Utilisation
from bst_dist.train import deepspeed_json
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.context import Context
from bst_dist.train.engine import Engine
from bst_dist.train.step import Trainer
from bst_dist.verify.batches import batches
from bst_dist.verify.reference import Step, seeded_model
from bst_dist.verify.shrink import small_buckets

FROZEN_OPTIMIZER = OptimizerConfig(learning_rate=1e-30, ssm_learning_rate=1e-30, weight_decay=0)
"""Learning rates too small to change a weight. So with a carried past, the second step starts from the same weights."""


class Recorded(Engine):
    """The training engine, which also keeps the full gradients of its last step."""

    gradients: dict[str, torch.Tensor]

    def update(self) -> float:
        from deepspeed.utils import safe_get_full_grad

        self.gradients = {}
        for name, parameter in self.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            self.gradients[name] = (torch.zeros(shape) if gradient is None else gradient).detach().cpu().double()
        return super().update()


def distributed_step(recipe: Recipe, ranks: Ranks, group: SequenceGroup | None) -> Step:
    """Compute the recipe's step on these ranks, with the trainer and the engine of `bst train`.

    `group`: the ranks that share this rank's sequence; None if sp is 1.
    """
    mesh = Mesh(ranks.world, ranks.rank, recipe.parallel.sp)
    engine = _engine(recipe, mesh)
    token_bytes = torch.ones(recipe.model.vocab_size, dtype=torch.long, device=ranks.device)
    trainer = Trainer(
        recipe.train,
        recipe.schedule,
        recipe.optimizer.learning_rate,
        Context(engine, ranks, token_bytes, Stop(ranks), group),
        lambda _: Utilisation(1.0, 1.0),
    )
    for step in range(2 if recipe.train.carry else 1):
        own = batches(recipe, step, mesh, recipe.train.micro_sequences)
        report = trainer.step(step, own, time.perf_counter())
    engine.deepspeed.destroy()
    return Step(report.loss_nats, report.gradient_norm, engine.gradients)


def _engine(recipe: Recipe, mesh: Mesh) -> Recorded:
    path = deepspeed_file(recipe)
    train = recipe.train
    accumulation = train.sequences // (mesh.dp * train.micro_sequences) * train.slices
    intent = deepspeed_json.Intent(
        mesh.world, train.micro_sequences, accumulation, train.gradient_clipping, train.precision
    )
    strategy: dict[str, Any] = small_buckets(deepspeed_json.read(path))
    model = seeded_model(recipe)
    model.checkpoint = activation.policy(recipe.activation_checkpointing, model.layers)
    return Recorded(model, FROZEN_OPTIMIZER, deepspeed_json.complete(strategy, intent, str(path)))
