"""The run directory: all files that one run writes. They are enough to resume, compare and cite the run.

recipe.yaml       the resolved recipe
ds_config.json    the completed DeepSpeed configuration
environment.json  versions, hosts and ranks, one entry per start
metrics.jsonl     one JSON object per line; metrics.dropped.jsonl: lines of steps that were taken again after a resume
tensorboard/      the same metrics as events, and measurements inside the model
ledger.jsonl      steps that the guard rejected, changes of settings, resumes from local copies
profile/, stacks/ traces of profiled steps, and the stacks of ranks that hung
checkpoints/      step-00000100/ and so on
lease/            which start trains in this directory now, and the token in the name of its local copies
outcome.json      how the last start ended; absent while it runs or when it was killed
tokenizer.*       the tokenizer of the corpus: the run can be moved, and generates and exports without the corpus
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bst_base.clock import utc_now
from bst_base.errors import UserError, nearest
from bst_base.files import atomic_file
from bst_base.settings import dump
from bst_dist.checkpoint.directory import CHECKPOINTS
from bst_dist.config import Recipe, load_recipe
from bst_dist.version import versions
from data_pipeline.format.tokenizer import FILES as TOKENIZERS
from data_pipeline.format.tokenizer import Tokenizer

RECIPE, DS_CONFIG, ENVIRONMENT, OUTCOME = "recipe.yaml", "ds_config.json", "environment.json", "outcome.json"
FROM_COPIES = "from_local_copies"
"""Key in a start's entry of environment.json: the local copies that it resumed from, if not from a checkpoint."""


def read_recipe(run_dir: Path) -> Recipe:
    """Return the resolved recipe of a run; raises UserError when the directory has none."""
    if not (run_dir / RECIPE).is_file():
        near = nearest_run(run_dir)
        hint = f"did you mean {near}?" if near else "by default a run is in runs/<name>"
        raise UserError(f"{run_dir}: no run there ({RECIPE} is missing); {hint}")
    return load_recipe(run_dir / RECIPE, base=Path.cwd())  # base: for old recipes without `paths_from`


def nearest_run(given: Path) -> Path | None:
    """Return the run beside `given` with the most similar name; None if no name is similar."""
    runs = [path.name for path in sorted(given.parent.glob("*")) if path != given and (path / RECIPE).is_file()]
    name = nearest(given.name, runs)
    return given.parent / name if name else None


def prepare(
    run_dir: Path, recipe: Recipe, completed: dict[str, Any], start: dict[str, Any], tokenizer: Tokenizer | None = None
) -> None:
    """Write the recipe, the DeepSpeed configuration, the environment and the tokenizer; rank 0, before the first step.

    `start` describes this start (ranks, hosts, first step); it is appended to environment.json. `tokenizer`: the one
    of the run's text, if it has text.
    """
    (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    (run_dir / OUTCOME).unlink(missing_ok=True)
    starts = [*read_starts(run_dir), {"time": utc_now(), "versions": versions(), **start}]
    _write(run_dir / RECIPE, dump(recipe))
    _write(run_dir / DS_CONFIG, json.dumps(completed, indent=2) + "\n")
    _write(run_dir / ENVIRONMENT, json.dumps({"starts": starts}, indent=2) + "\n")
    if tokenizer is not None:
        with atomic_file(run_dir / tokenizer.file) as file:
            file.write(tokenizer.model)


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of environment.json, one per start; none when the run was never started here."""
    path = run_dir / ENVIRONMENT
    return json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []


def require_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Like `read_starts`; raises UserError when there are none."""
    if not (starts := read_starts(run_dir)):
        raise UserError(
            f"{run_dir}: was never started ({ENVIRONMENT} is missing), like imported weights: name a run that trained"
        )
    return starts


def finish(run_dir: Path, outcome: dict[str, Any]) -> None:
    """Write outcome.json: how this start ended."""
    _write(run_dir / OUTCOME, json.dumps({"time": utc_now(), **outcome}, indent=2) + "\n")


def read_outcome(run_dir: Path) -> dict[str, Any] | None:
    """Return what `finish` wrote, or None when the last start is still running or was killed."""
    path = run_dir / OUTCOME
    return json.loads(path.read_text()) if path.exists() else None


def closing(outcome: dict[str, Any], steps: int, until: int = 0) -> str:
    """Return the last printed line of a start: why it ended.

    `steps`: of the whole run. `until`: the step after which the start was to stop, if no signal stopped it.
    """
    step, asked = outcome["step"], f"--until {until}"
    if "stopped" in outcome:
        asked = "Ctrl-C, SIGINT" if outcome["stopped"] == "SIGINT" else outcome["stopped"]
    elif step >= steps:
        return f"finished: all {steps:,} steps are done"
    elif step > until:
        return f"nothing was trained: step {step} is past {asked} already"
    return f"stopped after step {step} ({asked}): --resume continues from there"


def own_tokenizer(run_dir: Path) -> Path | None:
    """Return the tokenizer file in a run directory; None when there is none and only the corpus has it."""
    return next((run_dir / name for name in TOKENIZERS if (run_dir / name).is_file()), None)


def tokenizer_of(run_dir: Path) -> str | None:
    """Return the SHA-256 of the tokenizer that a run was trained with; None when the run did not record it."""
    if own := own_tokenizer(run_dir):
        return hashlib.sha256(own.read_bytes()).hexdigest()
    starts = read_starts(run_dir)
    return starts[-1].get("tokenizer_sha256") if starts else None


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
