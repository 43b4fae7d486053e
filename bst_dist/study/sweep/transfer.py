"""The coordinate check of a sweep's architectures, as it is kept beside the sweep."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bst_base.files import atomic_file
from bst_dist.study.report.words import plain
from bst_dist.study.statistics import Estimate
from bst_dist.study.sweep.coordinates import Coordinate

FILE = "coordinates.json"


@dataclass(frozen=True)
class Check:
    """What was tried, and every slope."""

    parametrisation: str
    widths: list[int]
    depths: list[int]
    steps: int
    rate: float
    """Share of the peak rate."""
    architectures: dict[str, list[Coordinate]]

    @property
    def answer(self) -> str:
        """passed: no change depends on the width or the depth; failed: one does; undecided: more seeds would tell."""
        answers = {one.answer for found in self.architectures.values() for one in found}
        return "failed" if "different" in answers else "undecided" if "undecided" in answers else "passed"

    def report(self) -> dict[str, Any]:
        """For machines."""
        found = plain(self)
        for name, every in self.architectures.items():
            for one, entry in zip(every, found["architectures"][name], strict=True):
                entry["answer"] = one.answer
        return {"passed": self.answer == "passed", "answer": self.answer, **found}


def write(check: Check, root: Path) -> None:
    """Keep a check in the sweep's directory."""
    root.mkdir(parents=True, exist_ok=True)
    with atomic_file(root / FILE) as file:
        file.write(json.dumps(check.report(), indent=2).encode() + b"\n")


def read(root: Path) -> Check | None:
    """The check that was made, if there was one."""
    path = root / FILE
    if not path.exists():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    found = {
        name: [Coordinate(one["watched"], one["along"], {int(k): v for k, v in one["changes"].items()},
                          Estimate(**one["slope"])) for one in every]
        for name, every in held["architectures"].items()
    }  # fmt: skip
    keys = ("parametrisation", "widths", "depths", "steps", "rate")
    return Check(*(held[key] for key in keys), architectures=found)
