"""A document's text is stored unchanged, except as the settings say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.prepare.text import TextConfig, stored_text
from data_pipeline.sources import Document, Skipped

LATIN = "caf\u00e9".encode("latin-1")


def stored(content: str | bytes | np.ndarray, **settings) -> bytes | tuple[str, bool]:
    """Return the stored bytes; for a skipped document the reason, and whether it counts as bad."""
    found = stored_text(Document("a.txt", content), TextConfig(**settings))
    return (found.reason, found.bad) if isinstance(found, Skipped) else found[1]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], "a\r\nb\rc e\u0301"),
        (["newlines"], "a\nb\nc e\u0301"),
        (["nfc"], "a\r\nb\rc \u00e9"),
        (["nfc", "newlines"], "a\nb\nc \u00e9"),
    ],
)
def test_normalisation_steps_change_only_what_they_name(steps: list[str], expected: str) -> None:
    for content in ("a\r\nb\rc e\u0301", "a\r\nb\rc e\u0301".encode()):
        assert stored(content, normalise=steps).decode() == expected


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("stop", ("not UTF-8 (byte 3 is 0xe9)", True)),
        ("skip", ("not UTF-8 (byte 3 is 0xe9)", False)),
        ("replace", "caf\ufffd".encode()),
        ("latin-1", "caf\u00e9".encode()),
    ],
)
def test_text_that_is_not_utf8_follows_the_undecodable_setting(way: str, expected: object) -> None:
    assert stored(LATIN, undecodable=way) == expected


def test_compressed_data_is_identified_by_format() -> None:
    assert stored(b"\x1f\x8b\x08\xff") == ("gzip data, not text", True)


def test_empty_text_and_lone_surrogates_are_not_stored() -> None:
    assert stored("") == stored(b"") == ("empty", False)
    assert stored("a\ud800b") == ("not Unicode text: surrogates not allowed (character 1)", False)


@pytest.mark.parametrize(
    ("names", "where"),
    [
        ({"title": "a\ud800"}, "title"),
        ({"licence": "a\ud800"}, "licence"),
        ({"group": "a\udc80"}, "group"),
        ({"meta": {"url": ["a\ud800"]}}, "meta"),
        ({"meta": {"a\ud800": 1}}, "meta"),
    ],
)
def test_document_with_a_lone_surrogate_beside_its_text_is_not_stored(names: dict[str, Any], where: str) -> None:
    found = stored_text(Document("a.txt", "fine", **names), TextConfig())
    assert isinstance(found, Skipped) and not found.bad
    assert found.reason.startswith(f"not Unicode text in its {where}: surrogates not allowed (character ")


def test_token_ids_are_stored_as_four_bytes_each() -> None:
    ids = np.array([0, 7, 70_000], np.int64)
    assert np.frombuffer(stored(ids), "<u4").tolist() == ids.tolist()
    assert stored(np.empty(0, np.uint16)) == b""
