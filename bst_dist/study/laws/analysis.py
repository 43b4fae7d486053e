"""The statistics of a table, as reports for machines: what `fit` and `compare` print and `report` draws."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws import isoflop, uncertainty
from bst_dist.study.laws.fit import Fit, FitError, fit
from bst_dist.study.laws.gap import Axis, Gaps, pair
from bst_dist.study.laws.joint import fit_shared, shared_e_p_value
from bst_dist.study.laws.law import Points
from bst_dist.study.laws.reach import compare_reach
from bst_dist.study.laws.regression import RegressionError
from bst_dist.study.laws.table import Row, points
from bst_dist.study.laws.verdict import MARGIN, crossing_flops, gain_slope, judge, mean_gap

OBJECTIVES = {"huber": 1e-3, "lad": 0.0}


def fit_report(rows: list[Row], baseline: str, draws: int = 200) -> dict[str, Any]:
    """Laws of every architecture, their uncertainty and their cross-checks; one E for those that see equally far."""
    every = points(rows)
    laws = {str(name): _laws_of(every.take(every.group == name), rows, draws) for name in np.unique(every.group)}
    report: dict[str, Any] = {"points": len(every), "runs": len(np.unique(every.run)), "architectures": laws}
    reaches = [compare_reach(rows, name, baseline) for name in laws if name != baseline]
    tested = [reach for reach in reaches if reach is not None]
    report["reach"] = {reach.architecture: {**asdict(reach), "equal": reach.equal} for reach in tested}
    report["shared_E"] = _shared(every, [baseline, *(reach.architecture for reach in tested if reach.equal)], draws)
    return report


def _shared(every: Points, names: list[str], draws: int) -> dict[str, Any]:
    """One irreducible loss for the baseline and the architectures found to see as far as it does."""
    if len(names) < 2:
        return {"not_fitted": "no architecture was found to see as far as the baseline does, and no further"}
    own = every.take(np.isin(every.group, names))
    try:
        joint = fit_shared(own)
        p_value = shared_e_p_value(own, draws=max(9, draws // 5))
    except FitError as error:
        return {"not_fitted": str(error)}
    return {"laws": {name: asdict(law) for name, law in joint.laws.items()}, "p_value": p_value}


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
            "by_document": _by_document(rows, gaps.variant, baseline),
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
            lost = float(np.log(tried[1.0] / tried[best]))
            found.append({
                "architecture": row.architecture, "block": row.block, "loss_nats_by_factor": tried,
                "best_factor": best, "lost": lost, "passed": lost <= MARGIN,
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
    """Mean gap by block of the sequence; empty when arms differ in blocks."""
    gaps = _gaps_by(rows, variant, baseline, "loss_by_block")
    return [] if len({len(gap) for gap in gaps}) != 1 else np.mean(gaps, axis=0).tolist()


def _by_document(rows: list[Row], variant: str, baseline: str) -> dict[str, float]:
    """The mean gap over documents, each counted once, its standard error over them, and how many are above 0."""
    gaps = _gaps_by(rows, variant, baseline, "loss_by_document")
    if not gaps or len({len(gap) for gap in gaps}) != 1 or len(gaps[0]) < 2:
        return {}
    each = np.mean(gaps, axis=0)
    error = float(each.std(ddof=1) / np.sqrt(len(each)))
    return {
        "documents": len(each),
        "mean": float(each.mean()),
        "standard_error": error,
        "better": int((each > 0).sum()),
    }


def _gaps_by(rows: list[Row], variant: str, baseline: str, column: str) -> list[np.ndarray]:
    """Gaps by the parts of a column, a pair of runs of the same block and length asked for an entry."""
    done = [row for row in rows if row.status == "done" and row.role == "grid" and getattr(row, column)]
    base = {(row.block, row.tokens_per_parameter): row for row in done if row.architecture == baseline}
    return [
        np.log(np.divide(getattr(base[key], column), getattr(row, column)))
        for row in done
        if row.architecture == variant and (key := (row.block, row.tokens_per_parameter)) in base
    ]


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
