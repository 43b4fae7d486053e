"""All fits to a set of losses: a law for each architecture, its uncertainty and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from bst_dist.study.laws import isoflop, uncertainty
from bst_dist.study.laws.fit import Fit, FitError, fit
from bst_dist.study.laws.joint import MARGIN, e_difference, fit_shared
from bst_dist.study.laws.law import FORMS, FormName, Law, Points
from bst_dist.study.laws.observation import Observation, grid, points
from bst_dist.study.laws.receptive_field import ReceptiveField, compare_receptive_fields
from bst_dist.study.laws.regression import RegressionError
from bst_dist.study.laws.uncertainty import Interval, LackOfFit
from bst_dist.study.statistics import Equality, Estimate, equality, quantile

T = TypeVar("T")
OBJECTIVES = {"huber": 1e-3, "lad": 0.0}
BUDGETS = (1.0, 10.0, 100.0)
"""Multiples of the largest compute of the points. Optima above it are reported only if the law is identified."""


@dataclass(frozen=True)
class Fitted:
    """One form fitted under one objective."""

    form: FormName
    objective: str
    law: Law | None
    value: float = float("nan")
    """Value of the objective."""
    why_not: str = ""
    shape_error: float | None = None
    """Mean absolute relative error in predicting a shape that was left out."""
    largest_error: float | None = None
    """Mean absolute relative error in predicting the largest size from all smaller sizes."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of one held-out observation."""

    name: str
    parameters: float
    tokens: float
    observed: float
    predicted: Interval
    """95 % interval from the bootstrap of the law, widened by the scatter of single runs."""


@dataclass(frozen=True)
class Optimum:
    """The model with the least loss for a compute budget."""

    flops: float
    parameters: Interval
    tokens: Interval
    width: Interval | None
    """None if the form has no best shape, or none within the shapes tried."""
    depth: Interval | None
    extrapolated: bool
    aspect: float | None = None
    """The width / depth tried nearest to the best one, which N and D hold for; None if the best one was tried, or does
    not matter."""


@dataclass(frozen=True)
class ArchitectureLaws:
    """The laws of one architecture."""

    fits: list[Fitted]
    slopes: dict[str, Estimate]
    chosen: FormName | None = None
    """The form with the least `shape_error`, under Huber's objective."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    non_embedding_alpha: Interval | None = None
    """alpha of the chosen form if N counts only matrices other than embedding and head."""
    not_identified: list[str] = field(default_factory=list)
    """Reasons not to extrapolate the law; see `uncertainty.unidentified`."""
    no_valley: bool = False
    """Whether a form other than chinchilla has no best width / depth within the shapes tried."""
    lack_of_fit: LackOfFit | None = None
    predictions: list[Prediction] = field(default_factory=list)
    optima: list[Optimum] = field(default_factory=list)
    isoflop_exponent: float | None = None

    @property
    def law(self) -> Law | None:
        """The law of the chosen form under Huber's objective."""
        return next((f.law for f in self.fits if f.form == self.chosen and f.objective == "huber"), None)


@dataclass(frozen=True)
class SharedE:
    """Whether architectures have the same irreducible loss."""

    differences: dict[str, Estimate]
    """Architecture -> its E minus the baseline's, as a share of the lowest loss. Only for those with an equal reach."""
    answers: dict[str, Equality]
    laws: dict[str, Law]
    """Laws with one E, for the architectures shown to have the same E."""
    why_not: str = ""


@dataclass(frozen=True)
class Laws:
    points: int
    runs: int
    architectures: dict[str, ArchitectureLaws]
    reach: dict[str, ReceptiveField]
    shared: SharedE


def fit_laws(observed: Sequence[Observation], baseline: str | None, arm: str, draws: int = 200) -> Laws:
    """Fit the laws of every architecture within an arm, with one E for those shown to have the same E."""
    at_rate = [o for o in observed if o.rate_factor == 1 and o.arm == arm]
    ours = grid(at_rate)
    every = points(ours)
    laws = {
        name: _laws_of([o for o in at_rate if o.architecture == name], draws)
        for name in dict.fromkeys(o.architecture for o in ours)
    }
    reach: dict[str, ReceptiveField] = {}
    for name in laws if baseline else ():
        if name != baseline and (found := compare_receptive_fields(ours, name, str(baseline), arm)) is not None:
            reach[name] = found
    shared = _shared(every, baseline, [name for name, r in reach.items() if r.answer == "equal"], draws)
    return Laws(len(every), len(np.unique(every.run)), laws, reach, shared)


def _shared(every: Points, baseline: str | None, names: list[str], draws: int) -> SharedE:
    """Fit one E for the baseline and those of `names` whose E is shown to be equal; all `names` have an equal reach."""
    if not names or baseline is None:
        return SharedE({}, {}, {}, "no architecture was shown to see as far as the baseline and no further")
    try:
        differences = {name: e_difference(every, baseline, name, draws) for name in names}
        answers = {name: equality(difference, MARGIN) for name, difference in differences.items()}
        equal = [name for name, answer in answers.items() if answer == "equal"]
        if not equal:
            return SharedE(differences, answers, {}, "no architecture was shown to have the baseline's E")
        joint = fit_shared(every.take(np.isin(every.group, [baseline, *equal])))
    except FitError as error:
        return SharedE({}, {}, {}, str(error))
    return SharedE(differences, answers, joint.laws)


def _laws_of(observed: Sequence[Observation], draws: int) -> ArchitectureLaws:
    """Fit all forms under both objectives, and compute uncertainty and cross-checks of the form that predicts best."""
    ours = grid(observed)
    own = points(ours)
    slopes = _or_none(lambda: uncertainty.local_slopes(own)) or {}
    fits, kept = [], {}
    for form in FORMS:
        for objective, delta in OBJECTIVES.items():
            try:
                found = fit(own, form, delta)
            except FitError as error:
                fits.append(Fitted(form, objective, None, why_not=str(error)))
                continue
            one = Fitted(form, objective, found.law, found.value)
            if objective == "huber":
                kept[form] = found
                left_out = _or_none(lambda found=found: uncertainty.leave_one_shape_out(own, found))
                one = replace(
                    one,
                    shape_error=float(np.mean(list(left_out.values()))) if left_out else None,
                    largest_error=_or_none(lambda found=found: uncertainty.hold_out_largest(own, found)),
                )
            fits.append(one)
    errors = {f.form: f.shape_error for f in fits if f.shape_error is not None}
    if not errors:
        return ArchitectureLaws(fits, slopes)
    return _trusted(
        ArchitectureLaws(fits, slopes), kept[min(errors, key=lambda form: errors[form])], ours, observed, draws
    )


def _trusted(
    laws: ArchitectureLaws, chosen: Fit, ours: Sequence[Observation], observed: Sequence[Observation], draws: int
) -> ArchitectureLaws:
    own, drawn = points(ours), _or_none(lambda: uncertainty.bootstrap(chosen, points(ours), draws))
    if drawn is None:
        return replace(laws, chosen=chosen.form)
    found = uncertainty.intervals(chosen, drawn)
    reasons = uncertainty.unidentified(found, own)
    return replace(
        laws,
        chosen=chosen.form,
        intervals=found,
        not_identified=reasons,
        non_embedding_alpha=_or_none(lambda: _other_count(chosen, ours, draws)),
        no_valley=chosen.form != "chinchilla" and not _has_best_shape(chosen.form, chosen.law, own),
        lack_of_fit=uncertainty.lack_of_fit(own, chosen),
        predictions=[_prediction(o, chosen, own, drawn) for o in observed if o.held_out and o.usable],
        optima=[
            best
            for times in (BUDGETS if not reasons else BUDGETS[:1])
            if (best := _optimum(times, chosen, own, drawn)) is not None
        ],
        isoflop_exponent=isoflop.exponent(isoflop.profiles(own)),
    )


def _other_count(chosen: Fit, ours: Sequence[Observation], draws: int) -> Interval | None:
    """Return alpha with N counted without embedding and head; None if this count is unknown or N is not in the form."""
    counted = points(ours, "non_embedding")
    if chosen.form == "additive" or not (np.isfinite(counted.parameters).all() and (counted.parameters > 0).all()):
        return None
    again = fit(counted, chosen.form)
    return uncertainty.intervals(again, uncertainty.bootstrap(again, counted, draws))["alpha"]


def _has_best_shape(form: FormName, law: Law, own: Points) -> bool:
    """Whether the law has a best width / depth within the shapes tried."""
    if form == "chinchilla":
        return False
    aspect = np.log(own.width / own.depth)
    width, depth = law.shape_of(own.parameters, _ratio(own))
    with np.errstate(all="ignore"):
        best = np.log(np.median(width / depth))
    return bool(aspect.min() <= best <= aspect.max())


def _ratio(own: Points) -> float:
    """Return N / (width^2 depth) of the points: about 12, plus the share of the vocabulary and the windows."""
    return float(np.exp(np.log(own.parameters / (own.width**2 * own.depth)).mean()))


def _prediction(o: Observation, chosen: Fit, own: Points, drawn: Sequence[Law]) -> Prediction:
    def at(law: Law) -> float:
        return float(law.loss(o.parameters, o.tokens, o.width, o.depth))

    found = uncertainty.interval(at, chosen.law, drawn)
    residuals = np.log(own.loss) - np.log(chosen.predict(own))
    scatter = float(np.std(residuals, ddof=1)) * found.value
    half = quantile(0.975, float("inf")) * scatter
    low, high = (
        found.value - np.hypot(found.value - found.low, half),
        found.value + np.hypot(found.high - found.value, half),
    )
    error = float(np.hypot(found.standard_error, scatter))
    return Prediction(o.name, o.parameters, o.tokens, o.loss, Interval(found.value, error, float(low), float(high)))


def _optimum(times: float, chosen: Fit, own: Points, drawn: Sequence[Law]) -> Optimum | None:
    """Return the optimal N, D and shape for a budget; None for the additive form if it has no best shape."""
    flops, ratio = times * float((6 * own.parameters * own.tokens).max()), _ratio(own)
    shaped = _has_best_shape(chosen.form, chosen.law, own)
    if chosen.form == "additive" and not shaped:
        return None

    def found(of: Callable[[Law], float]) -> Interval:
        return uncertainty.interval(of, chosen.law, drawn)

    logs = np.log(own.width / own.depth)
    tried = (float(logs.min()), float(logs.max()))
    parameters, tokens = (found(lambda law, i=i: law.optimum(flops, ratio, tried)[i]) for i in range(2))
    width = depth = nearest = None
    if chosen.form == "aspect" and not shaped:
        nearest = float(np.exp(chosen.law.best_aspect(*tried)))
    if shaped:
        width, depth = (
            found(lambda law, i=i: float(law.shape_of(law.optimum(flops, ratio, tried)[0], ratio)[i])) for i in range(2)
        )
    return Optimum(flops, parameters, tokens, width, depth, times > 1, nearest)


def _or_none(make: Callable[[], T]) -> T | None:
    try:
        return make()
    except (FitError, RegressionError):
        return None
