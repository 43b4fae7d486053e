"""The documentation of a class's fields: the strings below them, read from the source when they are asked for.

Pydantic would read them when each class is created, in every process. That takes longer than everything else about the
settings.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from pydantic import BaseModel


def documentation(cls: type[BaseModel]) -> dict[str, str]:
    """Return the string below each annotated field, on one line, including inherited fields.

    It is empty if there is no source.
    """
    found: dict[str, str] = {}
    for base in cls.__mro__[cls.__mro__.index(BaseModel) - 1 :: -1]:
        for field, text in pairwise(_classes(base.__module__).get(base.__qualname__, ())):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found.pop(field.target.id, None)  # a field that is declared again has only its new text
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    found[field.target.id] = " ".join(str(text.value.value).split())
    return found


@cache
def _classes(module: str) -> dict[str, list[ast.stmt]]:
    """Return the bodies of all classes in a module, by qualified name; empty if it has no source."""
    try:
        return dict(_within(ast.parse(inspect.getsource(sys.modules[module]))))
    except (OSError, TypeError):
        return {}


def _within(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, list[ast.stmt]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name, [*child.body, ast.Pass()]
            yield from _within(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            yield from _within(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _within(child, prefix)
