"""The report of a sweep: first the answer, then the evidence for it, down to every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib

from bst_base.errors import UserError
from bst_base.terminal import Sheet
from bst_dist.study.laws import audit as rates
from bst_dist.study.laws.advantage import Comparison, compare
from bst_dist.study.laws.audit import Corner, audit
from bst_dist.study.laws.observation import grid
from bst_dist.study.laws.scaling import Laws, fit_laws
from bst_dist.study.laws.verdict import RULE
from bst_dist.study.report import advantage, laws
from bst_dist.study.report.document import Block, Heading, Items, Paragraph, Picture
from bst_dist.study.report.figures import gap_figure, loss_figure, place_figure
from bst_dist.study.report.formatting import number, percent, power
from bst_dist.study.report.style import STYLE
from bst_dist.study.runs.results import trained_with
from bst_dist.study.sweep.caveats import caveats, counted
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.coordinates import SLOPE, Check
from bst_dist.study.sweep.table import Row, observations


@dataclass(frozen=True)
class Findings:
    """All results from a sweep's table. They are also the machine-readable report."""

    flops: Comparison
    time_s: Comparison
    audit: list[Corner]
    coordinates: Check | None
    laws: Laws | None
    why_no_laws: str = ""


def find(sweep: SweepConfig, rows: Sequence[Row], draws: int, coordinates: Check | None = None) -> Findings:
    """Compute the statistics of a sweep's table; `coordinates` is the result of `bst sweep coordinates`, if any."""
    observed = observations(list(rows))
    fitted, why = None, ""
    try:
        fitted = fit_laws(observed, sweep.baseline, sweep.arm, draws)
    except UserError as error:
        why = str(error)
    return Findings(
        compare(observed, sweep.baseline, sweep.arm),
        compare(observed, sweep.baseline, sweep.arm, "time_s"),
        audit(observed),
        coordinates,
        fitted,
        why,
    )


def blocks(sweep: SweepConfig, rows: Sequence[Row], found: Findings) -> list[Block]:
    """Return the blocks of the document."""
    with matplotlib.rc_context(STYLE):
        return [
            Heading(1, f"Sweep {sweep.name}"),
            *_answer(sweep, rows, found),
            *_advantage(found),
            *_laws(sweep, rows, found),
            *_transfer(found),
            *_rule(),
            *_runs(rows),
        ]


def _answer(sweep: SweepConfig, rows: Sequence[Row], found: Findings) -> Iterator[Block]:
    yield from advantage.answer(found.flops)
    yield Paragraph(
        f"{counted(rows)}. The advantage is ln L({sweep.baseline}) − ln L(variant) at equal training FLOPs, in percent "
        f"of the loss; a positive value means that the variant is better. Verdicts use arm {sweep.arm} only."
    )
    yield from caveats(rows, found.audit)


def _advantage(found: Findings) -> Iterator[Block]:
    yield Heading(2, "Advantage")
    for comparison in (found.flops, found.time_s):
        if not comparison.variants:
            continue
        label = advantage.EQUAL[comparison.axis]
        yield Heading(3, f"At equal {label}")
        if comparison.axis == "time_s":
            yield Paragraph(
                "Training times can only be compared when nothing else ran on the machine; otherwise there "
                "is no verdict here."
            )
            if comparison.missing:
                yield Items(advantage.not_judged(comparison))
        yield from advantage.tables(comparison)
        yield Picture(
            f"gap-{comparison.axis.removesuffix('_s')}",
            gap_figure(comparison),
            f"Advantage at equal {label} in arm {comparison.arm}. Lines with 95 % bands: the regression of "
            "the rule, one line per depth. Small marks: measurements, joined within a pair. Hollow marks: "
            "held-out runs. Grey band: the equivalence margin.",
        )
        yield from advantage.held_out(comparison)
    place = place_figure(found.flops)
    if place is not None:
        yield Picture(
            "gap-by-place",
            place,
            "Mean advantage by position in the sequence, one point per block, with "
            "95 % intervals over pairs. An advantage that only appears beyond the window comes from a longer "
            "receptive field.",
        )


def _laws(sweep: SweepConfig, rows: Sequence[Row], found: Findings) -> Iterator[Block]:
    yield Heading(2, "Scaling laws")
    own = [o for o in observations(list(rows)) if o.arm == sweep.arm]
    if not grid(own):
        yield Paragraph("No run has finished.")
        return
    yield Picture(
        "loss",
        loss_figure(own, found.laws),
        "Validation loss against training FLOPs. Lines join the "
        "training lengths of one run. Dashed: the chosen law for each size. Hollow marks: held-out runs. "
        f"Arm {sweep.arm}.",
    )
    if found.laws is None:
        yield Paragraph(f"No law is fitted: {found.why_no_laws}.")
        return
    yield from laws.blocks(found.laws, sweep.baseline)


def _transfer(found: Findings) -> Iterator[Block]:
    """Yield the evidence that one learning rate suits all shapes: the coordinate check and the audit."""
    yield Heading(2, "Does one learning rate fit all shapes?")
    yield Heading(3, "Coordinate check")
    if found.coordinates is None:
        yield Paragraph("Not run. Run it with `bst sweep coordinates`.")
    else:
        yield from coordinate_blocks(found.coordinates)
    yield Heading(3, "Learning-rate audit")
    yield from audit_blocks(found.audit)


def coordinate_blocks(check: Check) -> Iterator[Block]:
    """Yield the blocks about the coordinate check."""
    every = [(name, one) for name, found in check.architectures.items() for one in found]
    equal = sum(one.answer == "equal" for _, one in every)
    widths, depths = (", ".join(map(str, values)) for values in (check.widths, check.depths))
    yield Paragraph(
        f"Answer: {check.answer}, with parametrisation {check.parametrisation}. After {check.steps} steps at "
        f"{check.rate:g} of the peak learning rate, {equal} of {len(every)} quantities are shown not to depend on the "
        f"width ({widths}) or the depth ({depths}): both one-sided tests put the log-log slope within ±{SLOPE}."
    )
    yield Sheet(
        ("architecture", "quantity", "against", "change by value", "slope", "depends on it"),
        [
            [
                name,
                one.watched,
                one.along,
                ", ".join(f"{key}: {v:.3g}" for key, v in one.changes.items()),
                one.slope.text(2, sign=True),
                {"equal": "no", "different": "yes", "undecided": "undecided"}[one.answer],
            ]
            for name, one in every
        ],
    )


def audit_blocks(corners: Sequence[Corner]) -> Iterator[Block]:
    """Yield the blocks about the audit of the learning rate."""
    if not corners:
        yield Paragraph(
            "Not run. If one learning rate does not fit all depths, a change with depth may be an effect "
            "of the learning rate."
        )
        return
    answers = Counter(corner.answer for corner in corners)
    yield Paragraph(
        f"{answers['passed']} of {len(corners)} corners passed, {answers['failed']} failed, {answers['undecided']} are "
        f"undecided. Passed: a one-sided test at 5 % on a parabola in ln(rate) shows that no tried rate is better than "
        f"the default by {percent(rates.MARGIN, 1, sign=False)} of the loss or more. Failed: some rate is better by "
        "more."
    )
    yield Sheet(
        ("architecture", "corner", "seeds", "loss by factor", "best", "cost of the default rate", "answer"),
        [
            [
                c.architecture,
                c.corner,
                str(c.seeds),
                ", ".join(f"{f:g}: {loss:.4f}" for f, loss in c.losses.items()),
                number(c.best, ".2f") or "no valley",
                _lost(c),
                ": ".join(filter(None, (c.answer, c.why))),
            ]
            for c in corners
        ],
    )


def _lost(corner: Corner) -> str:
    lost = corner.lost
    return "" if lost is None else f"{lost.value:.2%} ± {lost.standard_error:.2%}"


def _rule() -> Iterator[Block]:
    yield Heading(2, "The rule")
    for part in RULE:
        yield Paragraph(part) if isinstance(part, str) else Items(part)


def _runs(rows: Sequence[Row]) -> Iterator[Block]:
    yield Heading(2, "All runs")
    yield Sheet(
        (
            "run",
            "status",
            "role",
            "width",
            "N",
            "ln N − baseline's",
            "tokens",
            "FLOPs",
            "loss, nats",
            "bits/byte",
            "time, s",
        ),
        [
            [
                row.run,
                row.status,
                row.role,
                str(row.width),
                f"{row.parameters:,.0f}",
                number(row.ln_n_over_baseline, "+.4f"),
                f"{row.tokens:,}",
                power(row.flops),
                number(row.loss_nats, ".4f"),
                number(row.bits_per_byte, ".4f"),
                number(row.time_s, ".0f"),
            ]
            for row in rows
        ],
    )
    lines = [f"{row.run}: {row.status}: {row.reason}" for row in rows if row.reason]
    if lines:
        yield Items(lines)
    if with_ := trained_with(row.versions for row in rows):
        yield Paragraph(with_)
