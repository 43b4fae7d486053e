from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from functools import partial

import pytest

from bst_base.clock import utc_now


def test_time_is_that_of_utc_in_any_time_zone(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        text = utc_now()
    finally:
        monkeypatch.undo()
        time.tzset()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", text)
    assert datetime.fromisoformat(text).timestamp() == pytest.approx(datetime.now(UTC).timestamp(), abs=5)


def test_later_times_are_greater_as_text(monkeypatch):
    of_second, seconds = time.gmtime, [0, 9, 10, 59, 60, 86_400, 1_000_000_000, 2_000_000_000]
    texts = []
    for second in seconds:
        monkeypatch.setattr(time, "gmtime", partial(of_second, second))
        texts.append(utc_now())
    assert texts == sorted(texts) and len(set(texts)) == len(texts)
