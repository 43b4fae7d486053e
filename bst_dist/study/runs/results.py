"""Results of a run, read from the files in its run directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bst_base.json_lines import read_lines
from bst_dist.report.metrics import FILE
from bst_dist.report.warm_up import WARM_UP_STEPS, by_start
from bst_dist.train.rundir import read_starts


@dataclass(frozen=True)
class Result:
    """The metrics of one run."""

    directory: Path
    lines: list[dict[str, Any]]
    """All lines of its metrics file, in order."""

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """One line per training step. Skipped steps are not included."""
        return self._of("train")

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """One line per evaluation during training."""
        return self._of("eval")

    @cached_property
    def performance(self) -> list[dict[str, Any]]:
        """One line per performance report (time by phase of a step, memory)."""
        return self._of("performance")

    @property
    def step(self) -> int:
        """The last step, whether its update was applied or skipped; 0 before the first step."""
        return max((line["step"] for line in [*self.train, *self._of("skipped")]), default=0)

    @cached_property
    def warm(self) -> list[dict[str, Any]]:
        """The lines of all steps but the first ones of each start (WARM_UP_STEPS); all lines if there is no other."""
        return [line for own in self._by_start for line in own[WARM_UP_STEPS:]] or self.train

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation."""
        return self.evaluations[-1]

    @property
    def tokens(self) -> int:
        """Number of tokens trained on, including those of the trunk."""
        return self.train[-1]["tokens"]

    @property
    def step_s(self) -> float:
        """Median step time in seconds."""
        return median(line["step_time_s"] for line in self.warm)

    @property
    def speeds(self) -> tuple[float, float]:
        """Tokens per second: the median over steps and the 90 % quantile. Other programs can only slow a step down."""
        speeds = [line["tokens_per_s"] for line in self.warm]
        return median(speeds), float(np.quantile(speeds, 0.9))

    @property
    def memory_bytes(self) -> int:
        """Largest `memory_bytes` of the performance reports."""
        return max(line["memory_bytes"] for line in self.performance)

    def until(self, step: int) -> Result:
        """Return the metrics up to and including a step."""
        return Result(self.directory, [line for line in self.lines if line["step"] <= step])

    @cached_property
    def step_times(self) -> list[float]:
        """Seconds of each step of `train`. The first ones of a start compile, so they count as long as its median step.

        If a start took no others, they count as long as the run's median step.
        """
        times: list[float] = []
        for own in filter(None, self._by_start):
            warm = [line["step_time_s"] for line in own[WARM_UP_STEPS:]]
            typical = median(warm) if warm else self.step_s
            times += [typical] * (len(own) - len(warm)) + warm
        return times

    def time_s(self) -> float:
        """Return the total time in seconds of `step_times`: without starts, compilation, checkpoints, evaluations."""
        return sum(self.step_times)

    @property
    def versions(self) -> dict[str, str | None]:
        """Versions recorded at its last start."""
        return self._starts[-1]["versions"]

    @property
    def corpora(self) -> str:
        """SHA-256 of each corpus that it was trained on, separated by spaces; empty for a synthetic task."""
        return " ".join(corpus["sha256"] for corpus in self._starts[-1].get("corpora", ()))

    @cached_property
    def _by_start(self) -> list[list[dict[str, Any]]]:
        """The lines of `train`, of each start."""
        return by_start(self.train, self._starts)

    @cached_property
    def _starts(self) -> list[dict[str, Any]]:
        """The entries of environment.json; an empty one if there is no such file."""
        return read_starts(self.directory) or [{}]


def read_result(directory: Path) -> Result:
    """Read the metrics in a run directory; before the first step there are none."""
    return Result(directory, read_lines(directory / FILE))


def trained_with(versions: Iterable[Mapping[str, str | None]]) -> str:
    """Return a sentence with the versions that runs were trained with, and a warning if these differ between runs.

    Args:
        versions: for each run, name -> version; empty for a run that is not trained yet.
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


def shortest_names(directories: Sequence[Path]) -> dict[str, Path]:
    """Return name -> directory, without duplicates. The name is the shortest path suffix that is unique."""
    paths = {path.resolve(): path for path in reversed(directories)}
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(whole.parts[-depth:]): path for whole, path in reversed(paths.items())}
