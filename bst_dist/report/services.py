"""What the writers to services share: what a service calls the run, and what it has been sent of it.

A service keeps what it is sent, so what is sent twice is shown twice. But a run may be killed while reports wait to be
sent, and after a resume or a roll-back it takes some steps again. So a run directory keeps a list of what each service
was sent. Each start first sends the lines of metrics.jsonl that are not in it, and nothing that is.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, TypeAlias

from bst_base.files import write_text
from bst_dist.report import metrics
from bst_dist.report.metrics import Report, Seen, Writer
from bst_dist.report.writers import curves, scalars

NAMES = "writers.json"
"""In a run directory: what services call the run, by the writer's name, so that a resumed run continues there."""

Key: TypeAlias = tuple[str, str | None, int]
"""Kind, split and step of a report."""


class Service(Writer):
    """A writer to a service, which gets each report once, over all starts of a run, a step's first values.

    A report is listed after the service has taken it: where the run is killed between the two, it is sent again.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        """`name`: the writer's. Made before `keep_name`."""
        self._reported = metrics.read_lines(run_dir / metrics.FILE)
        path = run_dir / f"writers.{name}.jsonl"
        listed: list[Key] = [tuple(key) for key in metrics.read_lines(path)]
        if not path.exists() and kept_name(run_dir, name):  # begun by a version without lists, which sent all it could
            listed = [_key(line) for line in metrics.read_lines(metrics.dropped(run_dir / metrics.FILE))]
            listed += map(_key, self._reported)
        write_text(path, "".join(_line(key) for key in listed))  # without a last line that a full disk has cut
        self._sent, self._list = set(listed), path.open("a", buffering=1, encoding="utf-8")

    def send(self, values: dict[str, float], step: int) -> None:
        """Return when the service has taken the values."""
        raise NotImplementedError

    def catch_up(self) -> None:
        """Send what earlier starts have reported and not sent. What probes saw then is in no file, and is lost."""
        for line in self._reported:
            self._send_once(_key(line), curves(line), line["step"])
        self._reported = []

    def write(self, report: Report) -> None:
        key = report.kind, getattr(report, "split", None), report.step
        self._send_once(key, scalars(report), report.step)

    def see(self, seen: Seen) -> None:
        self._send_once(("seen", None, seen.step), seen.scalars, seen.step)

    def close(self) -> None:
        self._list.close()

    def _send_once(self, key: Key, values: dict[str, float], step: int) -> None:
        if values and key not in self._sent:
            self.send(values, step)
            self._sent.add(key)
            self._list.write(_line(key))


def kept_name(run_dir: Path, writer: str) -> str | None:
    """What a service calls the run, from an earlier start; None in the first."""
    try:
        return json.loads((run_dir / NAMES).read_text(encoding="utf-8")).get(writer)
    except FileNotFoundError:
        return None


def keep_name(run_dir: Path, writer: str, name: str) -> None:
    """Keep what a service calls the run, for later starts."""
    with _LOCK:  # several writers start at once
        path = run_dir / NAMES
        names = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_text(path, json.dumps(names | {writer: name}, indent=2) + "\n")


def _key(line: dict[str, Any]) -> Key:
    return line["kind"], line.get("split"), line["step"]


def _line(key: Key) -> str:
    return json.dumps(key) + "\n"


_LOCK = threading.Lock()
