"""The most memory that something has held while it ran."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PeakMemory:
    """Counts from its making on: the accelerator's allocations, or the resident memory of the whole process."""

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cpu":
            self._known = _reset_resident()
        else:
            torch.accelerator.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """The most so far; None where the system does not tell."""
        if self._device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self._device)
        return _resident_peak() if self._known else None


def _reset_resident() -> bool:
    """Begin to count anew (Linux, proc(5)); whether that could be done."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else None
