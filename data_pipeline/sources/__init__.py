"""The sources of text, one module for each."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from bst_base.settings import parse
from data_pipeline.sources.arxiv import Arxiv
from data_pipeline.sources.base import Document, Listing, Part, Skipped, Source
from data_pipeline.sources.folder import Folder
from data_pipeline.sources.github import Github
from data_pipeline.sources.jsonl import JsonLines
from data_pipeline.sources.megatron import Megatron
from data_pipeline.sources.nanogpt import NanoGpt
from data_pipeline.sources.packaged.books import Books
from data_pipeline.sources.packaged.latex import Latex
from data_pipeline.sources.packaged.linux import Linux
from data_pipeline.sources.packaged.mathematics import Mathematics
from data_pipeline.sources.parquet import Tables
from data_pipeline.sources.pg19 import Pg19
from data_pipeline.sources.records import Fields, RecordSource
from data_pipeline.sources.stdlib import StandardLibrary
from data_pipeline.sources.synthetic import SyntheticText
from data_pipeline.sources.webdataset import WebDatasetTars

__all__ = ["SOURCES", "AnySource", "Document", "Fields", "Listing", "Part", "RecordSource", "Skipped", "Source"]

_CLASSES = (
    StandardLibrary,
    Folder,
    JsonLines,
    Tables,
    WebDatasetTars,
    Megatron,
    NanoGpt,
    Pg19,
    Arxiv,
    Github,
    Books,
    Latex,
    Mathematics,
    Linux,
    SyntheticText,
)

SOURCES: dict[str, type[Source]] = {cls.model_fields["kind"].default: cls for cls in _CLASSES}
"""Every source class by its `kind`."""


def _source(value: Any) -> Any:
    """Parse the settings of the source that `kind` names. A plain string is a kind with default settings."""
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
