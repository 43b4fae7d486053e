"""Detects whether a launcher has started several copies of a command that should run once."""

from __future__ import annotations

import os
from collections.abc import Mapping

from bst_base.errors import UserError

COUNTS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
"""Environment variables in which launchers give the number of started processes. SLURM_NTASKS is missing on purpose: a
batch script has it too, and runs once."""


def copies(environ: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Return how many processes a launcher has started, and a text that names the launcher and the variable."""
    for name, launcher in COUNTS.items():
        if (count := environ.get(name, "")).isdigit() and int(count) > 1:
            return int(count), f"{launcher} has started {count} processes ({name}={count})"
    if environ.get("PMIX_RANK", "0") not in ("", "0"):
        return int(environ["PMIX_RANK"]) + 1, f"a launcher has started several (PMIX_RANK={environ['PMIX_RANK']})"
    return 1, ""


def require_single_process(what: str, instead: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise UserError when there are several copies of this process, each of which would do all of `what`."""
    count, said = copies(environ)
    if count > 1:
        raise UserError(f"{said}, and each would {what}: {instead}")
