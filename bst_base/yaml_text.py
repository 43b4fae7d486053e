"""YAML for settings: every plain value means what a person expects, or is refused with its line.

PyYAML follows YAML 1.1: it keeps the last of two equal keys, reads ``1e-3`` as text, ``012`` as ten, ``12:30`` as 750
and ``no`` as false. Here:

- a key that occurs twice in one section is refused, with both lines;
- ``1e-3``, ``1e3``, ``1_000``, ``0x10`` and ``0o17`` are numbers; only ``true`` and ``false`` are booleans; ``null`` is
  null; dates and times are text;
- ``yes``, ``no``, ``on``, ``off`` and numbers that begin with a zero are refused unless they are quoted.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_BOOL, _NULL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("bool", "null", "int", "float"))
_AMBIGUOUS = "!ambiguous"
_PLAIN = (  # (tag, pattern, possible first characters); the first match decides
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_INT, r"[-+]?(?:0|[1-9][0-9_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*|0o_*[0-7][0-7_]*|0b_*[01][01_]*)", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.inf|\.Inf)"
        r"|\.nan|\.NaN",
        "-+.0123456789",
    ),
    (_AMBIGUOUS, r"(?i:yes|no|on|off)|[-+]?0[0-9_]+(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?", "yYnNoO-+0"),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)


class SettingsError(ValueError):
    """The text is not valid YAML for settings. The message contains the line."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own form; none of YAML 1.1's


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  so that text which would be read otherwise is quoted


for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list(_first))


def read_yaml(text: str) -> Any:
    """Return the value of a YAML text; raises SettingsError, with the line, if it is not YAML or is ambiguous."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = error.problem or error.context
        raise SettingsError(f"{line}{problem}") from None
    except yaml.YAMLError as error:
        raise SettingsError(str(error)) from None


def write_yaml(value: Any, **style: Any) -> str:
    """Return YAML text that `read_yaml` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)


def _refuse(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise _refuse(key_node, "a key must be text or a number; is this a {{ template }} that was not filled in?")
        if key in lines:
            where = f"lines {lines[key]} and {line}" if lines[key] != line else f"line {line}, twice"
            raise _refuse(key_node, f"the key {key!r} is given twice ({where}); keep one of them")
        lines[key] = line
    loader.flatten_mapping(node)
    pairs = ((loader.construct_object(each, deep=True) for each in pair) for pair in node.value)
    return dict(pairs)


def _int(_: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value.replace("_", ""), base=0)


def _float(_: _Loader, node: yaml.ScalarNode) -> float:
    value = node.value.replace("_", "").lower()
    return float(value.replace(".inf", "inf").replace(".nan", "nan"))


def _ambiguous(_: _Loader, node: yaml.ScalarNode) -> None:
    value = node.value
    if value.lower() in ("yes", "on", "no", "off"):
        meant = "true" if value.lower() in ("yes", "on") else "false"
        raise _refuse(node, f"{value} could be {meant} or text: write {meant}, or '{value}' in quotes")
    number = value.lstrip("0") or "0"
    raise _refuse(node, f"{value} begins with a zero: write {number}, 0o… for octal, or quote it as text")


for _tag, _construct in (
    ("tag:yaml.org,2002:map", _mapping),
    (_INT, _int),
    (_FLOAT, _float),
    (_AMBIGUOUS, _ambiguous),
):
    _Loader.add_constructor(_tag, _construct)
