"""The registered rule, applied to the diagnostics: whether each prediction holds. diagnostics.py uses this module."""

from __future__ import annotations

from collections.abc import Iterator

import copying
import numpy as np
from registered import Experiment
from scipy import stats

P1_MOST, LEARNT, P3_LEAST, P9_MOST = 0.08, 0.5, 0.125, 0.1


def decisions(experiments: list[Experiment]) -> Iterator[str]:
    yield "### By the registered rule"
    yield ""
    sizes = {
        "small": [e for e in experiments if e.name.startswith("small")],
        "small, six more seeds": [e for e in experiments if e.name.startswith("seeds")],
        "full size": [e for e in experiments if e.name in ("unigram", "copy")],
    }
    for size, own in sizes.items():
        lines = [*_copying(own), *_unigram(own)]
        yield from [f"- {size}, {line}" for line in lines] or [f"- {size}: no condition is whole."]
    for judge, name in ((reach_verdict, "reach"), (copying_by_states, "states-copy"), (recall, "states-recall")):
        yield from (f"- small, {judge(e)}" for e in experiments if e.name == name)
    yield ""


def _copying(experiments: list[Experiment]) -> Iterator[str]:
    """Yield the decisions on P1 to P3, each over all its conditions with all runs done."""
    every = [(e, c) for e in experiments if e.name.endswith("copy") for c in e.settings["conditions"]]
    cells = [(e, c) for e, c in every if e.rows(c)]
    if not cells:
        return
    hidden = [(e, c) for e, c in cells if e.hidden(c)]
    seen = [(e, c) for e, c in cells if not e.hidden(c)]
    all_hidden = sum(e.hidden(c) for e, c in every)
    yield _judged(
        "P1",
        [
            (c, arm, value <= P1_MOST, value)
            for e, c in hidden
            for arm in ("sliding", "no-ssm")
            for value in e.by_seed(c, arm)
        ],
        missing=all_hidden - len(hidden),
    )
    yield _judged(
        "P2",
        [(c, "sliding", v > LEARNT, v) for e, c in seen for v in e.by_seed(c, "sliding")],
        missing=len(every) - all_hidden - len(seen),
    )
    yield _judged(
        "P3",
        [(c, "bst-sh", v > P3_LEAST, v) for e, c in cells for v in e.by_seed(c, "bst-sh")],
        missing=len(every) - len(cells),
    )


def _judged(name: str, cells: list[tuple[str, str, bool, float]], what: str = "runs", missing: int = 0) -> str:
    """Return the decision on a prediction; `missing`: conditions that it is about and that are not whole."""
    if not cells:
        return f"**{name}**: no condition that it is about is whole."
    against = [f"{condition}, {arm}: {value:.3f}" for condition, arm, holds, value in cells if not holds]
    verdict = "does not hold" if against else "undecided" if missing else "holds"
    return (
        f"**{name}** {verdict}: {len(cells) - len(against)} of {len(cells)} {what} are as predicted"
        + (f"; against it {'; '.join(against)}" if against else "")
        + (f"; conditions with missing runs: {missing}." if missing else ".")
    )


def _unigram(experiments: list[Experiment]) -> Iterator[str]:
    """Yield the decisions on P4 and P5 (by the ratio of each seed's advantages at 8 and 2 layers) and P6 (by means)."""
    for e in (e for e in experiments if e.name.endswith("unigram")):
        whole = [c for c in e.settings["conditions"] if e.rows(c)]
        gains = {
            c: np.subtract(e.by_seed(c, "sliding", "loss_nats"), e.by_seed(c, "bst-sh", "loss_nats")) for c in whole
        }
        if {"2 layers", "8 layers"} <= set(gains):
            yield f"**P4, P5**: {ratio_verdict(gains['2 layers'], gains['8 layers'])}"
            yield difference(gains["2 layers"] - gains["8 layers"])
        behind = [
            c
            for c in whole
            if e.rows(c)["no-ssm"]["measured"]["loss_nats"]["value"]
            < e.rows(c)["bst-sh"]["measured"]["loss_nats"]["value"]
        ]
        if whole:
            yield (
                f"**P6** {'does not hold' if behind else 'holds'}: the means of {len(whole) - len(behind)} of "
                f"{len(whole)} depths are as predicted."
            )


def ratio_verdict(shallow: np.ndarray, deep: np.ndarray) -> str:
    """Return the decision by the interval of the mean ratio of advantages at 8 and 2 layers, each (seeds,).

    Below 1/4 P5 holds, above 1/2 P4 holds. The rule does not say what a ratio means if there is no advantage at 2
    layers: then nothing is decided.
    """
    if shallow.mean() <= 0:
        return (
            f"undecided. `bst-sh` has no advantage at 2 layers ({shallow.mean():+.4f} nats per label in the mean, "
            f"{deep.mean():+.4f} at 8), so a ratio of advantages means nothing."
        )
    ratios = deep / shallow
    mean = float(ratios.mean())
    half = float(stats.t.ppf(0.975, len(ratios) - 1) * ratios.std(ddof=1) / np.sqrt(len(ratios)))
    low, high = mean - half, mean + half
    answer = "P5 holds" if high < 0.25 else "P4 holds" if low > 0.5 else "undecided"
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return (
        f"{answer}. The advantage at 8 layers over that at 2 is {each} by seed, {mean:.2f} in the mean (95 % "
        f"interval {low:.1f} to {high:.1f})."
    )


def difference(falls: np.ndarray) -> str:
    """Return a sentence about the advantage at 2 layers minus that at 8; `falls` is (seeds,).

    The difference may be significant where the ratio, with its small denominator, is not. It is not part of the rule.
    """
    low, high = copying.interval(falls)
    return (
        f"the advantage at 2 layers minus that at 8, which the rule does not ask for, is {falls.mean():+.4f} nats "
        f"per label in the mean (95 % interval {low:+.3f} to {high:+.3f})."
    )


def reach_verdict(experiment: Experiment) -> str:
    """Decide P7: whether windows learn to copy within their reach, with more steps and at one of the rates."""
    rates = experiment.settings["conditions"]
    if not all(experiment.rows(rate) for rate in rates):
        return "**P7**: not all runs that it is about are done."
    found = {rate: experiment.by_seed(rate, "sliding") for rate in rates}
    learnt = [value > LEARNT for values in found.values() for value in values]
    answer = (
        "holds"
        if any(min(values) > LEARNT for values in found.values())
        else "depends on the seed"
        if any(learnt)
        else "does not hold"
    )
    each = "; ".join(f"{rate}: {', '.join(f'{value:.3f}' for value in values)}" for rate, values in found.items())
    return f"**P7** {answer}: accuracy of `sliding` by seed, {each}."


def copying_by_states(experiment: Experiment) -> str:
    """Decide P8: Gated DeltaNet learns lag 32 in each run, and its mean accuracy at lag 64 is above that of BST-SH."""
    cells = []
    for condition in (c for c in experiment.settings["conditions"] if experiment.rows(c)):
        found = experiment.by_seed(condition, "gated-deltanet")
        if experiment.of(condition, "data.synthetic.lag") == 32:
            cells += [(condition, "gated-deltanet", value > LEARNT, value) for value in found]
        else:
            ahead = float(np.mean(found) - np.mean(experiment.by_seed(condition, "bst-sh")))
            cells.append((condition, "gated-deltanet minus bst-sh", ahead > 0, ahead))
    return _judged("P8", cells, "runs and means")


def recall(experiment: Experiment) -> str:
    """Decide P9: Gated DeltaNet learns recall in each run, and BST-SH is on average at most P9_MOST above windows."""
    cells = []
    for condition in (c for c in experiment.settings["conditions"] if experiment.rows(c)):
        learnt = experiment.by_seed(condition, "gated-deltanet")
        cells += [(condition, "gated-deltanet", value > LEARNT, value) for value in learnt]
        ahead = float(np.mean(np.subtract(*(experiment.by_seed(condition, arm) for arm in ("bst-sh", "sliding")))))
        cells.append((condition, "bst-sh minus sliding", ahead <= P9_MOST, ahead))
    return _judged("P9", cells, "runs and means")
