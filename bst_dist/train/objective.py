"""The training objective of a run: its model, its batches and its evaluation.

The program, the trainer and the checkpoints are the same for every objective: an optimizer step on the mean negative
log-likelihood over the labels of a batch. The type of the recipe's data section selects the objective
(`config.OBJECTIVES`): language modelling, in this file, or one of the study's tasks.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from bst_base.errors import UserError
from bst_dist.config import OBJECTIVES, Recipe, with_vocabulary
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from bst_dist.train.evaluation import Evaluation, Evaluations
from bst_dist.train.validation_sets import CorpusEvaluation, open_sets, with_corpus
from data_pipeline.format.tokenizer import Tokenizer
from data_pipeline.serve.batch import Batch
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import EVERY_SHARD, Loader, open_corpora
from data_pipeline.serve.passes import passes_message
from data_pipeline.serve.reader import Corpus, NoCorpusError
from data_pipeline.serve.share import Share
from data_pipeline.serve.slices import changed

if TYPE_CHECKING:
    from bst_dist.parallel.ranks import Ranks
    from bst_dist.train.context import Context
    from data_pipeline.serve.slices import MicroBatch


class Batches(Protocol):
    """The training batches of one rank, a pure function of the step."""

    def __iter__(self) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield (step, this rank's micro-batches in order) without end."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the loader's state for a checkpoint, after `step` steps of training."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the order that the run began with, from what `state_dict` returned. The first step that is read
        does not change. Raises UserError when the data order of `state` is not this loader's."""

    def close(self) -> None:
        """Stop loading and free the resources."""


class Objective(Protocol):
    """The interface between the training program and the objective of a run."""

    recipe: Recipe
    """The recipe, with the values filled in that follow from the data (the vocabulary size)."""
    labels: str
    """The name of the labels in printed output; `tokens` in the metrics counts them."""
    tokens_per_label: int
    """Number of tokens that the model processes per label."""
    predicts_tokens: bool
    """Whether the model computes logits over the vocabulary for every token."""
    evaluates: bool
    """Whether there is any data to evaluate on."""
    mixed: Sequence[str]
    """Names of the corpora of a mixture; empty with one corpus or none."""

    def model(self) -> LanguageModel:
        """Return the model with random weights."""

    def token_bytes(self) -> Tensor:
        """Return (V,) bytes of text that each label stands for; zeros where labels are not text."""

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer; None where tokens are not text."""

    def loader(self, mesh: Mesh, start_step: int = 0) -> Batches:
        """Return the training batches of the rank at `mesh`, from `start_step` on."""

    def evaluations(self, context: Context) -> Evaluations:
        """Return the evaluations of the model of `context` on a fixed part of the validation data."""

    def reading(self, mesh: Mesh, state: Mapping[str, Any], steps: int) -> str:
        """Return as text how much of its data the run will have read after `steps` steps.

        `state`: the loader's state in a checkpoint, or empty. Raises UserError where that is more than the recipe
        allows.
        """

    def about(self) -> dict[str, Any]:
        """Return what environment.json records about the data at each start of the run."""

    def digests(self) -> dict[str, Any]:
        """Return the digests of all data that the run reads, by the setting that says where it is.

        They are equal where the data is, wherever a host keeps it.
        """


def open_objective(recipe: Recipe, checked: slice = EVERY_SHARD) -> Objective:
    """Open the data of the recipe and return its objective; raises UserError when the data cannot be used.

    `checked`: the shards of each corpus whose sizes are checked (`open_corpora`).
    """
    return pkgutil.resolve_name(OBJECTIVES[type(recipe.data)]).of(recipe, checked)


@dataclass(frozen=True)
class LanguageModelling:
    """The objective of predicting each token of a corpus from the tokens before it."""

    labels: ClassVar[str] = "tokens"
    tokens_per_label: ClassVar[int] = 1
    predicts_tokens: ClassVar[bool] = True

    recipe: Recipe
    corpora: Sequence[Corpus]
    """The training splits."""
    validation: Sequence[Corpus]
    """The validation splits of those corpora that have one."""
    further: Mapping[str, Sequence[Corpus]]
    """The validation splits of the additional corpora, by name (evaluation.corpora)."""

    @classmethod
    def of(cls, recipe: Recipe, checked: slice = EVERY_SHARD) -> LanguageModelling:
        """Open the corpora; raises UserError when they cannot be used."""
        try:
            corpora = open_corpora(recipe.data, checked=checked)
        except NoCorpusError as error:
            raise UserError(f"{error}; if it has moved, set data.corpus to where it is now") from None
        kept = _with_validation(corpora)
        validation = open_corpora(recipe.data.only(kept), "validation", checked) if any(kept) else []
        return cls(with_vocabulary(recipe, corpora), corpora, validation, open_sets(recipe, corpora, checked))

    @property
    def evaluates(self) -> bool:
        return bool(self.validation or self.further)

    def model(self) -> LanguageModel:
        return LanguageModel(self.recipe.model)

    def token_bytes(self) -> Tensor:
        return torch.from_numpy(self.corpora[0].token_bytes())

    def tokenizer(self) -> Tokenizer:
        return self.corpora[0].tokenizer()

    @property
    def mixed(self) -> Sequence[str]:
        urls = [url.partition("?")[0].rstrip("/") for url in self.recipe.data.urls()]
        if len(urls) == 1:
            return ()
        names = [url.rpartition("/")[2] for url in urls]
        return names if len(set(names)) == len(names) else urls

    def reading(self, mesh: Mesh, state: Mapping[str, Any], steps: int) -> str:
        loader = self.loader(mesh)
        if state:
            loader.load_state_dict(dict(state))
        return passes_message(loader, steps)

    def about(self) -> dict[str, Any]:
        corpora = [
            {"path": url if "://" in url else str(Path(url).resolve()), "sha256": corpus.sha256}
            for url, corpus in zip(self.recipe.data.urls(), self.corpora, strict=True)
        ]
        return {"tokenizer_sha256": self.corpora[0].manifest.tokenizer.sha256, "corpora": corpora}

    def digests(self) -> dict[str, Any]:
        further = {f"evaluation.corpora.{name}": corpora[0].sha256 for name, corpora in self.further.items()}
        return {"data.corpus": [corpus.sha256 for corpus in self.corpora], **further}

    def loader(self, mesh: Mesh, start_step: int = 0) -> Loader:
        recipe, train = self.recipe, self.recipe.train
        return Loader(
            recipe.data,
            self.corpora,
            share_of(recipe, mesh, train.sequences, train.micro_sequences),
            block=recipe.model.block,
            seed=recipe.seed,
            start_step=start_step,
            changes=train.batches.changes[1:],
            lengths=train.lengths.changes[1:],
        )

    def evaluations(self, context: Context) -> Evaluations:
        """Evaluate on the first sequences of the validation split, each once (step 0 of its loader), and on those of
        each additional corpus."""
        data = self.recipe.data.model_copy(update={"mode": "shuffled"})
        ranks = context.ranks
        own = data.only(_with_validation(self.corpora))
        batches = self._validation_batches(own, self.validation, ranks) if self.validation else []
        further = []
        for name, url in self.recipe.evaluation.corpora.items():
            served = self._validation_batches(with_corpus(data, url), self.further[name], ranks, name)
            further.append(CorpusEvaluation(context, served, name))
        return Evaluations(Evaluation(context, batches) if batches else None, further)

    def _validation_batches(
        self, data: DataConfig, corpora: Sequence[Corpus], ranks: Ranks, name: str = ""
    ) -> list[MicroBatch]:
        """Return this rank's share of the first sequences of the validation splits `corpora`.

        `name`: of an additional corpus, for the message that is printed when there are fewer sequences than asked for.
        """
        recipe, asked = self.recipe, self.recipe.evaluation.sequences
        available = sum(self._validation_loader(data, corpora, Mesh(1, 0), 1, 1).sequences)
        if available < asked and ranks.first:
            whose = f" of {name}" if name else ""
            print(
                f"evaluation: the validation split{whose} holds {available:,} sequences; evaluation.sequences asks for "
                f"{asked:,}"
            )
        mesh = Mesh(ranks.world, ranks.rank, recipe.parallel.sp)
        loader = self._validation_loader(data, corpora, mesh, min(asked, available), recipe.train.micro_sequences)
        return [changed(batch, _counted_once) for batch in loader.batches(0)]

    def _validation_loader(
        self, data: DataConfig, corpora: Sequence[Corpus], mesh: Mesh, rows: int, micro_rows: int
    ) -> Loader:
        """Return a loader of rows of the run's last sequence length; their order is the same for every run seed."""
        recipe = self.recipe.of_one_length(self.recipe.train.lengths.last)
        share = share_of(recipe, mesh, rows, micro_rows)
        return Loader(data, corpora, share, block=recipe.model.block, seed=0)


def _with_validation(corpora: Sequence[Corpus]) -> list[bool]:
    """Return for each corpus whether it has a validation split."""
    return [bool(corpus.manifest.splits.get("validation")) for corpus in corpora]


def share_of(recipe: Recipe, mesh: Mesh, rows: int, micro_rows: int) -> Share:
    """Return the share of this rank in steps of `rows` sequences."""
    train = recipe.train
    return Share(
        length=train.sequence_length,
        rows=rows,
        micro_rows=micro_rows,
        dp_rank=mesh.dp_rank,
        dp=mesh.dp,
        sp_rank=mesh.sp_rank,
        sp=mesh.sp,
        slice_tokens=train.slice_tokens,
    )


def _counted_once(batch: Batch) -> Batch:
    """Return the batch with all labels masked in rows that would read a part of the split a second time."""
    return replace(batch, loss_mask=batch.loss_mask & (batch.epochs == 0)[:, None])
