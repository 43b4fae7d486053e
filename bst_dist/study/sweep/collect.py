"""The table of a sweep, from its run directories: every run that was planned has a row, whatever became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bst_dist.config import load_recipe
from bst_dist.report.metrics import FILE, read_lines
from bst_dist.study.laws.table import Row
from bst_dist.study.runs.state import State
from bst_dist.study.sweep.design import Run
from bst_dist.study.sweep.documents import losses_by_document
from bst_dist.train.rundir import ENVIRONMENT, RECIPE


def collect(runs: list[Run], state: State, documents: int = 0) -> list[Row]:
    """Rows of the measurements among `runs`, in the order of the plan.

    `documents`: score finished runs on so many tokens of each validation document as well; 0: do not.
    """
    return [_row(run, state, documents) for run in runs if run.multiple is not None]


def _row(run: Run, state: State, documents: int) -> Row:
    standing, counts, cell = state.standing(run), run.counts, run.cell
    known = {
        "run": run.name,
        "trunk": run.trunk or run.name,
        "status": standing.status,
        "reason": standing.reason,
        "architecture": cell.architecture,
        "arm": cell.arm,
        "role": cell.role,
        "size": cell.size,
        "depth": cell.depth,
        "width": run.recipe.model.width,
        "seed": cell.seed,
        "learning_rate": run.recipe.optimizer.learning_rate,
        "rate_factor": cell.rate_factor,
        "tokens_per_parameter": run.multiple,
        "block": cell.block,
        "parameters": counts.parameters,
        "parameters_total": counts.total,
        "parameters_non_embedding": counts.non_embedding,
        "parameters_matrices": counts.matrices,
        "parameters_kernel": counts.kernel,
        "flops_per_token": counts.flops_per_token,
    }
    if standing.status != "done":
        return Row(**known)
    by_document = losses_by_document(run, state, documents) if documents else ()
    return Row(**known, **_measured(run, state), loss_by_document=by_document)


def _measured(run: Run, state: State) -> dict[str, Any]:
    """What a finished run's directory says, and its trunk's of the steps they share."""
    directory = state.directory(run.name)
    lines = read_lines(directory / FILE)
    evaluation = next(line for line in reversed(lines) if line["kind"] == "eval")
    own = [line for line in lines if line["kind"] == "train"]
    tokens = own[-1]["tokens"]
    return {
        "tokens": tokens,
        "flops": 6 * run.counts.parameters * tokens,
        "loss_nats": evaluation["loss_nats"],
        "bits_per_byte": evaluation["bits_per_byte"],
        "loss_by_block": evaluation["loss_by_block"],
        "time_s": sum(line["step_time_s"] for line in [*_shared(run, state), *own]),
        "micro_sequences": load_recipe(directory / RECIPE).train.micro_sequences,
        "versions": _versions(directory),
    }


def _shared(run: Run, state: State) -> list[dict[str, Any]]:
    """The steps taken on the trunk."""
    if run.trunk is None:
        return []
    lines = read_lines(state.directory(run.trunk) / FILE)
    return [line for line in lines if line["kind"] == "train" and line["step"] <= run.recipe.branch.step]


def _versions(directory: Path) -> dict[str, str | None]:
    starts = json.loads((directory / ENVIRONMENT).read_text(encoding="utf-8"))["starts"]
    return starts[-1]["versions"]
