"""The report of a sweep: the answer first, then what it rests on, down to every run."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import matplotlib

from bst_base.errors import UserError
from bst_dist.study.laws import verdict
from bst_dist.study.laws.analysis import audit_report, compare_report, fit_report, gaps_of
from bst_dist.study.laws.law import Law
from bst_dist.study.laws.table import Row
from bst_dist.study.report.document import Block, Heading, Items, Paragraph, Picture, Sheet
from bst_dist.study.report.figures import gap_figure, loss_figure, place_figure
from bst_dist.study.report.plot import STYLE
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.coordinates import SLOPE


def build(sweep: SweepConfig, rows: list[Row], draws: int,
          coordinates: dict[str, Any] | None = None) -> tuple[list[Block], dict[str, Any]]:  # fmt: skip
    """The document's blocks, and all figures in it for machines; raises UserError when no run has finished.

    `coordinates`: what `bst sweep coordinates` found, if it was run.
    """
    report = {
        "flops": compare_report(rows, sweep.baseline, "flops"),
        "time_s": compare_report(rows, sweep.baseline, "time_s"),
        "audit": audit_report(rows),
        "coordinates": coordinates,
        "fit": _fits(rows, sweep.baseline, draws),
    }
    with matplotlib.rc_context(STYLE):
        blocks = [
            Heading(1, f"Sweep {sweep.name}"),
            *_answer(sweep, rows, report),
            *_advantage(sweep, rows, report),
            *_laws(sweep, rows, report),
            *_transfer(coordinates, report["audit"]),
            *_rule(),
            *_runs(rows),
        ]
    return blocks, report


def _fits(rows: list[Row], baseline: str, draws: int) -> dict[str, Any]:
    try:
        return fit_report(rows, baseline, draws)
    except UserError as error:
        return {"not_fitted": str(error)}


def _answer(sweep: SweepConfig, rows: list[Row], report: dict[str, Any]) -> Iterator[Block]:
    counts = Counter(row.status for row in rows)
    yield Paragraph(
        f"{len(rows)} measurements were planned: " + ", ".join(f"{n} {status}" for status, n in counts.items())
        + f". Baseline: {sweep.baseline}. A gap is ln L of the baseline less ln L of the variant, at equal training "
        "FLOPs, in per cent of the loss: above 0 the variant is better."
    )  # fmt: skip
    lines = [_sentence(name, change) for name, found in report["flops"]["variants"].items()
             for change in found["changes"]]  # fmt: skip
    if "undecided" in report["flops"]:
        lines.append(f"Undecided: {report['flops']['undecided']}.")
    yield Items(lines or ["Undecided: no pair of runs has finished."])
    yield from _reservations(counts, report)


def _reservations(counts: Counter[str], report: dict[str, Any]) -> Iterator[Block]:
    """What the reader of a verdict must know with it."""
    if unfinished := counts["waiting"] + counts["running"]:
        yield Paragraph(f"{unfinished} measurements have not finished: a verdict that is read before the end is wrong "
                        "more often than its p value says.")  # fmt: skip
    if any(not entry["passed"] for entry in report["audit"]):
        yield Paragraph("The audit of the learning rate does not pass, so a change with depth or compute may be one of "
                        "how well the rate suits.")  # fmt: skip
    elif not report["audit"]:
        yield Paragraph("No learning rate but the rule's was tried.")


def _sentence(name: str, change: dict[str, Any]) -> str:
    what = {"flops": "compute", "depth": "depth"}[change["factor"]]
    span = f"from {change['from_value']:.3g} to {change['to_value']:.3g}"
    verb = {"grows": "grows with", "shrinks": "shrinks with", "equivalent": "does not change with",
            "undecided": "may or may not change with"}[change["answer"]]  # fmt: skip
    more = f"; undecided, {change['more_pairs']} more pairs of runs are needed" if change["more_pairs"] else ""
    return (f"The advantage of {name} {verb} {what}: {_percent(change['change'])} of the loss {span} "
            f"(95 % interval {_percent(change['low'])} to {_percent(change['high'])}){more}.")  # fmt: skip


def _advantage(sweep: SweepConfig, rows: list[Row], report: dict[str, Any]) -> Iterator[Block]:
    yield Heading(2, "The advantage")
    for axis, label in (("flops", "training FLOPs"), ("time_s", "time of training")):
        if not report[axis]["variants"]:
            continue
        yield Heading(3, f"At equal {label}")
        yield Sheet(
            ("variant", "pairs", "mean gap", "95 % interval", "compute-equivalent gain" if axis == "flops" else "gain"),
            [_mean_row(name, found) for name, found in report[axis]["variants"].items()],
        )
        yield Sheet(
            ("variant", "over", "change", "95 % interval", "p robust", "p permutation", "p, Holm", "p equivalent, Holm",
             "verdict"),
            [_change_row(change) for found in report[axis]["variants"].values() for change in found["changes"]],
        )  # fmt: skip
        every = gaps_of(rows, sweep.baseline, axis)
        where = "all rows of the last table that are done, paired by block"
        yield Picture(f"gap-{axis.removesuffix('_s')}", gap_figure(every, sweep.baseline, axis),
                      f"Advantage of each pair at equal {label}, with means over pairs and their standard errors; the "
                      f"grey band is the margin of equivalence. Runs: {where}.")  # fmt: skip
    for name, found in report["flops"]["variants"].items():
        if by := found["by_document"]:
            yield Paragraph(f"By document, each counted once, the advantage of {name} is {_percent(by['mean'])} ± "
                            f"{by['standard_error']:.2%} over {by['documents']} validation documents; it is above 0 on "
                            f"{by['better']} of them.")  # fmt: skip
    place = place_figure(report["flops"], sweep.baseline)
    if place is not None:
        yield Picture("gap-by-place", place, "Mean advantage by position in the sequence, a point a block; where it "
                      "only appears beyond the window, a longer receptive field is what it is made of.")  # fmt: skip


def _laws(sweep: SweepConfig, rows: list[Row], report: dict[str, Any]) -> Iterator[Block]:
    yield Heading(2, "Scaling laws")
    fits = report["fit"]
    yield Picture("loss", loss_figure(rows, fits), "Validation loss of every branch against its training FLOPs; the "
                  "branches of one trunk are joined, the chosen law of each size is dashed. Runs: all rows of the last "
                  "table that are done.")  # fmt: skip
    if "not_fitted" in fits:
        yield Paragraph(f"No law is fitted: {fits['not_fitted']}.")
        return
    unknowns = ("E", "A", "alpha", "B", "beta", "kappa")
    for name, laws in fits["architectures"].items():
        yield Heading(3, name)
        shown = {key: law for key, law in laws.items() if key.startswith(("chinchilla_", "depth_"))}
        yield Sheet(("form, objective", *unknowns, "error of a shape left out", "error of the largest size"),
                    [_law_row(key, law, unknowns) for key, law in shown.items()])  # fmt: skip
        yield from _identified(name, laws, report)
    yield Heading(3, "One irreducible loss")
    for name, reach in fits["reach"].items():
        verdict_ = "Nothing speaks against equal reach" if reach["equal"] else "They do not see equally far"
        yield Paragraph(f"{verdict_}: from the first block of a sequence to the last the advantage of {name} over "
                        f"{sweep.baseline} changes by {_percent(reach['difference'])} ± {reach['standard_error']:.2%} "
                        f"(p = {reach['p_value']:.3f}).")  # fmt: skip
    shared = fits["shared_E"]
    if "p_value" in shared:
        yield Paragraph(f"One irreducible loss for {' and '.join(shared['laws'])}: p = {shared['p_value']:.2f} of the "
                        "data speaking so much against it.")  # fmt: skip
    else:
        yield Paragraph(f"No law with one irreducible loss is fitted: {shared['not_fitted']}.")


def _identified(name: str, laws: dict[str, Any], report: dict[str, Any]) -> Iterator[Block]:
    """What may be concluded from a law: an optimum where it is identified, local slopes where it is not."""
    reasons = laws.get("not_identified")
    if reasons is None:
        return
    if reasons:
        yield Paragraph("The law is not identified and must not be extrapolated; local slopes stand in its place:")
        slopes = [f"d ln L / d ln {axis} = {s['value']:.4f} (95 % interval {s['low']:.4f} to {s['high']:.4f})"
                  for axis, s in laws["slopes"].items() if isinstance(s, dict)]  # fmt: skip
        yield Items([*slopes, *(f"not identified: {reason}" for reason in reasons)])
        return
    chosen, found = laws[f"{laws['chosen']}_huber"], laws["intervals"]
    law = Law(**{field: chosen[field] for field in Law.__dataclass_fields__})
    lines = [f"{key}: {i['value']:.4g} (95 % interval {i['low']:.4g} to {i['high']:.4g})" for key, i in found.items()]
    for flops in (1e20, 1e22):
        parameters, tokens = law.optimum(flops)
        lines.append(f"at {flops:.0e} FLOPs the optimum is N = {parameters:.3g}, D = {tokens:.3g}")
    if "kappa" in found and found["kappa"]["low"] > 0:
        ratio = found["log_aspect"]
        lines.append(f"best width / depth: {math.exp(ratio['value']):.0f} (95 % interval {math.exp(ratio['low']):.0f} "
                     f"to {math.exp(ratio['high']):.0f})")  # fmt: skip
    if laws.get("isoflop_exponent") is not None:
        lines.append(f"exponent of the optimal N in C by isoFLOP profiles: {laws['isoflop_exponent']:.3f}")
    yield Items(lines)


def _transfer(coordinates: dict[str, Any] | None, audit: list[dict[str, Any]]) -> Iterator[Block]:
    """Whether one learning rate suits all shapes: by how far activations move, and by trying other rates."""
    yield Heading(2, "Does one learning rate hold for all shapes?")
    yield from _coordinates(coordinates)
    yield Heading(3, "Audit of the learning rate")
    if not audit:
        yield Paragraph("None was made: a claim about depth is confounded by the learning rate as far as one rate does "
                        "not suit all depths.")  # fmt: skip
        return
    failed = [entry for entry in audit if not entry["passed"]]
    verdict_ = "passed" if not failed else "not passed: a claim about depth or size is confounded by the rate there"
    yield Paragraph(f"{verdict_.capitalize()}. In {len(audit) - len(failed)} of {len(audit)} corners no other rate "
                    f"tried is better than the rule's by more than {verdict.MARGIN:.1%} of the loss.")  # fmt: skip
    yield Sheet(
        ("architecture", "corner", "loss by factor", "best", "lost by the rule's", "passed"),
        [[entry["architecture"], entry["block"],
          ", ".join(f"{factor:g}: {loss:.4f}" for factor, loss in sorted(entry["loss_nats_by_factor"].items())),
          f"{entry['best_factor']:g}", f"{entry['lost']:.2%}", "yes" if entry["passed"] else "no"] for entry in audit],
    )  # fmt: skip


def _coordinates(found: dict[str, Any] | None) -> Iterator[Block]:
    yield Heading(3, "Coordinate check")
    if found is None:
        yield Paragraph("None was made: `bst sweep coordinates` makes it.")
        return
    failed = [one for every in found["architectures"].values() for one in every if not one["passed"]]
    count = sum(map(len, found["architectures"].values()))
    widths, depths = (", ".join(map(str, found[key])) for key in ("widths", "depths"))
    yield Paragraph(
        f"{'Passed' if found['passed'] else 'Not passed'}, parametrisation {found['parametrisation']}: after "
        f"{found['steps']} steps at {found['rate']:g} of the peak rate {count - len(failed)} of {count} changes depend "
        f"neither on the width ({widths}) nor on the depth ({depths}): slopes in logarithms within ±{SLOPE}."
    )
    yield Sheet(
        ("architecture", "change of", "along", "by value", "slope", "passed"),
        [[name, one["watched"], one["along"], ", ".join(f"{key}: {v:.3g}" for key, v in one["changes"].items()),
          f"{one['slope']:+.2f} ± {one['standard_error']:.2f}", "yes" if one["passed"] else "no"]
         for name, every in found["architectures"].items() for one in every],
    )  # fmt: skip


def _rule() -> Iterator[Block]:
    yield Heading(2, "The rule")
    for text in inspect.getdoc(verdict).split("\n\n"):
        lines = text.split("\n")
        if lines[0][:1].isdigit():
            items: list[str] = []
            for line in lines:
                items = [*items, line[3:]] if line[:1].isdigit() else [*items[:-1], f"{items[-1]} {line.strip()}"]
            yield Items(items)
        else:
            yield Paragraph(" ".join(lines))


def _runs(rows: list[Row]) -> Iterator[Block]:
    yield Heading(2, "Every run")
    yield Sheet(
        ("run", "status", "role", "width", "N", "tokens", "FLOPs", "loss, nats", "bits/byte", "time, s"),
        [[row.run, row.status, row.role, str(row.width), f"{row.parameters:,.0f}", f"{row.tokens:,}",
          f"{row.flops:.3g}", f"{row.loss_nats:.4f}", f"{row.bits_per_byte:.4f}", f"{row.time_s:.0f}"] for row in rows],
    )  # fmt: skip
    lines = [f"{row.run}: {row.status}: {row.reason}" for row in rows if row.reason]
    if lines:
        yield Items(lines)
    versions = {name: version for row in rows for name, version in row.versions.items()}
    yield Paragraph("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")


def _mean_row(name: str, found: dict[str, Any]) -> list[str]:
    mean, gain = found["mean_gap"], found["log_gain"]["mean"]
    half = 1.96 * gain["standard_error"]
    return [name, str(found["pairs"]), _percent(mean["value"]), f"{_percent(mean['low'])} to {_percent(mean['high'])}",
            f"{math.exp(gain['value']):.3f} ({math.exp(gain['value'] - half):.3f} to "
            f"{math.exp(gain['value'] + half):.3f})"]  # fmt: skip


def _change_row(change: dict[str, Any]) -> list[str]:
    more = f", needs {change['more_pairs']} more pairs" if change["more_pairs"] else ""
    return [change["variant"], change["factor"], _percent(change["change"]),
            f"{_percent(change['low'])} to {_percent(change['high'])}", f"{change['p_robust']:.3f}",
            f"{change['p_permutation']:.3f}", f"{change['p_difference']:.3f}", f"{change['p_equivalence']:.3f}",
            change["answer"] + more]  # fmt: skip


def _law_row(key: str, law: dict[str, Any], unknowns: tuple[str, ...]) -> list[str]:
    name = key.replace("_", ", ")
    if "not_fitted" in law:
        return [f"{name}: {law['not_fitted']}", *[""] * (len(unknowns) + 2)]
    left_out, largest = law.get("left_out_shape_errors") or {}, law.get("largest_size_error")
    mean = "" if not left_out or "not_fitted" in left_out else f"{sum(left_out.values()) / len(left_out):.2%}"
    return [name, *(f"{law[u]:.4g}" for u in unknowns), mean, f"{largest:.2%}" if isinstance(largest, float) else ""]


def _percent(value: float) -> str:
    return f"{100 * value:+.2f} %"
