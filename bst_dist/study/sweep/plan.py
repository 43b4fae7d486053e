"""The plan of a sweep: which runs of the grid fit the budget, at which measured speed. It is fixed when written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bst_base.files import write_json
from bst_dist.study.laws.power import Noise, Power, detectable_in_standard_errors, pairs_needed, predict
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.design import Designer, Run
from bst_dist.study.sweep.price import cost, fit_budget
from bst_dist.study.sweep.soundness import planned_gaps, require_sound

PLAN, RATES = "plan.json", "speed.json"


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep, their cost and the power of the comparison."""

    sweep: SweepConfig
    runs: list[Run]
    """In training order; each trunk before its branches."""
    dropped: list[str]
    """Strata dropped to fit the budget."""
    spent: float
    limit: float
    unit: str

    @property
    def measured(self) -> list[Run]:
        """The runs that are measurements: all except the trunks."""
        return [run for run in self.runs if run.multiple is not None]

    def power(self) -> list[Power]:
        """Return the power of the rule for one variant, over each factor, from simulated studies."""
        noise = Noise(self.sweep.noise.seed, self.sweep.noise.within)
        return predict(planned_gaps(self.runs, self.sweep.baseline, self.sweep.arm), noise)

    def pairs_needed(self, power: Sequence[Power]) -> dict[str, int | None]:
        """Return for each factor the number of pairs with 80 % power to detect a change as large as the margin.

        None if no number would be enough.
        """
        detectable = detectable_in_standard_errors(planned_gaps(self.runs, self.sweep.baseline, self.sweep.arm))
        return {p.factor: pairs_needed(p.pairs, p.standard_error, detectable[p.factor]) for p in power}


def make_plan(sweep: SweepConfig) -> Plan:
    """Design the grid, refuse it if it is unsound, and fit it into the budget.

    A written plan keeps its dropped strata: a speed measured later does not change a sweep that has begun.
    """
    designer = Designer(sweep)
    runs = designer.runs(designer.cells())
    require_sound(runs, sweep.baseline, sweep.arm)
    spent, limit, unit = cost(sweep.budget, read_rates(sweep))
    held = _read(sweep)
    if held is None:
        fitted = fit_budget(runs, spent, limit, sweep.noise, sweep.baseline, sweep.arm, unit)
        runs, dropped, total = fitted.runs, fitted.dropped, fitted.spent
    else:
        dropped = held["dropped"]
        runs = [run for run in runs if run.cell.stratum not in dropped]
        total = sum(map(spent, runs))
    return Plan(sweep, runs, dropped, total, limit, unit)


def write_plan(plan: Plan) -> None:
    """Write the dropped strata. They stay fixed as long as the sweep's settings stay the same."""
    write_json(plan.sweep.root / PLAN, {"settings": _identity(plan.sweep), "dropped": plan.dropped})


def read_rates(sweep: SweepConfig) -> dict[str, float]:
    """Read the training FLOP/s by shape; empty if nothing was measured."""
    path = sweep.root / RATES
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_rates(sweep: SweepConfig, rates: dict[str, float]) -> None:
    """Write the speeds for this and later plans."""
    write_json(sweep.root / RATES, rates)


def _read(sweep: SweepConfig) -> dict[str, Any] | None:
    path = sweep.root / PLAN
    if not path.exists():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    return held if held["settings"] == _identity(sweep) else None


def _identity(sweep: SweepConfig) -> str:
    settings = sweep.model_dump(mode="json", exclude={"directory", "retries", "order"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
