"""The host memory that this process may still take, by the kernel's count and by the limits of its control groups.

Slurm, Kubernetes and Docker set such limits. A process that passes one is killed, however much memory the host has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Return the bytes of host memory that can still be taken without swapping; None if nothing says how many.

    The memory of the whole host (MemAvailable) and the limit of every control group (version 1 and 2) above this
    process count. Pages of files, which the kernel can drop, are available.
    """
    return min((found for found in (_of_host(), *_of_groups()) if found is not None), default=None)


def _of_host() -> int | None:
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", _read(_PROC / "meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _of_groups() -> Iterator[int | None]:
    for line in _read(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for group in _upwards(_GROUPS, path):
                yield _left(group, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            for group in _upwards(_GROUPS / "memory", path):
                yield _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """Yield a control group's folder and those above it. In a container only the top one may exist, for its own group.

    A path above the top (`/..`), as a process has that was moved out of its namespace, counts as the top.
    """
    names = [name for name in path.split("/") if name]
    for count in range(len(names) if ".." not in names else 0, -1, -1):
        yield top.joinpath(*names[:count])


def _left(group: Path, limit: str, used: str, prefix: str) -> int | None:
    """Return the bytes that a control group may still take; None without a limit, or if it cannot be read.

    Version 1 writes an enormous number for no limit, which is the same as none here.
    """
    with suppress(ValueError):  # "max", or an empty text
        most, taken = int(_read(group / limit)), int(_read(group / used))
        stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
        files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        return max(0, most - taken + files)
    return None


def _read(path: Path) -> str:
    """Return the text of a file; an empty text if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
