"""The statistics of a table, as reports for machines: what `fit` and `compare` print and `report` draws."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from bst_dist.sweep import isoflop, uncertainty
from bst_dist.sweep.fit import Fit, FitError, fit
from bst_dist.sweep.gap import Axis, Gaps, pair
from bst_dist.sweep.joint import fit_shared, shared_e_p_value
from bst_dist.sweep.law import Points
from bst_dist.sweep.regression import RegressionError
from bst_dist.sweep.table import Row, points
from bst_dist.sweep.verdict import MARGIN, crossing_flops, gain_slope, judge, mean_gap
from data_pipeline.errors import UserError

OBJECTIVES = {"huber": 1e-3, "lad": 0.0}


def fit_report(rows: list[Row], draws: int = 200) -> dict[str, Any]:
    """Laws of every architecture, their uncertainty and their cross-checks."""
    every = points(rows)
    laws = {str(name): _laws_of(every.take(every.group == name), rows, draws) for name in np.unique(every.group)}
    report: dict[str, Any] = {"points": len(every), "runs": len(np.unique(every.run)), "architectures": laws}
    try:
        joint = fit_shared(every)
        p_value = shared_e_p_value(every, draws=max(9, draws // 5))
        report["shared_E"] = {"laws": {name: asdict(law) for name, law in joint.laws.items()}, "p_value": p_value}
    except FitError as error:
        report["shared_E"] = {"not_fitted": str(error)}
    return report


def compare_report(rows: list[Row], baseline: str, axis: Axis, draws: int = 999) -> dict[str, Any]:
    """The advantage of every other architecture over the baseline, and the verdicts, at equal `axis`."""
    variants = list(dict.fromkeys(row.architecture for row in rows if row.architecture != baseline))
    every, missing = [], {}
    for name in variants:
        try:
            every.append(pair(rows, name, baseline, axis))
        except UserError as error:
            missing[name] = str(error)
    report: dict[str, Any] = {"baseline": baseline, "axis": axis, "margin": MARGIN, "variants": {}, "missing": missing}
    try:
        changes = judge(every, draws)
    except RegressionError as error:
        return report | {"undecided": str(error)}
    for gaps in every:
        own = [change for change in changes if change.variant == gaps.variant]
        mean, error, low, high = mean_gap(gaps)
        report["variants"][gaps.variant] = {
            "pairs": len(np.unique(gaps.block)),
            "points": len(gaps),
            "mean_gap": {"value": mean, "standard_error": error, "low": low, "high": high},
            "changes": [asdict(change) for change in own],
            "log_gain": {key: dict(zip(("value", "standard_error"), pair_, strict=True))
                         for key, pair_ in gain_slope(gaps).items()},
            "crossing_flops": next((crossing_flops(gaps, c) for c in own if c.factor == "flops"), None),
            "by_place": _by_place(rows, gaps.variant, baseline),
            "left_out": list(gaps.left_out),
        }  # fmt: skip
    return report


def audit_report(rows: list[Row]) -> list[dict[str, Any]]:
    """For each corner and architecture of the audit: the losses by learning rate, and whether the rule's is best.

    The rule's rate passes when no other one is better by more than the margin of the comparison.
    """
    found = []
    for row in (row for row in rows if row.role == "grid"):
        tried = {
            other.rate_factor: other.loss_nats
            for other in rows
            if other.status == "done"
            and (other.architecture, other.block) == (row.architecture, row.block)
            and other.tokens_per_parameter == row.tokens_per_parameter
        }
        if len(tried) > 1 and 1.0 in tried:
            best = min(tried, key=tried.__getitem__)
            found.append({
                "architecture": row.architecture, "block": row.block, "loss_nats_by_factor": tried,
                "best_factor": best, "passed": bool(np.log(tried[1.0] / tried[best]) <= MARGIN),
            })  # fmt: skip
    return found


def _laws_of(own: Points, rows: list[Row], draws: int) -> dict[str, Any]:
    """Both forms under both objectives; uncertainty and cross-checks of the form that predicts best."""
    report: dict[str, Any] = {"slopes": _try(lambda: {k: asdict(v) for k, v in uncertainty.local_slopes(own).items()})}
    fits: dict[str, Fit] = {}
    for form in ("chinchilla", "depth"):
        for objective, delta in OBJECTIVES.items():
            try:
                found = fit(own, form, delta)
            except FitError as error:
                report[f"{form}_{objective}"] = {"not_fitted": str(error)}
                continue
            report[f"{form}_{objective}"] = {**asdict(found.law), "objective": found.value}
            if objective == "huber":
                fits[form] = found
    errors = {}
    for form, found in fits.items():
        left_out = _try(lambda found=found: uncertainty.leave_one_shape_out(own, found))
        held = _try(lambda found=found: uncertainty.hold_out_largest(own, found))
        report[f"{form}_huber"] |= {"left_out_shape_errors": left_out, "largest_size_error": held}
        if "not_fitted" not in left_out:
            errors[form] = float(np.mean(list(left_out.values())))
    if errors:
        form = min(errors, key=errors.__getitem__)
        report["chosen"] = form
        report |= _trusted(fits[form], own, rows, draws)
    return report


def _trusted(chosen: Fit, own: Points, rows: list[Row], draws: int) -> dict[str, Any]:
    found = uncertainty.intervals(chosen, uncertainty.bootstrap(chosen, own, draws))
    held = [r for r in rows if r.role == "hold-out" and r.status == "done" and r.architecture == own.group[0]]
    predicted = {
        r.run: float(chosen.law.loss(r.parameters, r.tokens, r.width / r.depth) / r.loss_nats - 1) for r in held
    }
    profiles = isoflop.profiles(own)
    return {
        "intervals": {name: asdict(interval) for name, interval in found.items()},
        "not_identified": uncertainty.unidentified(found, own),
        "held_out_relative_errors": predicted,
        "isoflop_exponent": isoflop.exponent(profiles),
        "isoflop_optima": [{"flops": p.flops, "parameters": p.optimum} for p in profiles],
    }


def _by_place(rows: list[Row], variant: str, baseline: str) -> list[float]:
    """Mean gap by block of the sequence, over pairs of the same length asked for; empty when arms differ in blocks."""
    base = {(r.block, r.tokens_per_parameter): r for r in rows if r.architecture == baseline and _measured(r)}
    gaps = [
        np.log(np.divide(base[key].loss_by_block, row.loss_by_block))
        for row in rows
        if row.architecture == variant and _measured(row) and (key := (row.block, row.tokens_per_parameter)) in base
    ]
    return [] if len({len(gap) for gap in gaps}) != 1 else np.mean(gaps, axis=0).tolist()


def _measured(row: Row) -> bool:
    return row.status == "done" and row.role == "grid" and len(row.loss_by_block) > 0


def _try(make: Any) -> Any:
    try:
        return make()
    except UserError as error:
        return {"not_fitted": str(error)}


def gaps_of(rows: list[Row], baseline: str, axis: Axis) -> list[Gaps]:
    """The gaps of every other architecture that has a finished pair."""
    found = []
    for name in dict.fromkeys(row.architecture for row in rows if row.architecture != baseline):
        try:
            found.append(pair(rows, name, baseline, axis))
        except UserError:
            continue
    return found
