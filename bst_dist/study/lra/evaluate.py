"""Evaluation of a trained classifier: its accuracy on a whole split, stored in the run directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from bst_base.errors import UserError
from bst_base.files import write_json
from bst_dist.config import Recipe
from bst_dist.study.evaluation.trained import restore
from bst_dist.study.lra.accuracy import Accuracy
from bst_dist.study.lra.config import LongRangeConfig
from bst_dist.study.lra.examples import Examples, open_split
from bst_dist.study.lra.loader import LabelledLoader
from bst_dist.study.lra.model import Classifier
from bst_dist.study.lra.tasks import TASKS
from bst_dist.train.rundir import read_recipe
from bst_dist.train.step import on_device
from data_pipeline.serve.share import Share


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier with its weights after some step of its run."""

    run_dir: Path
    recipe: Recipe
    step: int
    model: Classifier


def open_classifier(run_dir: Path, step: int | None = None) -> TrainedClassifier:
    """Load the classifier of a run after `step`, or from its newest valid checkpoint, onto the accelerator if any.

    Raises UserError if the directory holds no run of a task, or if the checkpoint is missing or damaged.
    """
    recipe = read_recipe(run_dir)
    if not isinstance(recipe.data, LongRangeConfig):
        raise UserError(f"{run_dir}: a language model's run, not one of a Long Range Arena task; use bst eval")
    torch.manual_seed(recipe.seed)
    model = Classifier(recipe.model, recipe.data)
    return TrainedClassifier(run_dir, recipe, restore(model, run_dir, step), model)


@dataclass(frozen=True)
class Report:
    """The accuracy of a run on a whole split, as stored in its directory."""

    task: str
    split: str
    step: int
    parameters: int
    accuracy: float
    accuracy_standard_error: float
    accuracy_low_95: float
    accuracy_high_95: float
    correct: int
    examples: int
    majority_class: int
    """The most frequent class of the training split."""
    majority_accuracy: float
    """Accuracy on the split if the answer is always the majority class."""
    examples_sha256: str


def evaluate(trained: TrainedClassifier, split: str, rows: int = 64) -> Report:
    """Measure the accuracy over all examples of a split, `rows` at a time, and that of the majority class."""
    data, task = trained.recipe.data, TASKS[trained.recipe.data.task]
    examples = open_split(Path(data.examples), split, task)
    counts = np.bincount(open_split(Path(data.examples), "train", task).classes, minlength=task.classes)
    majority = int(counts.argmax())
    return Report(
        task=task.name,
        split=split,
        step=trained.step,
        parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
        **measure(trained.model, examples, trained.recipe, rows).report(),
        majority_class=majority,
        majority_accuracy=float((examples.classes == majority).mean()),
        examples_sha256=examples.sha256,
    )


def measure(model: Classifier, examples: Examples, recipe: Recipe, rows: int) -> Accuracy:
    """Return the accuracy of the model over all examples."""
    share = Share(length=recipe.train.sequence_length, rows=rows, micro_rows=rows)
    batches = LabelledLoader(examples, share, seed=None)
    device = next(model.parameters()).device
    correct = 0
    for step in range(-(-len(examples) // rows)):
        (batch,) = batches.batches(step)
        half = recipe.train.precision == "bf16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            correct += int(model(**on_device(batch, device)).correct.sum())
    return Accuracy(correct, len(examples))


def kept_in(run_dir: Path, split: str) -> Path:
    """Return the file of a run's accuracy on a split."""
    return run_dir / f"accuracy-{split}.json"


def keep(run_dir: Path, report: Report) -> None:
    """Write a report of `evaluate` into the run directory."""
    write_json(kept_in(run_dir, report.split), asdict(report))


def read_kept(run_dir: Path, split: str) -> Report:
    """Read the report that `keep` has written; raises UserError if there is none."""
    path = kept_in(run_dir, split)
    if not path.is_file():
        read_recipe(run_dir)  # raises another error if the directory holds no run at all
        raise UserError(f"{run_dir}: not evaluated on the {split} split yet: bst lra eval {run_dir} --split {split}")
    return Report(**json.loads(path.read_text(encoding="utf-8")))
