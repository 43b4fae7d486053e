"""A summary of a run from the files in its directory, without loading its model. It works for any kind of run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bst_base.errors import UserError
from bst_base.settings import read_settings
from bst_dist.checkpoint.directory import WEIGHTS, committed, open_shards
from bst_dist.config import flat
from bst_dist.model.lm import LanguageModel
from bst_dist.model.meta_device import weightless
from bst_dist.report.saved import REPORTS
from bst_dist.study.comparison.training_status import TrainingStatus, training_status
from bst_dist.study.runs.results import Result, read_result
from bst_dist.study.statistics import Estimate
from bst_dist.train.rundir import RECIPE, read_recipe, read_starts

LAST_STEPS = 20
"""The training loss of a run is the mean over this many of its last steps, because a single step is mostly noise."""


@dataclass(frozen=True)
class Scored:
    """A loss over whole documents of one corpus, or a difference of two."""

    documents: int | None
    bits_per_byte: Estimate | None


@dataclass(frozen=True)
class Documents:
    """The results of `bst eval` on the documents of a corpus."""

    scored: Scored
    nats: list[float]
    """Nats of each document; empty if the report does not contain them."""
    bytes: list[int]


@dataclass(frozen=True)
class Figures:
    """The results of a run. A value is None if the run's files do not contain it."""

    parameters: int | None
    ranks: int | None
    step: int
    tokens: int | None
    train_mean_of_last_steps: int | None
    """Number of steps that the training values are the mean of."""
    train_loss_nats: float | None
    train_bits_per_byte: float | None
    train_accuracy: float | None
    tokens_per_s: float | None
    """Median over steps."""
    validation_step: int | None
    validation_loss_nats: float | None
    validation_bits_per_byte: float | None
    validation_accuracy: float | None
    peak_memory_bytes: int | None
    time_s: float | None
    """Total time of steps, without compilation (`Result.step_times`), and of evaluations."""
    scored: dict[str, Scored] | None
    """Corpus -> loss over whole documents."""


@dataclass(frozen=True)
class RunSummary:
    """The contents of a run's files. A value is None if the files do not contain it."""

    result: Result
    recipe: dict[str, Any]
    """Dotted name -> value of each field, as the run has stored it."""
    status: TrainingStatus
    parameters: int | None
    ranks: int | None
    """Number of ranks at its last start."""
    documents: dict[str, Documents]
    """Corpus -> results of `bst eval` on whole documents at the last step; empty if the run directory has no such
    report."""

    def figures(self) -> Figures:
        """Return the results of the run."""
        result, last = self.result, self.result.train[-LAST_STEPS:]
        evaluated = result.evaluations[-1] if result.evaluations else {}
        return Figures(
            self.parameters,
            self.ranks,
            result.step,
            last[-1].get("tokens") if last else None,
            len(last) or None,
            *(_of(fmean, last, key) for key in ("loss_nats", "bits_per_byte", "accuracy")),
            _of(median, result.warm, "tokens_per_s"),
            *(_known(evaluated.get(key)) for key in ("step", "loss_nats", "bits_per_byte", "accuracy")),
            max((line["memory_bytes"] for line in result.performance), default=None),
            _time_s(result) or None,
            {name: documents.scored for name, documents in self.documents.items()} or None,
        )


def summarise(run_dir: Path) -> RunSummary:
    """Read a run directory; raises UserError if it holds no run."""
    path = run_dir / RECIPE
    if not path.is_file():
        read_recipe(run_dir)  # raises the UserError
    recipe, result = flat(read_settings(path)), read_result(run_dir)
    ranks = starts[-1].get("ranks") if (starts := read_starts(run_dir)) else None
    where = training_status(run_dir, result.step, recipe.get("train.steps"))
    report = eval_report(run_dir, result.step)
    documents = _by_name(report["corpora"]) if report else {}
    return RunSummary(result, recipe, where, _parameters(run_dir), ranks, documents)


def _by_name(corpora: list[dict[str, Any]]) -> dict[str, Documents]:
    """Return the entries of a report by the name of their corpus, or by its path if two corpora have the same name."""
    names = [Path(str(of.get("corpus", "documents"))).name for of in corpora]
    return {
        name if names.count(name) == 1 else str(of.get("corpus")): _documents(of)
        for name, of in zip(names, corpora, strict=True)
    }


def _documents(of: dict[str, Any]) -> Documents:
    bits = of.get("bits_per_byte")
    estimate = None if bits is None else Estimate(bits, of.get("bits_per_byte_standard_error"))
    scored = Scored(of.get("documents"), estimate)
    return Documents(scored, of.get("document_nats", []), of.get("document_bytes", []))


def _parameters(run_dir: Path) -> int | None:
    """Return the number of parameters: of the newest readable checkpoint, else of the recipe's language model.

    The model is built on tensors without storage. None if the recipe cannot be read.
    """
    for checkpoint in committed(run_dir):
        with suppress(UserError):
            return sum(map(math.prod, open_shards(checkpoint, WEIGHTS).shapes.values()))
    try:
        recipe = read_recipe(run_dir)
    except UserError:
        return None
    with weightless():
        return sum(parameter.numel() for parameter in LanguageModel(recipe.model).parameters())


def eval_report(run_dir: Path, step: int, averaged: bool = False) -> dict[str, Any] | None:
    """Return the newest complete report of `bst eval` on the whole validation documents after `step` steps, or None.

    Reports are searched in the run directory and in its reports/. One on the run's own corpora comes before those on
    others; one in another precision than that of training is never used. `averaged`: a report on the averaged weights.
    """
    recipe = flat(read_settings(run_dir / RECIPE))
    precision, corpora = recipe.get("train.precision"), sorted(Result(run_dir, []).corpora.split())
    asked = {"command": "bst eval", "step": step, "split": "validation", "context_tokens": None}
    found = []
    for time, report in _reports(run_dir):
        whole = asked.items() <= report.items() and report.get("passed") is not False  # False: it was stopped
        alike = bool(report.get("averaged")) == averaged and precision in (None, report.get("precision", precision))
        if whole and alike and report.get("corpora"):
            own = sorted(of.get("sha256", "") for of in report["corpora"]) == corpora
            found.append((own, time, report))
    return max(found, key=lambda one: one[:2])[-1] if found else None


def _reports(run_dir: Path) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield every readable report in the run directory and in its reports/, with the time of its file."""
    for path in (*run_dir.glob("*.json"), *(run_dir / REPORTS).glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict):
            yield path.stat().st_mtime, report


def _time_s(result: Result) -> float:
    steps = result.time_s() if all("step_time_s" in line for line in result.train) else 0.0
    others = (line for line in result.lines if line["kind"] != "train")
    return steps + sum(line.get("step_time_s", line.get("time_s", 0.0)) for line in others)


def _of(middle: Any, lines: list[dict[str, Any]], key: str) -> float | None:
    """Return the mean or median over the lines that have a value; None if there is none."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return _known(middle(values)) if values else None


def _known(value: Any) -> Any:
    """Return the value, or None for NaN."""
    return value if value == value else None
