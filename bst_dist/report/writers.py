"""Writers that a recipe names (`log.writers`): W&B, MLflow, or a class of your own.

A name is one of WRITERS, one that an installed package registers under the entry point group GROUP, or `module:Class`.
The class is a `metrics.Writer`, made as ``Class(run_dir, recipe, about)`` in each start on rank 0; `about` is what the
recipe does not say: parameters, ranks. It is imported only when it was chosen.

Other people's services may be slow, away or full. So each writer has a thread of its own: the run does not wait for it,
and when it fails the run says so once and continues without it.
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
from bst_dist.extras import EXTRAS, missing
from bst_dist.report.metrics import Report, Seen, SkippedReport, Writer, curve_group

GROUP = "bst_dist.writers"
WRITERS = {
    "wandb": "bst_dist.report.weights_and_biases:WeightsAndBiases",
    "mlflow": "bst_dist.report.mlflow_runs:MLflow",
}
WAITING = 10_000
"""Reports that wait for a writer at most; more are dropped."""
CLOSE_S = 60.0
"""How long the end of a run waits for a writer that has not written all."""

Maker = Callable[[Path, Recipe, dict[str, Any]], Writer]


def require(name: str) -> None:
    """Raise UserError unless there is such a writer, and what it needs is installed."""
    for module in EXTRAS[name] if name in WRITERS else ():
        if importlib.util.find_spec(module) is None:  # importing it takes seconds, which one rank alone should spend
            raise UserError(f"log.writers: {missing(module)}")
    if name not in WRITERS:
        find(name)


def find(name: str) -> Maker:
    """The class that a recipe names; raises UserError when it cannot be imported."""
    registered = {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)} | WRITERS
    place = registered.get(name, name)
    if ":" not in place:
        known = ", ".join(sorted(registered))
        raise UserError(f"log.writers: no writer {name!r}: {known}, or module:Class of your own")
    try:
        return pkgutil.resolve_name(place)
    except ModuleNotFoundError as error:
        raise UserError(f"log.writers: {name}: {error} (is its folder in PYTHONPATH?)") from None
    except Exception as error:  # whatever the import of somebody's module raises
        raise UserError(f"log.writers: {name} cannot be imported: {error}") from None


def scalars(report: Report) -> dict[str, float]:
    """The numbers of a report by the names of their curves, as ``train/loss_nats``; none of a step that was skipped."""
    return curves({"kind": report.kind, **asdict(report)})


def curves(line: dict[str, Any]) -> dict[str, float]:
    """The same of a line of metrics.jsonl."""
    if line["kind"] == SkippedReport.kind:
        return {}
    group = curve_group(line)
    return {f"{group}/{name.replace('.', '/')}": value for name, value in flat(line).items()
            if name != "step" and isinstance(value, (int, float)) and not math.isnan(value)}  # fmt: skip


class Background(Writer):
    """A writer in a thread of its own."""

    def __init__(self, name: str, make: Callable[[], Writer], close_s: float = CLOSE_S) -> None:
        """`make` is called in the thread, too: a service may take long to answer for the first time."""
        self.name, self._close_s = name, close_s
        self._waiting: queue.Queue[Callable[[Writer], None] | None] = queue.Queue(WAITING)
        self._failed, self._lost = threading.Event(), 0
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"writer {name}", daemon=True)
        self._thread.start()

    def write(self, report: Report) -> None:
        self._put(lambda writer: writer.write(report))

    def see(self, seen: Seen) -> None:
        self._put(lambda writer: writer.see(seen))

    def close(self) -> None:
        """Wait until all is written, but not for ever."""
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
        except BaseException as error:  # a library may call sys.exit: that must not end the run either
            self._failed.set()
            text = " ".join(str(error).split()) or type(error).__name__
            self._tell(f"failed and is off until the next start; metrics.jsonl has everything: {text}")
            with contextlib.suppress(queue.Empty):
                while True:  # the end may be waiting for room
                    self._waiting.get_nowait()

    def _tell(self, text: str) -> None:
        print(f"log.writers: {self.name} {text}", flush=True)
