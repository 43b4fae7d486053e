"""A run's model, restored from its run directory alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bst_base.errors import UserError
from bst_dist.checkpoint.directory import (
    AVERAGED,
    WEIGHTS,
    CheckpointError,
    committed,
    directory,
    load_weights,
    newest_valid,
    require_intact,
    require_step,
    step_of,
)
from bst_dist.config import Recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.study.lra.config import LongRangeConfig
from bst_dist.study.runs.results import read_result
from bst_dist.train import rundir
from bst_dist.train.rundir import read_recipe
from bst_dist.train.start.initial_weights import load_initial_weights
from data_pipeline.format.tokenizer import Tokenizer, read_tokenizer
from data_pipeline.serve.loader import open_corpora
from data_pipeline.serve.reader import Corpus
from data_pipeline.synthetic.config import SyntheticConfig


class OtherTokenizerError(UserError):
    """The corpus has another tokenizer than the run."""


@dataclass(frozen=True)
class Trained:
    """A model with its weights after some step of its run."""

    run_dir: Path
    recipe: Recipe
    step: int
    model: LanguageModel

    def begin(self, corpus: Corpus) -> int | None:
        """Return the token before a document's first token, the end of another one; None for documents not joined."""
        return None if self.recipe.data.documents != "joined" else corpus.manifest.tokenizer.eos_id


def open_run(run_dir: Path, step: int | None = None, precision: str | None = None, averaged: bool = False) -> Trained:
    """Load the model of a run after `step`, or from its newest valid checkpoint, onto the accelerator if there is one.

    `precision`: fp32 or bf16, in place of the precision of training; `averaged`: load the averaged weights. Step 0 has
    no checkpoint, so it is made again from the recipe's seed or initial weights. Raises UserError if the directory
    holds no run of a language model, or if the checkpoint is missing or damaged.
    """
    recipe = read_recipe(run_dir)
    recipe = recipe.of_one_length(recipe.train.lengths.last)  # the last length, as in the run's own evaluations
    if precision is not None:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})
    require_language_model(run_dir, recipe)
    torch.manual_seed(recipe.seed)
    model = LanguageModel(recipe.model)
    if step == 0 and recipe.initial_weights:
        load_initial_weights(model, recipe.initial_weights)
    return Trained(run_dir, recipe, restore(model, run_dir, step, AVERAGED if averaged else WEIGHTS), model)


def restore(model: nn.Module, run_dir: Path, step: int | None = None, kind: str = WEIGHTS) -> int:
    """Load a run's weights (`kind`) into its model, ready for evaluation on the accelerator, and return the step.

    `step` None: from the newest valid checkpoint; 0: the model keeps its present weights. Raises CheckpointError if the
    checkpoint is missing or damaged.
    """
    if step == 0:
        checkpoint = directory(run_dir, 0)
    else:
        if step is None and not committed(run_dir):
            raise CheckpointError(
                f"{run_dir}: no valid checkpoint: the run has not reached its first one; --checkpoint 0 takes the "
                "initial weights"
            )
        checkpoint = newest_valid(run_dir, kind) if step is None else _checkpoint(run_dir, step, kind)
        model.load_state_dict(load_weights(checkpoint, kind))
    model.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).eval()
    return step_of(checkpoint)


def open_validation(trained: Trained) -> list[Corpus]:
    """Open the validation text of a run's corpora; raises UserError if they have changed since the run was trained."""
    found = open_corpora(trained.recipe.data, "validation")
    known = read_result(trained.run_dir).corpora
    if known and known != " ".join(corpus.sha256 for corpus in found):
        raise UserError(
            f"{trained.run_dir}: its corpus has changed since it was trained: prepare that corpus again, or remove "
            "this run and train it again"
        )
    return found


def require_language_model(run_dir: Path, recipe: Recipe) -> None:
    """Raise UserError if the run is a classifier (Long Range Arena) instead of a language model."""
    if isinstance(recipe.data, LongRangeConfig):
        raise UserError(
            f"{run_dir}: not a language model but a classifier for the task {recipe.data.task}: use bst lra eval"
        )


def require_text(run_dir: Path, recipe: Recipe) -> None:
    """Raise UserError if the run's tokens are not text but a synthetic task."""
    if isinstance(recipe.data, SyntheticConfig):
        raise UserError(
            f"{run_dir}: it learns the synthetic task {recipe.data.synthetic.task}, so it has no text and no corpus; "
            "evaluate it with `bst eval` without further options"
        )


def tokenizer_of(run_dir: Path, recipe: Recipe) -> Tokenizer:
    """Return the run's tokenizer: its own copy, or else that of its corpus.

    Raises UserError if there is neither, and OtherTokenizerError if the corpus now has another tokenizer.
    """
    require_text(run_dir, recipe)
    own, data = rundir.own_tokenizer(run_dir), recipe.data
    if own is not None:
        return read_tokenizer(own)
    corpus = Corpus.open(data.urls()[0], storage=data.storage)
    require_tokenizer(run_dir, corpus, rundir.tokenizer_of(run_dir))
    return corpus.tokenizer()


def require_tokenizer(run_dir: Path, corpus: Corpus, sha256: str | None) -> None:
    """Raise OtherTokenizerError unless the corpus has the run's tokenizer, given by `sha256` (None: not known)."""
    found = corpus.manifest.tokenizer.sha256
    if sha256 not in (None, found):
        raise OtherTokenizerError(
            f"{corpus.where}: its tokenizer ({found[:12]}...) is not the one that {run_dir} was trained with "
            f"({sha256[:12]}...), so its ids mean something else to this model: prepare the text with the run's "
            "tokenizer (tokenizer.reuse)"
        )


def _checkpoint(run_dir: Path, step: int, kind: str) -> Path:
    path = require_step(run_dir, step)
    require_intact(path, kind)
    return path
