"""User filters: functions that see the text of each document, and change it or leave the document out.

    text:
      filters: [my_filters.py:english, my_filters.py:without_addresses]

Each is called as ``function(text, document)`` with a `sources.Document`. It returns the text to store, or None to leave
the document out. Filters for language, quality or personal data are the user's own; none is built in.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from bst_base.errors import UserError
from data_pipeline.format.manifest import sha256_file
from data_pipeline.sources.base import Document, Skipped

Filter = Callable[[str, Document], str | None]


def parts(name: str) -> tuple[Path, str]:
    """Return the file and the function of ``path/to/file.py:function``."""
    file, _, function = name.rpartition(":")
    return Path(file).expanduser(), function


def check_name(name: str) -> str:
    """Raise ValueError unless `name` is a valid name of a filter; return it."""
    file, function = parts(name)
    if file.suffix != ".py" or not function.isidentifier():
        raise ValueError(f"{name!r}: not a filter; write path/to/file.py:function")
    return name


@cache
def load(name: str) -> Filter:
    """Return the function; raises UserError when it cannot be loaded."""
    file, function = parts(name)
    if not file.is_file():
        raise UserError(f"text.filters: {file}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"filters_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    sys.path.insert(0, str(file.parent.absolute()))  # modules beside the file, as when Python runs it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"text.filters: {file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent.absolute()))
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"text.filters: {file} has no function {function}")
    return found


def identity(name: str) -> str:
    """Return a string that identifies a filter: its function and the hash of its file.

    Files that it imports do not count.
    """
    file, function = parts(name)
    load(name)
    return f"{function} of {sha256_file(file)}"


def filtered(text: str, document: Document, name: str) -> str | Skipped:
    """Return the text from a filter, or the reason to leave the document out.

    A filter that fails, or returns a wrong type, makes the document a bad record.
    """
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
