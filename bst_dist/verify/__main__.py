"""The program of each rank, started by `bst verify`: ``python -m bst_dist.verify JOB FOUND``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path


def main(job: Path, found: Path) -> int:
    """Verify the grid that `job` describes. Rank 0 prints the table and writes the certificate to `found`."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    began = time.perf_counter()
    from bst_dist.parallel.ranks import Ranks

    ranks = Ranks()
    from bst_dist.verify.certificate import HEADER, certify, explain
    from bst_dist.verify.command import grid_of

    grid = grid_of(argparse.Namespace(**json.loads(job.read_text())))
    if ranks.first:
        print(HEADER, flush=True)
    lines = []
    for line in certify(grid, ranks):
        lines.append(line)
        if ranks.first:
            print(line, flush=True)
    passed = all(line.finding.passed for line in lines)
    if ranks.first:
        report = {
            "passed": passed,
            "ranks": ranks.world,
            "seconds": time.perf_counter() - began,
            "recipe": grid.small.model_dump(mode="json"),
            "explanation": "" if passed else explain(lines),
            "combinations": [line.report() for line in lines],
        }
        found.write_text(json.dumps(report))
    ranks.leave()
    return 0


if __name__ == "__main__":
    try:
        status = main(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # after an error other ranks may wait in a collective, and destroying the group would hang
