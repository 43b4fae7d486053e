"""The run directory: everything one run has written; enough to resume, compare and cite it.

recipe.yaml       the resolved recipe
ds_config.json    the completed DeepSpeed configuration
environment.json  versions, hosts and ranks, one entry a start
metrics.jsonl     one JSON object a line
tensorboard/      the same, as events
checkpoints/      step-00000100/ and so on
outcome.json      how the last start ended; absent while it runs or when it was cut short
"""

from __future__ import annotations

import difflib
import json
import time
from pathlib import Path
from typing import Any

from bst_dist.config import Recipe, differing
from bst_dist.train.checkpoint import CHECKPOINTS, committed
from bst_dist.version import versions
from data_pipeline.atomic import atomic_file
from data_pipeline.config import dump, load
from data_pipeline.errors import UserError

RECIPE, DS_CONFIG, ENVIRONMENT, OUTCOME = "recipe.yaml", "ds_config.json", "environment.json", "outcome.json"

FOLLOWING_RANKS = ("train_batch_size", "gradient_accumulation_steps")


class RunDirectoryError(UserError):
    """A run directory that this run must not write to."""


def check(run_dir: Path, recipe: Recipe, completed: dict[str, Any], resume: bool) -> None:
    """Raise RunDirectoryError unless the run may start, or go on, in `run_dir`; nothing is written.

    Refused are another recipe or DeepSpeed configuration, checkpoints without `resume`, and a directory that holds
    something else than a run.
    """
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / RECIPE).exists():
        raise RunDirectoryError(f"{run_dir}: not empty and not a run (no {RECIPE}): choose another with --run-dir")
    if found := differing(load(Recipe, run_dir / RECIPE), recipe):
        raise RunDirectoryError(_listed(f"{run_dir}: holds another run; recipe there, recipe given:", found))
    stored = run_dir / DS_CONFIG
    if stored.exists() and (found := _changed(json.loads(stored.read_text()), completed)):
        raise RunDirectoryError(_listed(f"{run_dir}: holds a run with another DeepSpeed configuration:", found))
    if not resume and (held := committed(run_dir)):
        raise RunDirectoryError(
            f"{run_dir}: already has checkpoints, up to {held[0].name}: "
            "go on from there with --resume, or start anew in another --run-dir"
        )


def prepare(run_dir: Path, recipe: Recipe, completed: dict[str, Any], start: dict[str, Any]) -> None:
    """Write what the run is made of, before its first step; rank 0 only.

    `start` describes this start (ranks, hosts, the step it begins at) and is added to environment.json.
    """
    (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    (run_dir / OUTCOME).unlink(missing_ok=True)
    environment = run_dir / ENVIRONMENT
    starts = json.loads(environment.read_text())["starts"] if environment.exists() else []
    starts.append({"time": _now(), "versions": versions(), **start})
    _write(run_dir / RECIPE, dump(recipe))
    _write(run_dir / DS_CONFIG, json.dumps(completed, indent=2) + "\n")
    _write(environment, json.dumps({"starts": starts}, indent=2) + "\n")


def finish(run_dir: Path, outcome: dict[str, Any]) -> None:
    """Record that this start came to its end."""
    _write(run_dir / OUTCOME, json.dumps({"time": _now(), **outcome}, indent=2) + "\n")


def read_outcome(run_dir: Path) -> dict[str, Any] | None:
    """What `finish` wrote, or None when the last start did not come to its end."""
    path = run_dir / OUTCOME
    return json.loads(path.read_text()) if path.exists() else None


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _changed(stored: dict[str, Any], completed: dict[str, Any]) -> list[str]:
    """The lines in which two DeepSpeed configurations differ, but for what follows from the number of ranks."""
    texts = []
    for one in (stored, completed):
        kept = {key: value for key, value in one.items() if key not in FOLLOWING_RANKS}
        texts.append(json.dumps(kept, indent=1, sort_keys=True).splitlines())
    lines = list(difflib.unified_diff(*texts, "there", "given", n=0, lineterm=""))[2:]
    return [f"{line[0]} {line[1:].strip()}" for line in lines if not line.startswith("@@")]


def _listed(head: str, lines: list[str], most: int = 8) -> str:
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([head, *(f"  {line}" for line in lines[:most]), *more])
