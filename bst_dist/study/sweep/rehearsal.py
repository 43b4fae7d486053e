"""The whole analysis on simulated rows, before training: a failure shows before the GPU hours are spent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.advantage import compare
from bst_dist.study.laws.law import Law
from bst_dist.study.laws.scaling import fit_laws
from bst_dist.study.sweep.collect import known_columns
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.design import Run
from bst_dist.study.sweep.table import Row, observations

LAW = Law(E=1.0, A=30.0, alpha=0.25, B=30.0, beta=0.25)
"""A law of the simulated losses. Its values do not matter, only that losses fall with size and length."""


class RehearsalError(UserError):
    """The analysis of the runs of a plan would fail."""


def rehearse(sweep: SweepConfig, runs: Sequence[Run]) -> None:
    """Raise RehearsalError if the comparison or the law fit would fail on the table of these runs."""
    observed = observations(simulate(sweep, runs))
    comparison = compare(observed, sweep.baseline, sweep.arm)
    if comparison.missing:
        told = "\n".join(f"  {name}: {why}" for name, why in comparison.missing.items())
        raise RehearsalError(f"the plan was analysed with simulated losses; no verdict could be given:\n{told}")
    # The baseline alone is enough: the other architectures have points at the same sizes and lengths.
    for name, laws in fit_laws(
        [o for o in observed if o.architecture == sweep.baseline], None, sweep.arm, 2
    ).architectures.items():
        if not any(fitted.law for fitted in laws.fits):
            why = laws.fits[0].why_not
            raise RehearsalError(f"with simulated losses of this plan no law could be fitted to {name}: {why}")


def simulate(sweep: SweepConfig, runs: Sequence[Run], seed: int = 0, gaps: dict[str, float] | None = None) -> list[Row]:
    """Return rows like those of `collect`, all done, with losses from LAW and the noise of the sweep's settings.

    `gaps`: architecture -> its advantage, in ln of the loss.
    """
    generator, level = np.random.default_rng(seed), {}
    common = sweep.noise.seed * np.sqrt(1 - sweep.noise.within)
    rows = []
    for run in (run for run in runs if run.multiple is not None):
        trunk, cell = run.trunk or run.name, run.cell
        if trunk not in level:
            level[trunk] = generator.normal(0, common)
        noise = level[trunk] + generator.normal(0, sweep.noise.seed * np.sqrt(sweep.noise.within))
        exact = LAW.loss(np.array(run.counts.parameters), np.array(float(run.tokens)))
        loss = float(exact * np.exp(noise - (gaps or {}).get(cell.architecture, 0.0)))
        rows.append(
            Row(
                **known_columns(run),
                status="done",
                tokens=run.tokens,
                flops=run.flops,
                loss_nats=loss,
                bits_per_byte=loss / 2,
                time_s=run.flops / 1e9,
            )
        )
    return rows
