"""Initial weights taken from another run: fine-tuning, on other text, under another schedule, with a new optimizer.

A branch continues with its trunk's steps and must be the same run so far; this one begins at step 0 and shares nothing
with the other but the model's shape and the tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bst_dist.checkpoint.directory import (
    WEIGHTS,
    CheckpointError,
    committed,
    damage,
    directory,
    load_weights,
    step_of,
)
from bst_dist.train.config import InitialWeightsConfig
from bst_dist.train.rundir import tokenizer_of


def load_initial(model: nn.Module, config: InitialWeightsConfig, tokenizer_sha256: str | None = None) -> None:
    """Put the other run's weights into the model.

    `tokenizer_sha256`: of the text that this run reads. Raises CheckpointError when there are no such weights, when
    they are of a model of another shape, and when their run is known to have had another tokenizer.
    """
    checkpoint = _checkpoint(config)
    if tokenizer_sha256 and tokenizer_of(config.run) not in (None, tokenizer_sha256):
        raise CheckpointError(
            f"initial_weights: {config.run} had another tokenizer than data.corpus: prepare the corpus with that one "
            "(tokenizer.reuse: its tokenizer.model, or the corpus that it was trained on)"
        )
    weights, own = load_weights(checkpoint), model.state_dict()
    for name in sorted(weights.keys() | own.keys()):
        there, here = (tuple(found[name].shape) if name in found else "missing" for found in (weights, own))
        if there != here:
            raise CheckpointError(f"initial_weights: {checkpoint} is of another model: {name} is {there}, here {here}")
    model.load_state_dict(weights)


def _checkpoint(config: InitialWeightsConfig) -> Path:
    path = directory(config.run, config.step)
    if path not in committed(config.run):
        there = ", ".join(str(step_of(found)) for found in committed(config.run)) or "none"
        raise CheckpointError(f"initial_weights: {config.run}: no checkpoint of step {config.step}; there are: {there}")
    if found := damage(path, kind=WEIGHTS):
        raise CheckpointError(f"initial_weights: {path}: {found[0]}")
    return path
