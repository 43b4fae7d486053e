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
        return "the ranks have different gradients: the reduction leaves out ranks, or begins before they are complete"
    if not finding.wrong:
        return "the gradients are correct, so the reported loss or norm is reduced wrongly over ranks"
    if finding.rest <= max(finding.allowed_whole, NEAR):
        factors = list(_factors(combination, world, finding.scale))
        return f"every gradient is {finding.scale:.4g} times what it should be{_explained(factors)}"
    if len(finding.wrong) == 1:
        return f"only the gradient of {finding.wrong[0]} is wrong: check how it is communicated between ranks"
    what = (
        f"{len(finding.wrong)} gradients are wrong; the one nearest to the loss is {finding.wrong[-1]}, and its error "
        "propagates to the others"
    )
    if combination.sp > 1:
        return f"{what}. With sp {combination.sp}, check the communication in that layer and its backward pass"
    return f"{what}. Check that layer first"


def _factors(combination: Combination, world: int, scale: float) -> Iterator[tuple[str, float]]:
    """Yield the known quantities (sp, dp, ...), or their inverses, that equal the scale."""
    known = {
        "sp": combination.sp,
        "dp": world // combination.sp,
        "ranks": world,
        "micro-batches": combination.accumulation,
        "slices": combination.slices,
    }
    for name, value in known.items():
        for form, factor in ((name, value), (f"1/{name}", 1 / value)):
            if value > 1 and abs(scale / factor - 1) < NEAR:
                yield form, factor


def _explained(factors: list[tuple[str, float]]) -> str:
    names = [name for name, _ in factors]
    if not names:
        return ", a factor that matches no number of ranks or micro-batches"
    meanings = {
        "sp": "summed over the ranks that share a sequence (was the sequence-parallel group given to DeepSpeed?)",
        "1/sp": "averaged over the ranks that share a sequence; their losses must be summed",
        "dp": "summed over data-parallel ranks instead of averaged",
        "1/dp": "averaged twice over data-parallel ranks",
        "ranks": "summed over ranks instead of averaged",
        "1/ranks": "averaged twice over ranks",
        "micro-batches": "multiplied by the number of micro-batches; their losses are already scaled",
        "slices": "multiplied by the number of slices; their losses are already scaled",
        "1/slices": "divided twice by the number of slices",
        "1/micro-batches": "divided twice by the number of micro-batches",
    }
    return f" = {' = '.join(names)}: {'; or '.join(meanings[name] for name in names)}"
