"""A command is refused if several copies of it were started, each of which would do all the work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bst_base.errors import UserError
from bst_base.launched import copies, require_single_process


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 1),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1),  # a batch script, which runs once
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"PMI_SIZE": "2"}, 2),
        ({"PMIX_RANK": "0"}, 1),
        ({"PMIX_RANK": "5"}, 6),
    ],
)
def test_number_of_started_copies_is_detected_and_refused(environ, count):
    assert copies(environ)[0] == count
    if count > 1:
        with pytest.raises(UserError, match="and each would train: start one"):
            require_single_process("train", "start one", environ)


COMMANDS = {
    "train": ["-m", "bst_dist.train", "launch/recipes/demo.yaml", "--run-dir", "never-made"],
    "prepare": [
        "-c",
        "import sys; from bst_dist.cli import main; sys.exit(main(sys.argv[1:]))",
        "data",
        "prepare",
        "launch/data/stdlib.yaml",
        "output=never-made",
    ],
}


@pytest.mark.ranks
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_started_several_times_by_srun_are_refused(command):
    srun = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | srun
    done = subprocess.run([sys.executable, *COMMANDS[command]], env=environ, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "srun has started 4 processes (SLURM_STEP_NUM_TASKS=4), and each would" in done.stderr
