"""Formatting of numbers for reports and commands."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from bst_dist.study.statistics import Estimate

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(log: float, digits: int = 2, sign: bool = True) -> str:
    """Format a difference of logarithms of losses as per cent of the loss: +1.23 %."""
    return f"{100 * log:{'+' if sign else ''}.{digits}f} %".replace("-", "−")


def percent_interval(estimate: Estimate) -> str:
    """Format as "+1.23 % (95 % interval +0.20 % to +2.26 %)"; without an interval if there is no standard error."""
    if estimate.standard_error is None:
        return f"{percent(estimate.value)} (from one pair, without an interval)"
    return f"{percent(estimate.value)} (95 % interval {percent(estimate.low)} to {percent(estimate.high)})"


def power(value: float, digits: int = 2) -> str:
    """Format as 6.2·10¹⁰; numbers from 0.001 to a million without a power of ten."""
    if not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{digits + 1}g}" if abs(value) < 1000 else f"{value:,.0f}"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value / 10**exponent:.{digits - 1}f}·10{str(exponent).translate(SUPERSCRIPTS)}"


def span(low: float, high: float) -> str:
    """Format an interval as "LOW to HIGH", each number like `power`."""
    return f"{power(low)} to {power(high)}"


def number(value: float | None, form: str) -> str:
    """Format a number; return an empty string for None, NaN and infinity."""
    return "" if value is None or not math.isfinite(value) else f"{value:{form}}"


def plain(found: Any) -> Any:
    """Convert dataclasses, named tuples and arrays to JSON types; NaN and infinity become None."""
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return {f.name: plain(getattr(found, f.name)) for f in dataclasses.fields(found)}
    if isinstance(found, tuple) and hasattr(found, "_asdict"):
        return {name: plain(value) for name, value in found._asdict().items()}
    if isinstance(found, dict):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple, np.ndarray)):
        return [plain(value) for value in found]
    if isinstance(found, np.generic):
        found = found.item()
    return None if isinstance(found, float) and not math.isfinite(found) else found
