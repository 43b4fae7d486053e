"""The model's code as files in an export, so that transformers can load it without this project installed.

Each module that the model needs becomes one flat file with relative imports, which transformers follows under
``trust_remote_code``. The files require torch, transformers, and the packages that these require (among them pydantic
and PyYAML).
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

ROOTS = ("bst_dist", "bst_base")
CLASSES = {"AutoConfig": "BSTConfig", "AutoModelForCausalLM": "BSTForCausalLM"}
ENTRY = "bst_dist.hub.modeling"
"""The module of both classes. One module, because transformers makes a separate package for each entry."""


def write_code(folder: Path) -> dict[str, str]:
    """Write `ENTRY` and all modules that it imports into `folder`. Return the `auto_map` of config.json."""
    waiting, done = [ENTRY], set()
    while waiting:
        module = waiting.pop()
        if module in done:
            continue
        done.add(module)
        source, imported = _standing_alone(_source(module), module)
        (folder / f"{flat(module)}.py").write_text(source, encoding="utf-8")
        waiting += imported
    return {auto: f"{flat(ENTRY)}.{name}" for auto, name in CLASSES.items()}


def flat(module: str) -> str:
    """Return the name of a module's file in an export, without its suffix."""
    return module.removeprefix("bst_dist.").replace(".", "_")


def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    return Path(found.origin).read_text(encoding="utf-8")


def _standing_alone(source: str, module: str) -> tuple[str, list[str]]:
    """Return a module's source with relative imports of flat names, and the modules that it imports."""
    lines, imported, tree = source.splitlines(), [], ast.parse(source)
    for_checkers = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_for_checkers(node)]
    inside = {id(child) for node in for_checkers for child in ast.walk(node)}
    for node in for_checkers:
        _replace(lines, node, ["pass"])  # transformers would treat imports in it as further files
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in inside and node.module.partition(".")[0] in ROOTS:
            found = [_flat_import(node.module, alias) for alias in node.names]
            imported += [target for target, _ in found]
            _replace(lines, node, ["; ".join(statement for _, statement in found)])
    text = "\n".join(lines) + "\n"
    if left := re.findall(rf"^\s*import (?:{'|'.join(ROOTS)})\b.*", text, re.MULTILINE):
        raise AssertionError(f"{module}: {left[0].strip()!r} cannot stand alone: import names from the module")
    return text, imported


def _flat_import(package: str, alias: ast.alias) -> tuple[str, str]:
    """Return the module that an imported name is in, or is, and the statement that imports it in an export.

    transformers copies a file only if a line imports a name from it. So for a module, `__name__` is imported too.
    """
    name = alias.asname or alias.name
    module = f"{package}.{alias.name}"
    if importlib.util.find_spec(package).submodule_search_locations and importlib.util.find_spec(module):
        return module, f"from .{flat(module)} import __name__ as _; from . import {flat(module)} as {name}"
    renamed = f" as {alias.asname}" if alias.asname else ""
    return package, f"from .{flat(package)} import {alias.name}{renamed}"


def _is_for_checkers(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def _replace(lines: list[str], node: ast.stmt, by: list[str]) -> None:
    """Replace a statement by other lines with its indentation. The number of lines stays the same."""
    indent = " " * node.col_offset
    count = node.end_lineno - node.lineno + 1
    lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in by] + [""] * (count - len(by))
