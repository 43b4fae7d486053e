"""What a run directory says of its run, of whatever kind and length, without opening its model."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from bst_base.errors import UserError
from bst_base.settings import read_settings
from bst_dist.checkpoint.directory import WEIGHTS, committed, open_shards
from bst_dist.config import flat
from bst_dist.model.lm import LanguageModel
from bst_dist.report.metrics import FILE, read_lines
from bst_dist.report.saved import REPORTS
from bst_dist.study.comparison.standing import Standing, standing
from bst_dist.train.rundir import ENVIRONMENT, RECIPE, read_recipe

LAST_STEPS = 20
"""A run's training loss is the mean over so many of its last steps: one step's is mostly noise."""


@dataclass(frozen=True)
class Outline:
    """What can be said of a run from its files; what they do not say is None."""

    run_dir: Path
    recipe: dict[str, Any]
    """Every field by its dotted name, as the run has stored it."""
    lines: list[dict[str, Any]]
    """All that it has reported, in order."""
    standing: Standing
    parameters: int | None
    start: dict[str, Any]
    """Its last start: ranks, hosts, versions."""
    scored: dict[str, dict[str, Any]]
    """What `bst eval` made of whole documents of its newest weights, by corpus; empty when no report lies in the run
    directory."""

    @property
    def train(self) -> list[dict[str, Any]]:
        """The steps that were taken."""
        return [line for line in self.lines if line["kind"] == "train"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations during training."""
        return [line for line in self.lines if line["kind"] == "eval"]

    def figures(self) -> dict[str, Any]:
        """For machines: units in the names, and only what there is."""
        train, memory = self.train, [line["memory_bytes"] for line in self.lines if line["kind"] == "performance"]
        found = {"parameters": self.parameters, "ranks": self.start.get("ranks"), "step": self._step}
        if train:
            last = train[-LAST_STEPS:]
            found |= {"tokens": train[-1].get("tokens"), "train_mean_of_last_steps": len(last)}
            found |= {f"train_{key}": _mean(last, key) for key in ("loss_nats", "bits_per_byte", "accuracy")}
            found["tokens_per_s"] = _median([line.get("tokens_per_s") for line in train[1:] or train])
        for line in self.evaluations[-1:]:
            found |= {f"validation_{key}": line.get(key) for key in ("step", "loss_nats", "bits_per_byte", "accuracy")}
        found["peak_memory_bytes"] = max(memory, default=None)
        found["time_s"] = sum(line.get("step_time_s", line.get("time_s", 0.0)) for line in self.lines) or None
        told = {key: value for key, value in found.items() if value is not None and value == value}  # nan is no figure
        keys = ("documents", "bits_per_byte", "bits_per_byte_standard_error")
        scored = {name: {key: of[key] for key in keys if key in of} for name, of in self.scored.items()}
        return told | ({"scored": scored} if scored else {})

    @property
    def _step(self) -> int:
        return max((line["step"] for line in self.lines if line["kind"] in ("train", "skipped")), default=0)


def outline(run_dir: Path) -> Outline:
    """Read a run directory; raises UserError when it holds no run."""
    path = run_dir / RECIPE
    if not path.is_file():
        read_recipe(run_dir)  # says so
    recipe = read_settings(path)
    lines, fields = read_lines(run_dir / FILE), flat(recipe)
    step = max((line["step"] for line in lines if line["kind"] in ("train", "skipped")), default=0)
    starts = json.loads((run_dir / ENVIRONMENT).read_text())["starts"] if (run_dir / ENVIRONMENT).exists() else [{}]
    where = standing(run_dir, step, fields.get("train.steps"))
    report = eval_report(run_dir, step)
    scored = _by_name(report["corpora"]) if report else {}
    return Outline(run_dir, fields, lines, where, _parameters(run_dir), starts[-1], scored)


def _by_name(corpora: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Entries of a report by the name of their corpus; by its whole path where two of them have one name."""
    names = [Path(str(of.get("corpus", "documents"))).name for of in corpora]
    return {
        name if names.count(name) == 1 else str(of.get("corpus")): of for name, of in zip(names, corpora, strict=True)
    }


def _parameters(run_dir: Path) -> int | None:
    """Those of the newest checkpoint; before there is one, of a language model's recipe, on tensors without storage."""
    for checkpoint in committed(run_dir):
        with suppress(UserError):
            return sum(map(math.prod, open_shards(checkpoint, WEIGHTS).shapes.values()))
    try:
        recipe = read_recipe(run_dir)
    except UserError:
        return None
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(recipe.model).parameters())


def eval_report(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The report of `bst eval` on the validation documents after `step` steps, the newest if there are several.

    Reports are looked for in the run directory and in its reports/.
    """
    found: list[tuple[float, dict[str, Any]]] = []
    for path in (*run_dir.glob("*.json"), *(run_dir / REPORTS).glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        asked = {"command": "bst eval", "step": step, "split": "validation", "context_tokens": None}
        if isinstance(report, dict) and asked.items() <= report.items() and report.get("corpora"):
            found.append((path.stat().st_mtime, report))
    return max(found, key=lambda one: one[0])[1] if found else None


def _mean(lines: list[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if key in line]
    return fmean(values) if values else None


def _median(values: list[Any]) -> float | None:
    numbers = [value for value in values if value is not None]
    return median(numbers) if numbers else None
