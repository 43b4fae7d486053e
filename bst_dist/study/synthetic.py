"""The training objective of synthetic tasks: next tokens, where only the predictable labels count."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bst_dist.config import Recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from bst_dist.report.metrics import EvalReport
from bst_dist.train.evaluation import Evaluation, Evaluations
from bst_dist.train.objective import share_of
from data_pipeline.serve.loader import EVERY_SHARD
from data_pipeline.synthetic.loader import SyntheticLoader
from data_pipeline.synthetic.task import TaskConfig

if TYPE_CHECKING:
    from bst_dist.train.context import Context
    from data_pipeline.serve.slices import MicroBatch


@dataclass(frozen=True)
class DistanceReport(EvalReport):
    """An evaluation of a synthetic task. `tokens` is the number of labels that count. There is no text."""

    accuracy: float
    """Share of the counted labels that have the highest logit."""
    best_loss_nats: float
    """The least loss that any model can have on these labels, as the mean over all rows that can be drawn."""
    labels_by_distance: dict[str, int]
    """Number of counted labels by their distance to the answer earlier in the row; keys like "64-127"."""
    accuracy_by_distance: dict[str, float]
    loss_by_distance: dict[str, float]

    def about(self) -> str:
        return f"{self.split} accuracy {self.accuracy:.4f}, {self.tokens:,} labels, best loss {self.best_loss_nats:.4f}"


class ByDistance:
    """Sums of labels, correct labels and nats, by octave of distance: bin k holds distances 2^k to 2^(k + 1) - 1."""

    def __init__(self, longest: int, device: torch.device | None = None):
        self.sums = torch.zeros(longest.bit_length(), 3, dtype=torch.float64, device=device)

    def add(self, distance: Tensor, counts: Tensor, correct: Tensor, nats: Tensor) -> None:
        """Add labels (b, l): their distances, whether each counts, whether each is correct, and their losses."""
        place = octave(distance[counts])
        found = torch.stack((torch.ones_like(place), correct[counts], nats[counts]), dim=-1)
        self.sums.index_add_(0, place, found.double())

    def report(self, task: TaskConfig, longest: int, sums: Sequence[float]) -> dict[str, Any]:
        """Return fields of a `DistanceReport`; `sums` is `self.sums` flattened and summed over the ranks."""
        bins = [Bin(1 << k, min((2 << k) - 1, longest), *sums[3 * k : 3 * k + 3]) for k in range(len(sums) // 3)]
        found = [each for each in bins if each.labels]
        labels = max(1.0, sum(each.labels for each in found))
        return {
            "tokens": int(sum(each.labels for each in found)),
            "loss_nats": sum(each.nats for each in found) / labels,
            "accuracy": sum(each.correct for each in found) / labels,
            "best_loss_nats": sum(each.labels * task.best_loss(each.first, each.last) for each in found) / labels,
            "labels_by_distance": {each.name: int(each.labels) for each in found},
            "accuracy_by_distance": {each.name: each.correct / each.labels for each in found},
            "loss_by_distance": {each.name: each.nats / each.labels for each in found},
        }


class Bin(NamedTuple):
    """Sums over the labels with distances `first` to `last`."""

    first: int
    last: int
    labels: float
    correct: float
    nats: float

    @property
    def name(self) -> str:
        return octave_name(self.first, self.last)


def octave(distance: Tensor) -> Tensor:
    """Return k (int64) for distances 2^k to 2^(k + 1) - 1, and -1 for distance 0."""
    return torch.frexp(distance.double()).exponent.long() - 1


def octave_name(first: int, last: int) -> str:
    """Return the name of an octave of distances, like "64-127"."""
    return f"{first}-{last}"


@dataclass(frozen=True)
class SyntheticObjective:
    """The objective of a run that learns a synthetic task; its rows are computed, not read."""

    labels: ClassVar[str] = "labels"
    tokens_per_label: ClassVar[int] = 1
    predicts_tokens: ClassVar[bool] = True
    evaluates: ClassVar[bool] = True
    mixed: ClassVar[Sequence[str]] = ()

    recipe: Recipe

    @classmethod
    def of(cls, recipe: Recipe, _checked: slice = EVERY_SHARD) -> SyntheticObjective:
        return cls(recipe)

    def model(self) -> LanguageModel:
        return LanguageModel(self.recipe.model)

    def token_bytes(self) -> Tensor:
        return torch.zeros(self.recipe.model.vocab_size, dtype=torch.int64)

    def tokenizer(self) -> None:
        return None

    def reading(self, mesh: Mesh, state: Mapping[str, Any], steps: int) -> str:
        return ""

    def about(self) -> dict[str, Any]:
        return {"chance_loss_nats": self.recipe.data.synthetic.chance_loss}

    def digests(self) -> dict[str, Any]:
        return {}

    def loader(self, mesh: Mesh, start_step: int = 0) -> SyntheticLoader:
        train = self.recipe.train
        share = share_of(self.recipe, mesh, train.sequences, train.micro_sequences)
        return SyntheticLoader(
            self.recipe.data, "train", share, seed=self.recipe.seed, start_step=start_step, row_tokens=self._row
        )

    def evaluations(self, context: Context) -> Evaluations:
        """Return the evaluation on the first rows of the validation split, which are the same for every run seed."""
        recipe, ranks = self.recipe, context.ranks
        mesh = Mesh(ranks.world, ranks.rank, recipe.parallel.sp)
        batches = self._validation(mesh, recipe.evaluation.sequences, recipe.train.micro_sequences).batches(0)
        return Evaluations(DistanceEvaluation(context, batches, recipe.data.synthetic, self._row))

    @property
    def _row(self) -> int:
        return self.recipe.data.row(self.recipe.train.sequence_length)

    def _validation(self, mesh: Mesh, rows: int, micro_rows: int) -> SyntheticLoader:
        """Return a loader of whole validation rows. Rows that training reads over several steps are cut into slices.

        The slices have the length of a training sequence.
        """
        share, row = share_of(self.recipe, mesh, rows, micro_rows), self._row
        if row > share.length:
            share = replace(share, length=row, slice_tokens=share.slice_tokens or share.length)
        return SyntheticLoader(self.recipe.data, "validation", share, seed=0)


class DistanceEvaluation(Evaluation):
    """Measures loss and accuracy, also by distance."""

    def __init__(self, context: Context, batches: Sequence[MicroBatch], task: TaskConfig, longest: int) -> None:
        """`longest`: the number of tokens of a row, which no distance exceeds."""
        super().__init__(context, batches)
        self.task, self.longest = task, longest

    def evaluate(self, step: int) -> DistanceReport | None:
        start = time.perf_counter()
        found = ByDistance(self.longest, self.ranks.device)
        for batch, inputs, losses in self.forward(step):
            distance = torch.from_numpy(batch.distance).to(self.ranks.device)
            found.add(distance, inputs["loss_mask"], losses.correct, losses.per_token)
        if self.stop.stopping:
            return None
        sums = self.ranks.all_reduce_numbers(found.sums.flatten().tolist())
        report = found.report(self.task, self.longest, sums)
        return DistanceReport(
            step=step,
            split="validation",
            bits_per_byte=nan,
            loss_by_block=[],
            time_s=time.perf_counter() - start,
            **report,
        )
