"""The run directory: everything one run has written; enough to resume, compare and cite it.

recipe.yaml       the resolved recipe
ds_config.json    the completed DeepSpeed configuration
environment.json  versions, hosts and ranks, one entry a start
metrics.jsonl     one JSON object a line; metrics.dropped.jsonl: those of steps that were taken again after a resume
tensorboard/      the same as events, and what was seen inside the model
ledger.jsonl      steps that the guard has not taken
profile/, stacks/ traces of steps, and where the ranks stood when they hung
checkpoints/      step-00000100/ and so on
lease/            which start trains there now, and what its local copies are named by
outcome.json      how the last start ended; absent while it runs or when it was cut short
tokenizer.*       of the corpus, so that the run can be moved, and generates and exports without the corpus
"""

from __future__ import annotations

import difflib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_base.files import atomic_file
from bst_base.settings import dump
from bst_dist.checkpoint.directory import CHECKPOINTS
from bst_dist.config import Recipe, load_recipe
from bst_dist.version import versions
from data_pipeline.format.tokenizer import FILES as TOKENIZERS
from data_pipeline.format.tokenizer import Tokenizer

RECIPE, DS_CONFIG, ENVIRONMENT, OUTCOME = "recipe.yaml", "ds_config.json", "environment.json", "outcome.json"
FROM_COPIES = "from_local_copies"
"""In a start's entry: the local copies that it resumed from, where it was no checkpoint."""


def read_recipe(run_dir: Path) -> Recipe:
    """The resolved recipe of a run; raises UserError when the directory holds none."""
    if not (run_dir / RECIPE).is_file():
        near = nearest(run_dir)
        hint = f"did you mean {near}?" if near else "by default a run is in runs/<name>"
        raise UserError(f"{run_dir}: no run there ({RECIPE} is missing); {hint}")
    return load_recipe(run_dir / RECIPE, base=Path.cwd())  # what those that do not say meant, before they said it


def nearest(given: Path) -> Path | None:
    """The run beside `given` whose name is most like it."""
    runs = [path.name for path in sorted(given.parent.glob("*")) if path != given and (path / RECIPE).is_file()]
    return next((given.parent / name for name in difflib.get_close_matches(given.name, runs, n=1)), None)


def prepare(
    run_dir: Path, recipe: Recipe, completed: dict[str, Any], start: dict[str, Any], tokenizer: Tokenizer | None = None
) -> None:
    """Write what the run is made of, before its first step; rank 0 only.

    `start` describes this start (ranks, hosts, the step it begins at) and is added to environment.json; `tokenizer` is
    that of its text.
    """
    (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    (run_dir / OUTCOME).unlink(missing_ok=True)
    environment = run_dir / ENVIRONMENT
    starts = json.loads(environment.read_text())["starts"] if environment.exists() else []
    starts.append({"time": _now(), "versions": versions(), **start})
    _write(run_dir / RECIPE, dump(recipe))
    _write(run_dir / DS_CONFIG, json.dumps(completed, indent=2) + "\n")
    _write(environment, json.dumps({"starts": starts}, indent=2) + "\n")
    if tokenizer is not None:
        with atomic_file(run_dir / tokenizer.file) as file:
            file.write(tokenizer.model)


def finish(run_dir: Path, outcome: dict[str, Any]) -> None:
    """Record that this start came to its end."""
    _write(run_dir / OUTCOME, json.dumps({"time": _now(), **outcome}, indent=2) + "\n")


def read_outcome(run_dir: Path) -> dict[str, Any] | None:
    """What `finish` wrote, or None when the last start did not come to its end."""
    path = run_dir / OUTCOME
    return json.loads(path.read_text()) if path.exists() else None


def closing(outcome: dict[str, Any], steps: int, asked: str = "") -> str:
    """The last line of a start of a run of `steps` steps: why it ended. `asked`: what asked for an end before all of
    them, where no signal did."""
    if "stopped" in outcome:
        asked = "Ctrl-C, SIGINT" if outcome["stopped"] == "SIGINT" else outcome["stopped"]
    elif outcome["step"] >= steps:
        return f"finished: all {steps:,} steps are done"
    return f"stopped after step {outcome['step']} ({asked}): --resume continues from there"


def own_tokenizer(run_dir: Path) -> Path | None:
    """The tokenizer's file in a run directory; None when the run has only its corpus's."""
    return next((run_dir / name for name in TOKENIZERS if (run_dir / name).is_file()), None)


def tokenizer_of(run_dir: Path) -> str | None:
    """SHA-256 of the tokenizer that a run's text was made into tokens with; None when it has not written that down."""
    if own := own_tokenizer(run_dir):
        return hashlib.sha256(own.read_bytes()).hexdigest()
    environment = run_dir / ENVIRONMENT
    starts = json.loads(environment.read_text())["starts"] if environment.exists() else []
    return starts[-1].get("tokenizer_sha256") if starts else None


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
