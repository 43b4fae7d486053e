"""The time as text, the same in all files that a run writes."""

from __future__ import annotations

import time


def utc_now() -> str:
    """Return the time in UTC, to the second. The format is fixed: times in files are compared as text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
