"""What a run directory says of its run, of whatever kind and length, without opening its model."""

from __future__ import annotations

import json
import math
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
from bst_dist.model.weightless import weightless
from bst_dist.report.saved import REPORTS
from bst_dist.study.comparison.standing import Standing, standing
from bst_dist.study.runs.results import Result, read_result
from bst_dist.study.statistics import Estimate
from bst_dist.train.rundir import ENVIRONMENT, RECIPE, read_recipe

LAST_STEPS = 20
"""A run's training loss is the mean over so many of its last steps: one step's is mostly noise."""


@dataclass(frozen=True)
class Scored:
    """A loss over whole documents of one corpus, or a difference of two."""

    documents: int | None
    bits_per_byte: Estimate | None


@dataclass(frozen=True)
class Documents:
    """What `bst eval` has made of a corpus's documents."""

    scored: Scored
    nats: list[float]
    """Of each document; empty in reports that do not say."""
    bytes: list[int]


@dataclass(frozen=True)
class Figures:
    """What a run has reached. None: its files do not say."""

    parameters: int | None
    ranks: int | None
    step: int
    tokens: int | None
    train_mean_of_last_steps: int | None
    """How many steps the training figures are the mean of."""
    train_loss_nats: float | None
    train_bits_per_byte: float | None
    train_accuracy: float | None
    tokens_per_s: float | None
    """The median step's."""
    validation_step: int | None
    validation_loss_nats: float | None
    validation_bits_per_byte: float | None
    validation_accuracy: float | None
    peak_memory_bytes: int | None
    time_s: float | None
    """In steps and evaluations."""
    scored: dict[str, Scored] | None
    """Whole documents, by corpus."""


@dataclass(frozen=True)
class Outline:
    """What can be said of a run from its files; what they do not say is None."""

    result: Result
    recipe: dict[str, Any]
    """Every field by its dotted name, as the run has stored it."""
    standing: Standing
    parameters: int | None
    ranks: int | None
    """Of its last start."""
    documents: dict[str, Documents]
    """What `bst eval` made of whole documents with its newest weights, by corpus; empty when no report lies in the run
    directory."""

    def figures(self) -> Figures:
        """What it has reached."""
        result, last = self.result, self.result.train[-LAST_STEPS:]
        evaluated = result.evaluations[-1] if result.evaluations else {}
        return Figures(
            self.parameters, self.ranks, result.step, last[-1].get("tokens") if last else None, len(last) or None,
            *(_of(fmean, last, key) for key in ("loss_nats", "bits_per_byte", "accuracy")),
            _of(median, result.warm, "tokens_per_s"),
            *(_known(evaluated.get(key)) for key in ("step", "loss_nats", "bits_per_byte", "accuracy")),
            max((line["memory_bytes"] for line in result.performance), default=None),
            sum(line.get("step_time_s", line.get("time_s", 0.0)) for line in result.lines) or None,
            {name: documents.scored for name, documents in self.documents.items()} or None,
        )  # fmt: skip


def outline(run_dir: Path) -> Outline:
    """Read a run directory; raises UserError when it holds no run."""
    path = run_dir / RECIPE
    if not path.is_file():
        read_recipe(run_dir)  # says so
    recipe, result = flat(read_settings(path)), read_result(run_dir)
    starts = json.loads((run_dir / ENVIRONMENT).read_text())["starts"] if (run_dir / ENVIRONMENT).exists() else [{}]
    where = standing(run_dir, result.step, recipe.get("train.steps"))
    report = eval_report(run_dir, result.step)
    documents = _by_name(report["corpora"]) if report else {}
    return Outline(result, recipe, where, _parameters(run_dir), starts[-1].get("ranks"), documents)


def _by_name(corpora: list[dict[str, Any]]) -> dict[str, Documents]:
    """Entries of a report by the name of their corpus; by its whole path where two of them have one name."""
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
    """Those of the newest checkpoint; before there is one, of a language model's recipe, on tensors without storage."""
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
    """The report of `bst eval` on the validation documents after `step` steps, the newest if there are several.

    Reports are looked for in the run directory and in its reports/. `averaged`: of the averaged weights.
    """
    found: list[tuple[float, dict[str, Any]]] = []
    for path in (*run_dir.glob("*.json"), *(run_dir / REPORTS).glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        asked = {"command": "bst eval", "step": step, "split": "validation", "context_tokens": None}
        whole = isinstance(report, dict) and report.get("passed") is not False  # not of an evaluation that was stopped
        alike = whole and asked.items() <= report.items() and bool(report.get("averaged")) == averaged
        if alike and report.get("corpora"):
            found.append((path.stat().st_mtime, report))
    return max(found, key=lambda one: one[0])[1] if found else None


def _of(middle: Any, lines: list[dict[str, Any]], key: str) -> float | None:
    """A mean or median over the lines that have a value."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return _known(middle(values)) if values else None


def _known(value: Any) -> Any:
    """A value, or None where it is not a number."""
    return value if value == value else None
