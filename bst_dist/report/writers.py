"""Writers named in a recipe (`log.writers`): W&B, MLflow, or a custom class.

A name is a key of WRITERS, a name that an installed package registers in the entry point group GROUP, or
`module:Class`. The class is a `metrics.Writer`. In each start rank 0 creates it as ``Class(run_dir, recipe, about)``;
`about` holds values that are not in the recipe: parameters, ranks. The class is imported only if the recipe names it.

External services may be slow or unavailable. So each writer runs in its own thread: the run does not wait for it. If it
fails, the run prints one message and continues without it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import pkgutil
import queue
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_dist.config import Recipe, flat
from bst_dist.extras import EXTRAS, install_hint
from bst_dist.report.metrics import OF_AVERAGE, ProbeReport, Report, SkippedReport, Writer

GROUP = "bst_dist.writers"
WRITERS = {
    "wandb": "bst_dist.report.weights_and_biases:WeightsAndBiases",
    "mlflow": "bst_dist.report.mlflow_runs:MLflow",
}
WAITING = 10_000
"""Length of a writer's queue of reports; further reports are dropped."""
CLOSE_S = 60.0
"""Timeout in seconds for a writer to finish at the end of a run."""

Maker = Callable[[Path, Recipe, dict[str, Any]], Writer]


def require(name: str) -> None:
    """Raise UserError if there is no such writer, or if packages that it needs are not installed."""
    if name not in WRITERS:
        find(name)
        return
    for module in EXTRAS[name]:
        if importlib.util.find_spec(module) is None:  # an import takes seconds; only rank 0 does it
            raise UserError(f"log.writers: {install_hint(module)}")


def find(name: str) -> Maker:
    """Return the writer class with this name. Raise UserError if it cannot be imported."""
    registered = {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)} | WRITERS
    place = registered.get(name, name)
    if ":" not in place:
        known = ", ".join(sorted(registered))
        raise UserError(f"log.writers: no writer {name!r}: {known}, or module:Class of your own")
    try:
        return pkgutil.resolve_name(place)
    except ModuleNotFoundError as error:
        raise UserError(f"log.writers: {name}: {error} (is its folder in PYTHONPATH?)") from None
    except Exception as error:  # a user's module may raise anything
        raise UserError(f"log.writers: {name} cannot be imported: {error}") from None


def scalars(report: Report) -> dict[str, float]:
    """Return the numbers of a report by curve name, such as ``train/loss_nats``; empty for a skipped step."""
    return curves({"kind": report.kind, **asdict(report)})


def curves(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl by curve name, as `scalars` returns those of a report."""
    if line["kind"] == SkippedReport.kind:
        return {}
    group = _group(line)
    return {
        f"{group}/{name.replace('.', '/')}": value
        for name, value in flat(line).items()
        if name != "step" and isinstance(value, (int, float)) and not math.isnan(value)
    }


def _group(line: dict[str, Any]) -> str:
    """Return the prefix of the names of a report's curves; `line`: its line of metrics.jsonl."""
    if "split" not in line:
        return line["kind"]
    further = "loss_nats_standard_error" in line  # a CorpusReport, or one of averaged weights
    name = f"validation {line['split']}" if further else line["split"]
    return f"{name} averaged" if line["kind"] == OF_AVERAGE else name


class Background(Writer):
    """Wrapper that runs a writer in its own thread."""

    def __init__(self, name: str, make: Callable[[], Writer], close_s: float = CLOSE_S) -> None:
        """`make` is also called in the thread, because a service may take long to answer at first."""
        self.name, self._close_s = name, close_s
        self._waiting: queue.Queue[Callable[[Writer], None] | None] = queue.Queue(WAITING)
        self._failed = threading.Event()
        self._lost = 0
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"writer {name}", daemon=True)
        self._thread.start()

    def write(self, report: Report) -> None:
        self._put(lambda writer: writer.write(report))

    def write_probes(self, report: ProbeReport) -> None:
        self._put(lambda writer: writer.write_probes(report))

    def close(self) -> None:
        """Wait until everything is written, or until the timeout."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=self._close_s)
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            self._tell(f"did not write everything within {self._close_s:.0f} s; the run ends without the rest")
        elif self._lost:
            self._tell(f"was too slow: {self._lost:,} reports were dropped")

    def _put(self, task: Callable[[Writer], None]) -> None:
        if self._failed.is_set():
            return
        try:
            self._waiting.put_nowait(task)
        except queue.Full:
            self._lost += 1

    def _work(self, make: Callable[[], Writer]) -> None:
        try:
            writer = make()
            while (task := self._waiting.get()) is not None:
                task(writer)
            writer.close()
        except BaseException as error:  # also SystemExit: a library's sys.exit must not end the run
            self._failed.set()
            text = " ".join(str(error).split()) or type(error).__name__
            self._tell(f"failed and is off until the next start; metrics.jsonl has everything: {text}")
            with contextlib.suppress(queue.Empty):
                while True:  # empty the queue, because `close` may wait for room in it
                    self._waiting.get_nowait()

    def _tell(self, text: str) -> None:
        print(f"log.writers: {self.name} {text}", flush=True)
