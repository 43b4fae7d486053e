"""The table of a sweep, from its run directories. Every planned measurement has a row, finished or not."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bst_dist.study.evaluation.trained import open_run, open_validation
from bst_dist.study.runs.recipes import Job
from bst_dist.study.runs.results import Result, read_result
from bst_dist.study.runs.state import State
from bst_dist.study.sweep.design import Run
from bst_dist.study.sweep.table import Row
from bst_dist.train.rundir import read_recipe


def collect(runs: list[Run], state: State, baseline: str, documents: int = 0) -> list[Row]:
    """Return the rows of the measurements among `runs`, in the order of the plan.

    If `documents` > 0, finished runs are also scored on this many first tokens of each validation document.
    """
    base = {run.cell.stratum: run.counts.parameters for run in runs if run.cell.architecture == baseline}
    return [
        row_of(known_columns(run, base.get(run.cell.stratum, math.nan)), run, state, documents)
        for run in runs
        if run.multiple is not None
    ]


def known_columns(run: Run, base: float = math.nan) -> dict[str, Any]:
    """Return the columns that are known before the run is trained; `base` is N of the baseline in its stratum."""
    counts, cell = run.counts, run.cell
    return {
        "run": run.name,
        "trunk": run.trunk or run.name,
        **asdict(cell),
        "stratum": cell.stratum,
        "width": run.recipe.model.width,
        "learning_rate": run.recipe.optimizer.learning_rate,
        "tokens_per_parameter": run.multiple,
        "parameters": counts.parameters,
        "ln_n_over_baseline": math.log(counts.parameters / base),
        "parameters_total": counts.total,
        "parameters_non_embedding": counts.non_embedding,
        "parameters_matrices": counts.matrices,
        "parameters_kernel": counts.kernel,
        "flops_per_token": counts.flops_per_token,
    }


def row_of(known: dict[str, Any], run: Job, state: State, documents: int = 0) -> Row:
    """Return the row of one measurement; `known` are its columns from `known_columns`."""
    run_status = state.status_of(run)
    known = {**known, "status": run_status.status, "reason": run_status.reason}
    if run_status.status != "done":
        return Row(**known)
    measured = _measured(run, known["parameters"], state)
    if not math.isfinite(measured["loss_nats"]):
        return Row(**known | {"status": "diverged", "reason": f"its validation loss is {measured['loss_nats']}"})
    if documents:
        measured["loss_by_document"] = state.cached(
            "documents",
            run.name,
            f"first-{documents}",
            measured["corpora"],
            lambda: _by_document(state.directory(run.name), documents),
        )
    return Row(**known, **measured)


def _measured(run: Job, parameters: float, state: State) -> dict[str, Any]:
    """Return the measured columns of a finished run. The times include the steps shared with its trunk."""
    directory = state.directory(run.name)
    result = read_result(directory)
    shared = read_result(state.directory(run.trunk)).until(run.recipe.branch.step) if run.trunk else None
    return {
        "tokens": result.tokens,
        "flops": 6 * parameters * result.tokens,
        "loss_nats": result.final["loss_nats"],
        "bits_per_byte": result.final["bits_per_byte"],
        "loss_by_block": result.final["loss_by_block"],
        "time_s": result.time_s() + (shared.time_s() if shared else 0.0),
        "step_time_excess": _step_time_excess(_step_s(shared) if shared else [], _step_s(result)),
        "micro_sequences": read_recipe(directory).train.micro_sequences,
        "corpora": result.corpora,
        "versions": result.versions,
    }


def _step_s(result: Result) -> list[float]:
    return [line["step_time_s"] for line in result.warm]


def _step_time_excess(shared: list[float], own: list[float]) -> float:
    """Return the column `step_time_excess`.

    Only both parts together show that one of them was slower from end to end.
    """
    parts = (step_s for step_s in (shared, own, shared + own) if step_s)
    return max(float(np.median(step_s) / np.quantile(step_s, 0.1) - 1) for step_s in parts)


def _by_document(run_dir: Path, at_most: int) -> list[float]:
    """Return nats per token on the first `at_most` tokens of each validation document, with a context of one sequence.

    Two runs are compared on the same documents, so the difficulty of a document cancels. The rest shows how much an
    advantage depends on the choice of documents. Raises UserError if the checkpoint or the corpus cannot be read.
    """
    from bst_dist.study.evaluation.scoring import score  # it needs scipy, which a packed folder does not have

    trained = open_run(run_dir)
    length, losses = trained.recipe.train.sequence_length, []
    for corpus in open_validation(trained):
        scored = score(
            trained.model,
            corpus,
            np.minimum(corpus.lengths, at_most),
            corpus.token_bytes(),
            begin=trained.begin(corpus),
            context=length,
            slice_length=length,
            precision=trained.recipe.train.precision,
        )
        losses += (scored.nats / scored.tokens).tolist()
    return losses
