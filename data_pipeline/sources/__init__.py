"""Where text comes from: one small module a source."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from data_pipeline.config import parse
from data_pipeline.sources.base import Document, Part, Skipped, Source
from data_pipeline.sources.folder import Folder
from data_pipeline.sources.stdlib import StandardLibrary

__all__ = ["SOURCES", "AnySource", "Document", "Part", "Skipped", "Source"]

SOURCES: dict[str, type[Source]] = {cls.model_fields["kind"].default: cls for cls in (StandardLibrary, Folder)}
"""Every source by its `kind`."""


def _source(value: Any) -> Any:
    """Settings of the kind that `kind` names; a plain string is a kind with its defaults."""
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    if kind not in SOURCES:
        raise ValueError(f"kind must be one of {', '.join(SOURCES)} (got {kind!r})")
    return parse(SOURCES[kind], value, where=kind)


AnySource = Annotated[SerializeAsAny[Source], BeforeValidator(_source)]
"""The type of a settings field that holds any source."""
