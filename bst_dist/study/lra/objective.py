"""The training objective of a Long Range Arena run: classification of examples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bst_dist.config import Recipe
from bst_dist.parallel.mesh import Mesh
from bst_dist.report.metrics import EvalReport
from bst_dist.study.lra.examples import Examples, open_split
from bst_dist.study.lra.loader import LabelledLoader
from bst_dist.study.lra.model import Classifier
from bst_dist.study.lra.tasks import TASKS
from bst_dist.train.evaluation import Evaluation, Evaluations
from bst_dist.train.objective import share_of
from data_pipeline.serve.loader import EVERY_SHARD

if TYPE_CHECKING:
    from bst_dist.train.context import Context


@dataclass(frozen=True)
class AccuracyReport(EvalReport):
    """An evaluation of a classifier. `tokens` is the number of examples. Bits per byte are NaN: there is no text."""

    accuracy: float

    def about(self) -> str:
        return f"{self.split} accuracy {self.accuracy:.4f}, {self.tokens:,} examples"


@dataclass(frozen=True)
class Classification:
    """The objective of a run that learns the class of each example."""

    labels: ClassVar[str] = "labels"
    predicts_tokens: ClassVar[bool] = False
    evaluates: ClassVar[bool] = True
    mixed: ClassVar[Sequence[str]] = ()

    recipe: Recipe
    training: Examples
    validation: Examples

    @classmethod
    def of(cls, recipe: Recipe, _checked: slice = EVERY_SHARD) -> Classification:
        """Open the examples; raises UserError if they cannot be read or are too long for the recipe."""
        task, directory = TASKS[recipe.data.task], Path(recipe.data.examples)
        found = cls(recipe, *(open_split(directory, split, task) for split in ("train", "validation")))
        for examples in (found.training, found.validation):
            found._loader(examples, Mesh(1, 0), recipe.train.sequences, 1, None)  # checks the lengths
        return found

    @property
    def tokens_per_label(self) -> int:
        return self.recipe.train.sequence_length * self.training.task.sequences

    def model(self) -> Classifier:
        return Classifier(self.recipe.model, self.recipe.data)

    def token_bytes(self) -> Tensor:
        return torch.zeros(self.training.task.classes, dtype=torch.int64)

    def tokenizer(self) -> None:
        return None

    def reading(self, mesh: Mesh, state: Mapping[str, Any], steps: int) -> str:
        return ""

    def about(self) -> dict[str, Any]:
        return {"examples_sha256": self.training.sha256}

    def digests(self) -> dict[str, Any]:
        return {"data.examples": [self.training.sha256, self.validation.sha256]}

    def loader(self, mesh: Mesh, start_step: int = 0) -> LabelledLoader:
        train = self.recipe.train
        return self._loader(self.training, mesh, train.sequences, train.micro_sequences, self.recipe.seed, start_step)

    def evaluations(self, context: Context) -> Evaluations:
        """Return the evaluation on the first examples of the validation split."""
        recipe, ranks = self.recipe, context.ranks
        asked = min(recipe.evaluation.sequences, len(self.validation))
        mesh, at_once = Mesh(ranks.world, ranks.rank), recipe.train.micro_sequences
        batches = self._loader(self.validation, mesh, asked, at_once, None).batches(0)
        return Evaluations(AccuracyEvaluation(context, batches))

    def _loader(
        self, examples: Examples, mesh: Mesh, rows: int, micro_rows: int, seed: int | None, start_step: int = 0
    ) -> LabelledLoader:
        share = share_of(self.recipe, mesh, rows, micro_rows)
        return LabelledLoader(examples, share, seed=seed, start_step=start_step)


class AccuracyEvaluation(Evaluation):
    """Measures loss and accuracy."""

    def evaluate(self, step: int) -> AccuracyReport | None:
        """Return the present loss and accuracy of the model, or None if the ranks agreed to stop."""
        start = time.perf_counter()
        sums, examples = torch.zeros(2, dtype=torch.float64, device=self.ranks.device), 0
        for batch, _, found in self.forward(step):
            sums += torch.stack((found.total.double(), found.correct.sum().double()))
            examples += int(batch.loss_mask.sum())
        if self.stop.stopping:
            return None
        nats, correct, examples = self.ranks.all_reduce_numbers([*sums.tolist(), examples])
        count = max(1.0, examples)
        return AccuracyReport(
            step,
            "validation",
            int(examples),
            nats / count,
            nan,
            [],
            time.perf_counter() - start,
            accuracy=correct / count,
        )
