"""The likely cause of wrong gradients, derived from what they have in common."""

from __future__ import annotations

from collections.abc import Iterator

from bst_dist.verify.grid import Combination
from bst_dist.verify.judge import Finding

NEAR = 0.03
"""Factors whose relative difference is below this are considered equal."""


def likely_cause(combination: Combination, world: int, finding: Finding, ranks_agree: bool) -> str:
    """Return one sentence that tells where to look for the error."""
    if finding.error != finding.error or finding.loss_error != finding.loss_error:
        return "not a number: an overflow, or memory read before it was written"
    if not ranks_agree:
        return "ranks disagree about the gradient: it is not reduced over all of them, or before all is there"
    if not finding.wrong:
        return "the gradients are right, so the loss or the norm is summed wrongly over ranks when it is reported"
    if finding.rest <= max(finding.allowed_whole, NEAR):
        factors = list(_factors(combination, world, finding.scale))
        return f"every gradient is {finding.scale:.4g} times what it should be{_explained(factors)}"
    if len(finding.wrong) == 1:
        return f"only {finding.wrong[0]} is wrong: look at what is done with it between ranks"
    what = (
        f"{len(finding.wrong)} gradients are wrong; nearest to the loss {finding.wrong[-1]}, whose error others inherit"
    )
    if combination.sp > 1:
        return f"{what}. With sp {combination.sp}, look at the exchanges there and their backward passes"
    return f"{what}. Look there first"


def _factors(combination: Combination, world: int, scale: float) -> Iterator[tuple[str, float]]:
    """Yield the known quantities (sp, dp, ...), or their inverses, that equal the scale."""
    known = {"sp": combination.sp, "dp": world // combination.sp, "ranks": world,
             "micro-batches": combination.accumulation, "slices": combination.slices}  # fmt: skip
    for name, value in known.items():
        for form, factor in ((name, value), (f"1/{name}", 1 / value)):
            if value > 1 and abs(scale / factor - 1) < NEAR:
                yield form, factor


def _explained(factors: list[tuple[str, float]]) -> str:
    names = [name for name, _ in factors]
    if not names:
        return ": a factor that is no number of ranks or micro-batches"
    meanings = {
        "sp": "summed over the ranks of a sequence (is a sequence-parallel unit given to DeepSpeed?)",
        "1/sp": "averaged over the ranks of a sequence, whose losses add up",
        "dp": "summed over data-parallel ranks, where a mean of losses already scaled is meant",
        "1/dp": "averaged twice over data-parallel ranks",
        "ranks": "summed over ranks, where a mean of losses already scaled is meant",
        "1/ranks": "averaged twice over ranks",
        "micro-batches": "multiplied by the micro-batches, whose losses already add up",
        "slices": "multiplied by the slices, whose losses already add up",
        "1/slices": "divided by the slices, whose losses already add up to the mean",
        "1/micro-batches": "divided by the micro-batches, whose losses already add up to the mean",
    }
    return f" = {' = '.join(names)}: {'; or '.join(meanings[name] for name in names)}"
