"""Peak memory of a piece of code."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PeakMemory:
    """Peak since its creation: of the accelerator's allocations, or on a CPU of the process's resident memory."""

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cpu":
            self._known = _reset_resident()
        else:
            torch.accelerator.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """Return the peak so far; None if the system does not provide it."""
        if self._device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self._device)
        return _resident_peak() if self._known else None


def _reset_resident() -> bool:
    """Reset the peak of the resident memory (Linux, proc(5)); return whether this was possible."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else None
