"""Filters of the user's own: functions that see each document's text, and change it or leave the document out.

    text:
      filters: [my_filters.py:english, my_filters.py:without_addresses]

Each is called as ``function(text, document)`` with a `sources.Document`, and returns the text to store, or None to
leave the document out. What language, quality or personal data is, and by which model, is theirs to say.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

from bst_base.errors import UserError
from data_pipeline.format.manifest import sha256_file
from data_pipeline.sources.base import Document, Skipped

Filter = Callable[[str, Document], str | None]


def parts(name: str) -> tuple[Path, str]:
    """The file and the function of ``path/to/file.py:function``."""
    file, _, function = name.rpartition(":")
    return Path(file).expanduser(), function


def check_name(name: str) -> str:
    """Raise ValueError unless it is the name of a filter."""
    file, function = parts(name)
    if file.suffix != ".py" or not function.isidentifier():
        raise ValueError(f"{name!r}: not a filter; write path/to/file.py:function")
    return name


@cache
def load(name: str) -> Filter:
    """The function; raises UserError when there is none."""
    file, function = parts(name)
    if not file.is_file():
        raise UserError(f"text.filters: {file}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"filters_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"text.filters: {file} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"text.filters: {file} has no function {function}")
    return found


def identity(name: str) -> str:
    """What a filter does, as far as can be told: its function and the content of its file."""
    file, function = parts(name)
    load(name)
    return f"{function} of {sha256_file(file)}"


def filtered(text: str, document: Document, name: str) -> str | Skipped:
    """What a filter makes of a text, or why it is left out; a filter that fails, or returns something else, makes the
    document a bad record."""
    _, function = parts(name)
    try:
        found = load(name)(text, document)
    except UserError:
        raise
    except Exception as error:
        problem = f"filter {function} failed ({type(error).__name__}: {error})"
        return Skipped(document.path, problem, bad=True, remedy="mend the filter")
    if found is None:
        return Skipped(document.path, f"filter {function}")
    if not isinstance(found, str):
        problem = f"filter {function} returned neither text nor None ({type(found).__name__})"
        return Skipped(document.path, problem, bad=True, remedy="mend the filter")
    return found
