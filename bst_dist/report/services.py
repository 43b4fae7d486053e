"""Base of the writers to services (W&B, MLflow): the service's name for the run, and the list of reports sent.

A service keeps every value, so a report sent twice is shown twice. A run may be killed while reports wait to be sent,
and after a resume or a roll-back it repeats some steps. So the run directory keeps a list of the reports sent to each
service. Each start first sends the lines of metrics.jsonl that are not in the list; no report in the list is sent
again.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, TypeAlias

from bst_base.files import write_text
from bst_base.json_lines import dropped_file, read_lines
from bst_dist.report.metrics import FILE, ProbeReport, Report, Writer
from bst_dist.report.writers import curves, scalars

NAMES = "writers.json"
"""File in the run directory with the services' ids of the run, by writer, so that a resumed run continues there."""

Key: TypeAlias = tuple[str, str | None, int]
"""Kind, split and step of a report."""


class Service(Writer):
    """Writer to a service that sends each report once over all starts of a run; of a repeated step, the first report.

    A report is listed after the service has accepted it. If the run is killed between the two, it is sent again.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        """`name`: name of the writer. Must be called before `keep_name`."""
        self._reported = read_lines(run_dir / FILE)
        path = run_dir / f"writers.{name}.jsonl"
        listed: list[Key] = [tuple(key) for key in read_lines(path)]
        if not path.exists() and kept_name(run_dir, name):  # begun by an older version, which sent everything
            listed = [_key(line) for line in read_lines(dropped_file(run_dir / FILE))]
            listed += map(_key, self._reported)
        write_text(path, "".join(_line(key) for key in listed))  # drops an incomplete last line
        self._sent = set(listed)
        self._list = path.open("a", buffering=1, encoding="utf-8")

    def send(self, values: dict[str, float], step: int) -> None:
        """Send values to the service; return when it has accepted them."""
        raise NotImplementedError

    def catch_up(self) -> None:
        """Send unsent reports of earlier starts. Unsent probe results are lost, because no file has them."""
        for line in self._reported:
            self._send_once(_key(line), curves(line), line["step"])
        self._reported = []

    def write(self, report: Report) -> None:
        key = report.kind, getattr(report, "split", None), report.step
        self._send_once(key, scalars(report), report.step)

    def write_probes(self, report: ProbeReport) -> None:
        self._send_once(("seen", None, report.step), report.scalars, report.step)

    def close(self) -> None:
        self._list.close()

    def _send_once(self, key: Key, values: dict[str, float], step: int) -> None:
        if values and key not in self._sent:
            self.send(values, step)
            self._sent.add(key)
            self._list.write(_line(key))


def kept_name(run_dir: Path, writer: str) -> str | None:
    """Return the service's id of the run from an earlier start; None in the first start."""
    try:
        return json.loads((run_dir / NAMES).read_text(encoding="utf-8")).get(writer)
    except FileNotFoundError:
        return None


def keep_name(run_dir: Path, writer: str, name: str) -> None:
    """Save the service's id of the run for later starts."""
    with _LOCK:  # several writers start at once
        path = run_dir / NAMES
        names = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_text(path, json.dumps(names | {writer: name}, indent=2) + "\n")


def _key(line: dict[str, Any]) -> Key:
    return line["kind"], line.get("split"), line["step"]


def _line(key: Key) -> str:
    return json.dumps(key) + "\n"


_LOCK = threading.Lock()
