"""Initial weights from another run: fine-tuning on other text, under another schedule, with a new optimizer state.

Unlike a branch, which continues its trunk's steps, such a run begins at step 0. Only the model's shape and the
tokenizer must be those of the other run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from bst_dist.checkpoint.agreement import confirmed_damage, each_or_raise, read_together
from bst_dist.checkpoint.directory import WEIGHTS, CheckpointError, open_shards, require_intact, require_step
from bst_dist.checkpoint.retention import has_full
from bst_dist.train.config import InitialWeightsConfig
from bst_dist.train.rundir import tokenizer_of
from bst_dist.train.start.request import Start

if TYPE_CHECKING:
    from bst_dist.parallel.ranks import Ranks


def uses_initial_weights(start: Start, from_zero: bool) -> bool:
    """Whether the model is built with the recipe's initial weights: not if the run can resume from a full checkpoint.

    `from_zero`: as in the request; then it always is, because all full checkpoints may be damaged.
    """
    return start.recipe.initial_weights is not None and (from_zero or not has_full(start.run_dir))


def load_initial_weights(
    model: nn.Module, config: InitialWeightsConfig, tokenizer_sha256: str | None = None, ranks: Ranks | None = None
) -> None:
    """Load the other run's weights into the model.

    `tokenizer_sha256`: of the tokenizer of this run's corpus. `ranks`: all of them call this, and share the check of
    the files; only rank 0 loads the weights, because DeepSpeed then copies its parameters to the others. Raises
    CheckpointError when the weights are missing or damaged, when they belong to a model of another shape, and when
    their run is known to have another tokenizer.
    """

    def fitting() -> Path:
        return _fitting(config, tokenizer_sha256)

    checkpoint = each_or_raise(ranks, fitting) if ranks else fitting()
    require_intact(checkpoint, WEIGHTS, confirmed_damage(ranks, checkpoint, WEIGHTS) if ranks else None)
    if ranks:
        read_together(ranks, lambda arrived: _fill(model, checkpoint, arrived) if ranks.first else None)
    else:
        _fill(model, checkpoint)


def _fill(model: nn.Module, checkpoint: Path, arrived: Callable[[], None] = lambda: None) -> None:
    """Read the weights into the model's own memory, so that they are held once.

    `arrived`: called after each part that is read.
    """
    shards = open_shards(checkpoint, WEIGHTS)
    weights = model.state_dict()
    for name in sorted(shards.shapes.keys() | weights.keys()):
        stored = shards.shapes.get(name, "missing")
        wanted = tuple(weights[name].shape) if name in weights else "missing"
        if stored != wanted:
            raise CheckpointError(
                f"initial_weights: {checkpoint} is of another model: {name} is {stored}, here {wanted}"
            )
    shards.fill([(name, 0, tensor.view(-1)) for name, tensor in weights.items()], arrived)
    shards.close()


def _fitting(config: InitialWeightsConfig, tokenizer_sha256: str | None) -> Path:
    """Return the checkpoint with the initial weights; raises CheckpointError if its tokenizer is another one."""
    checkpoint = require_step(config.run, config.step)
    if tokenizer_sha256 and tokenizer_of(config.run) not in (None, tokenizer_sha256):
        raise CheckpointError(
            f"initial_weights.run {config.run} was trained with another tokenizer than that of data.corpus: prepare "
            f"data.corpus again with tokenizer.reuse set to the tokenizer file in {config.run}, or to the corpus of "
            "that run"
        )
    return checkpoint
