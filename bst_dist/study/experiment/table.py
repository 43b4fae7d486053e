"""The table of an experiment: one row per arm and condition, one column per measurement."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bst_base.files import write_text
from bst_dist.study.experiment.config import ExperimentConfig
from bst_dist.study.experiment.design import Trial
from bst_dist.study.experiment.measure import Column, Measured, columns
from bst_dist.study.experiment.readings import Reading, apart, difference, level
from bst_dist.study.laws.observation import same_text
from bst_dist.study.runs.results import trained_with
from bst_dist.study.runs.state import RunStatus
from bst_dist.study.statistics import Estimate


@dataclass(frozen=True)
class Row:
    """One arm under one condition, over its finished seeds."""

    condition: str
    arm: str
    label: str
    """Arm and condition, for messages."""
    statuses: dict[int, RunStatus]
    """Seed -> status of its run."""
    parameters: int | None
    """None until a run is done."""
    tokens: int
    """Number of tokens that each run trains on."""
    levels: dict[str, Estimate] = field(default_factory=dict)
    """Column key -> mean over seeds. Columns without a measurement are missing."""
    differences: dict[str, Estimate] = field(default_factory=dict)
    """Column key -> paired difference from the reference arm under the same condition. Empty for the reference."""
    notes: dict[str, str] = field(default_factory=dict)
    """Column key -> why there is no value, or a remark about how it was measured."""
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Column key -> seed -> value."""
    paired: dict[str, list[int]] = field(default_factory=dict)
    """Column key -> the seeds of its difference."""

    @property
    def done(self) -> int:
        """Number of seeds whose run is done."""
        return sum(run_status.status == "done" for run_status in self.statuses.values())


@dataclass(frozen=True)
class Table:
    """The results of an experiment so far."""

    experiment: ExperimentConfig
    columns: list[Column]
    rows: list[Row]
    trained_with: str = ""
    """A sentence with the versions."""

    @property
    def over(self) -> str:
        """A phrase for the caption: whether the standard errors are over seeds or documents."""
        kinds = {level.over for row in self.rows for level in row.levels.values()} - {None}
        said = {
            "seeds": "over seeds, as many as there are runs; differences are paired by seed",
            "documents": "over validation documents: with one seed they compare two trained models, not the two arms",
        }
        return "; ".join(said[kind] for kind in said if kind in kinds) or "not known from one run each"

    @property
    def comparisons(self) -> int:
        """Number of differences with an interval over seeds. About one in twenty excludes zero by chance."""
        return sum(found.over == "seeds" for row in self.rows for found in row.differences.values())

    @property
    def statuses(self) -> Counter[str]:
        """Status -> number of runs."""
        return Counter(run_status.status for row in self.rows for run_status in row.statuses.values())

    @property
    def notes(self) -> list[str]:
        """The notes on single cells, without repetitions."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for column in self.columns:
                if column.key in row.notes:
                    found.setdefault(f"{row.label}, {row.notes[column.key]}", []).append(column.title)
        return [f"{text} ({', '.join(where)})" for text, where in found.items()]

    @property
    def unfinished(self) -> list[str]:
        """One line per arm and reason, with the seeds of the runs that are not done."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for seed, run_status in row.statuses.items():
                if run_status.status != "done":
                    text = f"{row.label}: {run_status.status} {run_status.reason}".rstrip()
                    found.setdefault(text, []).append(str(seed))
        return [f"{text} (seed {', '.join(seeds)})" for text, seeds in found.items()]

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report: every level and difference with its error, and the values by seed."""
        return {
            "experiment": self.experiment.name,
            "question": self.experiment.question,
            "reference": self.experiment.reference,
            "standard_errors": self.over,
            "comparisons": self.comparisons,
            "runs": dict(self.statuses),
            "trained_with": self.trained_with,
            "columns": {column.key: column.title for column in self.columns},
            "rows": [_row_report(row) for row in self.rows],
            "notes": self.notes,
            "unfinished": self.unfinished,
        }


Found = list[tuple[Trial, RunStatus, Measured | None]]
"""Runs with their status and measurements; measurements are None for a run that is not done."""


def gather(experiment: ExperimentConfig, measured: Found) -> Table:
    """Make the table from the measurements of the runs."""
    every = columns(experiment.measure)
    rows = []
    for condition in experiment.conditions:
        of = {arm: [m for m in measured if (m[0].condition, m[0].arm) == (condition, arm)] for arm in experiment.arms}
        rows += [_row(condition, arm, of[arm], of[experiment.reference], every) for arm in experiment.arms]
    return Table(experiment, every, rows, trained_with(m.versions for _, _, m in measured if m is not None))


def _row(condition: str, arm: str, own: Found, reference: Found, every: list[Column]) -> Row:
    known = [measured for _, _, measured in own if measured is not None]
    row = Row(
        condition,
        arm,
        own[0][0].group,
        {trial.seed: run_status for trial, run_status, _ in own},
        known[0].parameters if known else None,
        own[0][0].tokens,
    )
    for key in (column.key for column in every):
        readings = _by_seed(own, key)
        if readings:
            row.levels[key] = level(readings)
            row.values[key] = {seed: reading.value for seed, reading in readings.items()}
        said = Counter(measured.notes[key] for measured in known if key in measured.notes)
        if own is not reference:
            said.update(_compare(row, key, own, reference))
        if said:
            of = len(known)
            row.notes[key] = "; ".join(t if n == of else f"{n} of {of} seeds: {t}" for t, n in said.items())
    return row


def _compare(row: Row, key: str, own: Found, reference: Found) -> Counter[str]:
    """Add the difference of a column to its row, and return why seeds are left out of it, with their number.

    There is none if a finished run of either arm has no value: the seeds that reach a loss are not like the others.
    """
    readings, theirs = _by_seed(own, key), _by_seed(reference, key)
    texts, their_texts = ({t.seed: m.corpora for t, _, m in found if m is not None} for found in (own, reference))
    both, arm = [seed for seed in readings if seed in theirs], reference[0][0].arm
    if both and (len(readings), len(theirs)) != (len(texts), len(their_texts)):
        return Counter({f"not compared with {arm}: a run of the two has no value": len(texts)})
    row.paired[key] = [seed for seed in both if same_text(texts[seed], their_texts[seed])]
    found = difference(*({seed: of[seed] for seed in row.paired[key]} for of in (readings, theirs)))
    if found is not None:
        row.differences[key] = found
    left_out = len(both) - len(row.paired[key])
    return Counter({f"trained on other text than {arm}: not compared": left_out} if left_out else {})


def _by_seed(found: Found, key: str) -> dict[int, Reading]:
    return {trial.seed: m.readings[key] for trial, _, m in found if m is not None and key in m.readings}


def write(table: Table, directory: Path) -> list[Path]:
    """Write table.json and table.csv (one line per cell). Each write is atomic."""
    paths = [directory / "table.json", directory / "table.csv"]
    write_text(paths[0], json.dumps(table.report(), indent=1) + "\n")
    write_text(paths[1], _csv(table))
    return paths


def _row_report(row: Row) -> dict[str, Any]:
    return {
        "condition": row.condition,
        "arm": row.arm,
        "seeds": {str(seed): run_status.status for seed, run_status in row.statuses.items()},
        "parameters": row.parameters,
        "tokens": row.tokens,
        "measured": {
            key: _estimate(found) | {"by_seed": {str(seed): v for seed, v in row.values[key].items()}}
            for key, found in row.levels.items()
        },
        "difference": {
            key: _estimate(found) | {"interval_95": found.half_width, "apart": apart(found)}
            for key, found in row.differences.items()
        },
        "notes": row.notes,
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    return {"value": found.value, "standard_error": found.standard_error, "over": found.over, "n": found.observations}


def _csv(table: Table) -> str:
    names = [
        "condition",
        "arm",
        "column",
        "value",
        "standard_error",
        "over",
        "n",
        "difference",
        "difference_standard_error",
        "difference_interval_95",
        "apart",
        "note",
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in table.rows:
        for column in table.columns:
            own, other = row.levels.get(column.key), row.differences.get(column.key)
            writer.writerow(
                [
                    row.condition,
                    row.arm,
                    column.key,
                    *(_estimate(own).values() if own else ("",) * 4),
                    *((other.value, other.standard_error, other.half_width, apart(other)) if other else ("",) * 4),
                    row.notes.get(column.key, ""),
                ]
            )
    return text.getvalue()
