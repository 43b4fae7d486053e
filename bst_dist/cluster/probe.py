"""The data that each host reports about itself in the preflight."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from bst_base.host import most_open_files
from bst_base.memory import available_memory
from bst_dist.parallel.devices import device_files
from bst_dist.version import PACKAGES

NVIDIA_S = 20.0
"""Timeout of nvidia-smi in seconds; it loads the driver if nothing else has."""
ROOT = Path(__file__).resolve().parent.parent.parent


def probe(job: str, files: Sequence[str], run_dir: str, write: bool) -> dict[str, Any]:
    """Return this host's versions, digests of the code and of `files`, state of the run directory, and old ranks.

    `write`: write the mark file beside the run directory; otherwise read the one that another host has written. Values
    that cannot be determined are None; no exception is raised.
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "code": _code(),
        "files": {path: _digest(Path(path)) for path in files},
        "nonce": _nonce(Path(run_dir), job, write),
        "free_bytes": _free(Path(run_dir)),
        "ranks": old_ranks(run_dir),
        "devices": device_files(),
        "memory_errors": memory_errors(),
        "open_files": most_open_files(),
        "available_memory": available_memory(),
    }


def unmark(job: str, run_dir: str) -> None:
    """Remove the mark file."""
    _mark(Path(run_dir), job).unlink(missing_ok=True)


def old_ranks(run_dir: str) -> list[int]:
    """Return the ids of processes on this host that train in `run_dir`; before a start, they are of an earlier one."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if "bst_dist.train" in command and run_dir in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def memory_errors() -> dict[str, int]:
    """Return NVIDIA device -> uncorrected memory errors since the driver started, for devices that have any.

    Empty when nvidia-smi is missing or does not answer, or when the device does not count them.
    """
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = re.findall(r"^(\d+), (\d+)$", said, re.MULTILINE)
    return {index: int(count) for index, count in found if int(count)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code() -> str:
    """Return a digest of this project's Python files; unlike the commit it shows uncommitted changes."""
    total = hashlib.sha256()
    for package in ("bst_base", "bst_dist", "data_pipeline"):
        for path in sorted((ROOT / package).rglob("*.py")):
            total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _mark(run_dir: Path, job: str) -> Path:
    """Return the path of the mark file, which shows whether hosts share the run directory.

    It is beside the run directory, which may not exist yet.
    """
    return run_dir.with_name(f".{run_dir.name}.preflight-{job}")


def _nonce(run_dir: Path, job: str, write: bool) -> str | None:
    path = _mark(run_dir, job)
    try:
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(job)
        return path.read_text()
    except OSError:
        return None


def _free(directory: Path) -> int | None:
    """Return the free bytes on the file system of `directory`, or of its nearest existing parent."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None
