"""`bst eval` of a run that learns a synthetic task: accuracy and loss on unseen rows, by distance of the answer."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.past import State
from bst_dist.study.evaluation.scoring import TOKENS_AT_ONCE
from bst_dist.study.evaluation.trained import open_run
from bst_dist.study.statistics import Estimate, ratio, share_report, share_text
from bst_dist.study.synthetic import octave, octave_name
from data_pipeline.serve.share import Share
from data_pipeline.synthetic.loader import SyntheticBatch, SyntheticLoader
from data_pipeline.synthetic.task import TaskConfig

ROWS = 256
"""Default of --rows."""


@dataclass(frozen=True)
class Answers:
    """Sums for n rows by octave of distance; all (n, octaves)."""

    labels: np.ndarray
    """Number of labels that count."""
    correct: np.ndarray
    """Number of these labels that have the highest logit."""
    nats: np.ndarray
    """Sum of the losses of these labels."""

    def among(self, kinds: slice, best: float) -> Part:
        """Return the results for some octaves; `best` is the least loss that any model can have on their labels."""
        labels, correct, nats = (values[:, kinds].sum(1) for values in (self.labels, self.correct, self.nats))
        return Part(int(labels.sum()), ratio(correct, labels), ratio(nats, labels), best)


@dataclass(frozen=True)
class Part:
    """Results on a set of labels; errors are over rows."""

    labels: int
    accuracy: Estimate
    loss: Estimate
    """Nats per label."""
    best_loss: float
    """The least loss that any model can have, as the mean over all rows that can be drawn."""

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report."""
        return {
            "labels": self.labels,
            **share_report(self.accuracy, "accuracy"),
            **self.loss.report("loss_nats"),
            "best_loss_nats": self.best_loss,
        }


@dataclass(frozen=True)
class Figures:
    """Results on all labels, and by octave of distance: (first distance, last distance) -> results."""

    every: Part
    by_distance: dict[tuple[int, int], Part]

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report."""
        lines = [{"from": first, "to": last, **part.report()} for (first, last), part in self.by_distance.items()]
        return {**self.every.report(), "by_distance": lines}


def answers(model: LanguageModel, batches: list[SyntheticBatch], slice_length: int, precision: str) -> Answers:
    """Evaluate rows slice by slice with the model's carried state, so that memory does not grow with their length."""
    found = []
    for batch in batches:
        octaves = octave(torch.from_numpy(batch.distance)).numpy()
        correct, nats = read_rows(model, batch, slice_length, precision)
        counts = np.zeros((3, len(octaves), batch.input_ids.shape[1].bit_length()))
        rows = np.broadcast_to(np.arange(len(octaves))[:, None], octaves.shape)[batch.loss_mask]
        for place, values in enumerate((batch.loss_mask, correct, nats)):
            np.add.at(counts[place], (rows, octaves[batch.loss_mask]), values[batch.loss_mask])
        found.append(counts)
    return Answers(*np.concatenate(found, axis=1))


class Rows(Protocol):
    """Rows to evaluate; each array is (b, l)."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray


def read_rows(model: LanguageModel, batch: Rows, slice_length: int, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Return for each label that counts whether it has the highest logit, and its loss in nats; (b, l) each."""
    device, state = next(model.parameters()).device, State()
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for begin in range(0, batch.input_ids.shape[1], slice_length):
        part = slice(begin, begin + slice_length)
        ids, labels, counts = (
            torch.from_numpy(array[:, part]).to(device) for array in (batch.input_ids, batch.labels, batch.loss_mask)
        )
        past = model.carry(state, begin)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = model(ids, labels, counts, past=past)
        state = past.after
        found.append((losses.correct.cpu().numpy(), losses.per_token.double().cpu().numpy()))
    correct, nats = (np.concatenate(parts, 1) for parts in zip(*found, strict=True))
    return correct, nats


def run(args: argparse.Namespace) -> dict[str, Any]:
    trained = open_run(args.run, args.checkpoint, args.precision, args.averaged)
    recipe, task = trained.recipe, trained.recipe.data.synthetic
    length, rows = args.length or recipe.data.row(recipe.train.sequence_length), args.rows or ROWS
    if length % recipe.model.block:
        raise UserError(f"--length {length} is not a multiple of the model's block, {recipe.model.block}")
    if problem := task.problem(length):
        raise UserError(f"--length {length}: {problem}")
    at_once = max(1, min(rows, TOKENS_AT_ONCE // length))
    share = Share(length=length, rows=-(-rows // at_once) * at_once, micro_rows=at_once)
    loader = SyntheticLoader(recipe.data, args.split, share, seed=0)
    slice_length = min(length, recipe.train.sequence_length)
    found = answers(trained.model, loader.batches(0), slice_length, recipe.train.precision)
    found = Answers(found.labels[:rows], found.correct[:rows], found.nats[:rows])
    figures = summary(task, found, length)
    print_table(
        Sheet(("distance", "labels", "accuracy", "loss, nats per label", "best possible"), _lines(figures)),
        f"{args.run} after {trained.step:,} steps: {task.task}",
        f"{rows:,} rows of {length:,} tokens ({args.split}); ± standard error over rows, or a 95 % interval; "
        f"guessing gives loss {task.chance_loss:.4f} and accuracy {1 / task.choices:.2%}",
    )
    return {
        "run": str(args.run),
        "step": trained.step,
        "split": args.split,
        "rows": rows,
        "length_tokens": length,
        "task": task.model_dump(mode="json"),
        "chance_loss_nats": task.chance_loss,
        **figures.report(),
    }


def summary(task: TaskConfig, found: Answers, length: int) -> Figures:
    """Return the results on all labels and for each octave of distance with labels."""
    by_distance = {}
    for place in np.flatnonzero(found.labels.sum(0)).tolist():
        first, last = 1 << place, min((2 << place) - 1, length)
        by_distance[first, last] = found.among(slice(place, place + 1), task.best_loss(first, last))
    labels = sum(part.labels for part in by_distance.values())
    best = sum(part.labels * part.best_loss for part in by_distance.values()) / labels
    return Figures(found.among(slice(None), best), by_distance)


def _lines(figures: Figures) -> list[list[str]]:
    named = {octave_name(*ends): part for ends, part in figures.by_distance.items()} | {"all": figures.every}
    return [
        [name, f"{part.labels:,}", share_text(part.accuracy), str(part.loss), f"{part.best_loss:.4f}"]
        for name, part in named.items()
    ]
