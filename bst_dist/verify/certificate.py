"""The results of the ranks for every combination, as lines of a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.ranks import Ranks
from bst_dist.verify.cause import likely_cause
from bst_dist.verify.grid import Combination, Grid, axes_in_common
from bst_dist.verify.judge import ErrorLimits, Finding, judge
from bst_dist.verify.reference import one_process
from bst_dist.verify.step import distributed_step

HEADER = (
    f"{'model':<6} {'prec.':<5} {'strategy':<18} {'dp x sp':<7} {'checkpointing':<15} {'micro':>5} {'slices':>6}  "
    f"{'loss':>7}  {'norm':>7}  {'error':>7} {'allowed':>7}  {'verdict':<7}  worst parameter"
)


@dataclass(frozen=True)
class Line:
    """The verdict on one combination."""

    combination: Combination
    world: int
    finding: Finding
    """The finding of the rank with the largest error."""
    rank: int
    cause: str
    """The likely cause of the error; empty if the combination passes."""

    def __str__(self) -> str:
        how, found = self.combination, self.finding
        mesh = f"{self.world // how.sp} x {how.sp}"
        return (
            f"{how.model:<6} {how.precision:<5} {how.strategy:<18} {mesh:<7} {how.checkpointing:<15} "
            f"{how.accumulation:>5} {how.slices:>6}  {found.loss_error:>7.1e}  {found.norm_error:>7.1e}  "
            f"{found.error:>7.1e} {found.allowed:>7.1e}  {'PASS' if found.passed else 'FAIL':<7}  {found.parameter}"
        )

    def report(self) -> dict[str, Any]:
        """Return all values as a dictionary for a file; errors are relative."""
        found = asdict(self.finding)
        return {
            **self.combination.describe(),
            "passed": self.finding.passed,
            "cause": self.cause,
            "rank": self.rank,
            **found,
        }


def certify(grid: Grid, ranks: Ranks) -> Iterator[Line]:
    """Yield the line of each combination, the same on all ranks. All ranks must call it."""
    groups = {sp: Mesh(ranks.world, ranks.rank, sp).sp_group() for sp in sorted({c.sp for c in grid.combinations})}
    limits: dict[tuple[str, str], ErrorLimits] = {}
    for combination in grid.combinations:
        key = (combination.model, combination.precision)
        if key not in limits:
            limits[key] = ranks.broadcast_object(_limits(grid, combination) if ranks.first else None)
        step = distributed_step(combination.apply(grid.small, grid.world), ranks, groups[combination.sp])
        findings = ranks.all_gather_object(judge(step, limits[key]))
        worst = max(range(len(findings)), key=lambda rank: findings[rank].severity)
        agree = max(found.severity for found in findings) <= 2 * min(found.severity for found in findings) + 1
        cause = "" if findings[worst].passed else likely_cause(combination, grid.world, findings[worst], agree)
        yield Line(combination, grid.world, findings[worst], worst, cause)


def explain(lines: Sequence[Line]) -> str:
    """Describe the failures: the combination, the parameter, the likely cause, and what the failures share."""
    failed = [line for line in lines if not line.finding.passed]
    first, found = failed[0], failed[0].finding
    how = first.combination
    told = [
        f"{len(failed)} of {len(lines)} combinations compute another gradient than one process does.",
        f"first: {how.model}, {how.precision}, {how.strategy}, dp {first.world // how.sp} x sp {how.sp}, checkpointing "
        f"{how.checkpointing}, {how.accumulation} micro-batches, {how.slices} slices, on rank {first.rank}",
        f"parameter: {found.parameter} is off by {found.error:.2g}, allowed {found.allowed:.2g} "
        f"({len(found.wrong)} parameters are)",
        f"likely cause: {first.cause}",
    ]
    passed = [line.combination for line in lines if line.finding.passed]
    shared = [f"{axis} {value}" for axis, value in axes_in_common([line.combination for line in failed], passed)]
    if passed and shared:
        told.append(f"every failure has {', '.join(shared)}, and nothing that passed has")
    return "\n".join(told)


def _limits(grid: Grid, combination: Combination) -> ErrorLimits:
    recipe = replace(combination, slices=1).apply(grid.small, grid.world)
    rows = recipe.train.sequences
    rounded = [one_process(recipe, combination.precision, micro_rows) for micro_rows in (1, rows)]
    return ErrorLimits.of(one_process(recipe, "fp64", rows), rounded)
