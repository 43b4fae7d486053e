"""`bst eval --harness`: tasks of EleutherAI's lm-evaluation-harness on a run's model.

The harness calls the model directly (`harness/model.py`), with the run's own tokenizer. It is an optional dependency,
because it requires about thirty further packages.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table
from bst_dist.extras import install_hint
from bst_dist.study.evaluation.trained import open_run, tokenizer_of
from bst_dist.study.statistics import Estimate

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


class HarnessError(UserError):
    """The harness is not installed, or a task failed."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError(install_hint("lm_eval"))
    trained = open_run(args.run, args.checkpoint, args.precision, args.averaged)
    tokenizer = tokenizer_of(args.run, trained.recipe)
    import lm_eval  # its dependencies take a second to import

    from bst_dist.study.harness.model import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every metric that uses default settings
    started = time.perf_counter()
    manager = _manager(args.harness_tasks, args.harness)
    require_known(manager.all_tasks, args.harness)
    try:
        found = lm_eval.simple_evaluate(
            model=HarnessModel(trained, tokenizer),
            tasks=args.harness,
            task_manager=manager,
            limit=args.limit,
            num_fewshot=args.fewshot,
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as error:  # any type: it may come from a task's data, template or code
        raise HarnessError(f"the harness could not do {', '.join(args.harness)}: {_first_line(error)}") from error
    tasks, version, time_s = tasks_of(found), lm_eval.__version__, time.perf_counter() - started
    _show(tasks, f"{args.run} after {trained.step:,} steps; lm-evaluation-harness {version}")
    return {
        "run": str(args.run),
        "step": trained.step,
        "harness": version,
        "tasks": [task.report() for task in tasks],
        "time_s": time_s,
    }


def _manager(own_tasks: Path | None, names: list[str]) -> TaskManager:
    """Return a manager of the tasks in a directory and, if `names` has others, of all tasks of the harness."""
    from lm_eval.tasks import TaskManager

    if own_tasks is None:
        return TaskManager()
    if not any(own_tasks.rglob("*.yaml")):
        raise HarnessError(f"--harness-tasks {own_tasks}: no task there (no .yaml file)")
    own = TaskManager(include_path=str(own_tasks), include_defaults=False)
    if set(names) <= set(own.all_subtasks):
        return own
    return TaskManager(include_path=str(own_tasks))  # reads thousands of files


def require_known(known: Sequence[str], names: Sequence[str]) -> None:
    """Raise HarnessError for the first unknown name, with similar names."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise HarnessError(
                f"--harness {name}: no task of that name. {hint}Tasks of your own are YAML files in a directory: "
                "--harness-tasks DIR; those of the harness are listed by: lm_eval ls tasks"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)


@dataclass(frozen=True)
class Task:
    """A task or task group of the harness, and its metrics by name, with standard errors if the harness gives them."""

    name: str
    fewshot: int | None
    examples: int | None
    metrics: dict[str, Estimate]

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report."""
        metrics = {key: value for name, found in self.metrics.items() for key, value in found.report(name).items()}
        return {"task": self.name, "fewshot": self.fewshot, "examples": self.examples, "metrics": metrics}


def tasks_of(found: dict[str, Any]) -> list[Task]:
    """Convert the results of the harness."""
    tasks = []
    for name, values in found["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, comma, of_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{of_filter}")
            shown = metric if of_filter == "none" else f"{metric} ({of_filter})"
            metrics[shown] = Estimate(float(value), float(error) if isinstance(error, (int, float)) else None)
        count = found["n-samples"].get(name, {}).get("effective")
        tasks.append(Task(name, found["n-shot"].get(name), count, metrics))
    return tasks


def _show(tasks: Sequence[Task], title: str) -> None:
    rows = []
    for task in tasks:
        about = [task.name, *("" if value is None else str(value) for value in (task.fewshot, task.examples))]
        for metric, found in task.metrics.items():
            error = found.standard_error
            rows.append([*about, metric, _number(found.value), "" if error is None else _number(error)])
            about = ["", "", ""]
    print_table(Sheet(("task", "shots", "examples", "metric", "value", "standard error"), rows), title)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
