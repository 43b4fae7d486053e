"""Builds the parts of a run from its recipe: the engine, the trainer and the identity of its checkpoints."""

from __future__ import annotations

from functools import cache

import torch

from bst_base.settings import ConfigError
from bst_dist.activation import policy as activation
from bst_dist.checkpoint.agreement import each_or_raise
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.snapshot import Identity
from bst_dist.config import Recipe, digest, identity
from bst_dist.faults.signals import Stop
from bst_dist.model.attention.sliding import attention_path
from bst_dist.parallel.communication import RecordedGroup
from bst_dist.parallel.ranks import Ranks
from bst_dist.parallel.sequence.group import SequenceGroup
from bst_dist.plan.compilation import compile_refusal
from bst_dist.plan.flops import train_flops_per_token
from bst_dist.plan.hardware import peak_flops
from bst_dist.report.utilisation import Utilisation, edge_flops_per_token, recomputed_flops_per_token
from bst_dist.train.context import Context
from bst_dist.train.engine import Engine
from bst_dist.train.objective import Objective
from bst_dist.train.start.changes import fixed, may_change
from bst_dist.train.start.initial_weights import load_initial_weights
from bst_dist.train.start.request import Start
from bst_dist.train.step import Trainer


def recorded_group(start: Start, ranks: Ranks) -> SequenceGroup | None:
    """Return the ranks that share this rank's sequences; None when it holds whole sequences.

    Their exchanges are recorded in `ranks.phases`, so that the watchdog can name them.
    """
    group = start.mesh(ranks).sp_group(ranks.phases)
    return None if group is None else RecordedGroup(group.process_group, ranks.phases)


def build_engine(
    start: Start, ranks: Ranks, compiled: bool = False, fused_loss: bool = False, initial: bool = False
) -> Engine:
    """Build the model and wrap it with DeepSpeed, which gives all ranks the weights of rank 0.

    Args:
        ranks: all of them call it.
        compiled: compile its layers.
        fused_loss: compile its loss.
        initial: load the recipe's initial weights (`uses_initial_weights`, the same on all ranks).
    """
    torch.manual_seed(start.recipe.seed)
    model = start.objective.model()
    if initial:
        load_initial_weights(
            model, start.recipe.initial_weights, start.objective.about().get("tokenizer_sha256"), ranks
        )
    model.z_loss = start.recipe.train.z_loss
    model.checkpoint = activation.policy(start.recipe.activation_checkpointing, model.layers)
    for layer in model.layers:
        layer.compiled = compiled
    model.fused_loss = fused_loss
    return Engine(model, start.recipe.optimizer, start.completed)


def build_trainer(start: Start, engine: Engine, ranks: Ranks, sharing: SequenceGroup | None, stop: Stop) -> Trainer:
    """Build the trainer, and measure or look up the device's peak FLOPS for MFU and HFU."""
    recipe, tokens = start.recipe, start.objective.tokens_per_label
    token_bytes = each_or_raise(ranks, start.objective.token_bytes)
    context = Context(engine, ranks, token_bytes.to(ranks.device), stop, sharing)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    ranks.barrier()  # ranks that share a device must measure its peak at the same time
    (peak,) = ranks.all_reduce_numbers([peak_flops(ranks.device, dtype)])

    @cache
    def utilisation(length: int) -> Utilisation:
        train = recipe.of_one_length(length).train
        again = recomputed_flops_per_token(
            recipe.model,
            length,
            recipe.activation_checkpointing,
            attention_path(ranks.device),
            compiled=engine.module.layers[0].compiled,
        ) + edge_flops_per_token(recipe.model, length, train.slices, train.edges_every)
        return Utilisation(model_flops_per_label(start.objective, length), peak, tokens * again)

    for length in recipe.train.lengths.values:
        utilisation(length)  # computed and cached here, so that no step waits for it
    rate, corpora = recipe.optimizer.learning_rate, start.objective.mixed
    return Trainer(recipe.train, recipe.schedule, rate, context, utilisation, corpora)


def model_flops_per_label(objective: Objective, length: int) -> float:
    """Return the FLOPs of both passes over the tokens of one label, in sequences of that length.

    A classifier's own head is left out: it runs once per example.
    """
    per_token = train_flops_per_token(objective.recipe.model, length, head=objective.predicts_tokens)
    return objective.tokens_per_label * per_token


def identity_of(start: Start, engine: Engine, ranks: Ranks) -> Identity:
    """Return the settings that a checkpoint and the run that resumes from it must share, and the layout, which may
    differ."""
    recipe = start.recipe
    return Identity(
        recipe=digest(recipe),
        settings=fixed(identity(recipe, defaults=False)),
        may_change=may_change,
        groups=engine.groups.describe(),
        seed=recipe.seed,
        layout=Layout(ranks.world, recipe.parallel.sp, engine.stage),
        rows=Rows(recipe.train.sequences, recipe.train.micro_sequences, start.mesh(ranks)),
    )


def fuses_loss(recipe: Recipe, device: str) -> bool:
    """Return whether the loss is compiled on this type of device, also where layers cannot be."""
    return device == "cuda" and recipe.compile is not False


def compiles(recipe: Recipe, device: str, stage: int) -> tuple[bool, str]:
    """Return whether layers are compiled on this type of device under this ZeRO stage, and the reason if not.

    Raises ConfigError when the recipe requires compilation and it is not possible.
    """
    if recipe.compile is False:
        return False, "no, compile: false"
    reason = compile_refusal(recipe, stage, recipe.activation_checkpointing, recipe.parallel.sp, recipe.train.slices)
    if device != "cuda":
        reason = f"layers are compiled for CUDA, and this is {device}"
    if reason and recipe.compile:
        raise ConfigError(f"compile: true cannot be done here: {reason}. Leave compile out, or set it to false")
    return not reason, f"no: {reason}" if reason else ""
