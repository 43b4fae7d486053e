"""What a run's own files say of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bst_dist.report.metrics import FILE, read_lines
from bst_dist.train.rundir import ENVIRONMENT


@dataclass(frozen=True)
class Result:
    """The metrics of one run."""

    directory: Path
    lines: list[dict[str, Any]]
    """All that it has reported, in order."""

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """A line for each step that was taken."""
        return self._of("train")

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """A line for each evaluation during training."""
        return self._of("eval")

    @cached_property
    def performance(self) -> list[dict[str, Any]]:
        """A line for each report of where the time of a step goes."""
        return self._of("performance")

    @property
    def step(self) -> int:
        """The last step, whether its update was taken or skipped; 0 before the first."""
        return max((line["step"] for line in [*self.train, *self._of("skipped")]), default=0)

    @property
    def warm(self) -> list[dict[str, Any]]:
        """The steps without the first, whose time is that of a start."""
        return self.train[1:] or self.train

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation."""
        return self.evaluations[-1]

    @property
    def tokens(self) -> int:
        """Trained on until the last step, those of a trunk included."""
        return self.train[-1]["tokens"]

    @property
    def step_s(self) -> float:
        """Median time of a step."""
        return median(line["step_time_s"] for line in self.warm)

    @property
    def speeds(self) -> tuple[float, float]:
        """Tokens per second: the median step, and the fastest tenth, since other work can only slow a step."""
        speeds = [line["tokens_per_s"] for line in self.warm]
        return median(speeds), float(np.quantile(speeds, 0.9))

    @property
    def memory_bytes(self) -> int:
        """The most that a rank has held."""
        return max(line["memory_bytes"] for line in self.performance)

    def time_s(self, until: int | None = None) -> float:
        """Time of the steps, up to and with step `until`, without starts, checkpoints and evaluations."""
        return sum(line["step_time_s"] for line in self.train if until is None or line["step"] <= until)

    @property
    def versions(self) -> dict[str, str | None]:
        """Of what its last start ran on."""
        return json.loads((self.directory / ENVIRONMENT).read_text(encoding="utf-8"))["starts"][-1]["versions"]


def read_result(directory: Path) -> Result:
    """The metrics in a run directory; none before the first step."""
    return Result(directory, read_lines(directory / FILE))


def trained_with(versions: Iterable[Mapping[str, str | None]]) -> str:
    """What runs were trained with, in a sentence; and a warning where they were not all trained with the same.

    Args:
        versions: of each run, by name; none of one that is not trained yet.
    """
    runs = [of_run for of_run in versions if of_run]
    names = dict.fromkeys(name for of_run in runs for name in of_run)
    counted = {name: Counter(of_run.get(name) or "unknown" for of_run in runs) for name in names}
    said = [f"{name} {_each(found)}" for name, found in counted.items()]
    several = [name for name, found in counted.items() if len(found) > 1]
    warning = (
        f" Not all runs were trained with the same {' and '.join(several)}: what changed between these is in the "
        "differences too."
    )
    return f"Trained with {', '.join(said)}.{warning if several else ''}" if said else ""


def _each(found: Counter[str]) -> str:
    if len(found) == 1:
        return next(iter(found))
    return " and ".join(f"{version} ({count} run{'s' * (count > 1)})" for version, count in found.most_common())


def named(directories: Sequence[Path]) -> dict[str, Path]:
    """Directories, each once, by the shortest end of their path that tells them apart."""
    paths = {path.resolve(): path for path in reversed(directories)}
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(whole.parts[-depth:]): path for whole, path in reversed(paths.items())}
