"""The model's own code as files beside an export, so that transformers loads it with nothing of this project installed.

Each module that the model is made of becomes one flat file, its imports made relative, which is what transformers
follows under ``trust_remote_code``. The files need torch, transformers, and what those require themselves (pydantic and
PyYAML among it).
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

ROOTS = ("bst_dist", "bst_base")
CLASSES = {"AutoConfig": "BSTConfig", "AutoModelForCausalLM": "BSTForCausalLM"}
ENTRY = "bst_dist.hub.modeling"
"""Both classes are taken from this one: transformers gives each entry, with its files, a package of its own."""


def write_code(folder: Path) -> dict[str, str]:
    """Write the modules of `ENTRY` and of all it imports into `folder`; returns the `auto_map` of config.json."""
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
    """The name of a module's file in an export, without its ending."""
    return module.removeprefix("bst_dist.").replace(".", "_")


def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    return Path(found.origin).read_text(encoding="utf-8")


def _standing_alone(source: str, module: str) -> tuple[str, list[str]]:
    """A module's source with relative imports of flat names, and the modules that it imports."""
    lines, imported, tree = source.splitlines(), [], ast.parse(source)
    for_checkers = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_for_checkers(node)]
    inside = {id(child) for node in for_checkers for child in ast.walk(node)}
    for node in for_checkers:
        _replace(lines, node, ["pass"])  # transformers would take what is imported here for more files
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
    """The module that an imported name is in, or is, and the statement that imports it in an export.

    A file is only copied by transformers when a line imports a name from it, so a module is imported with one of its.
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
    """Put other lines, of the same indentation, in a statement's place; as many as before, so positions stay."""
    indent = " " * node.col_offset
    count = node.end_lineno - node.lineno + 1
    lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in by] + [""] * (count - len(by))
