"""Typed settings read from YAML, with dotted overrides, and errors that suggest the nearest key.

A settings class derives from `Config`, is defined next to the class that it configures, and documents each field with a
string below it. An unknown key, a wrong type or a failed check is a `UserError` that names the place.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Tag, ValidationError

from bst_base.addresses import redacted
from bst_base.documented import documentation
from bst_base.errors import StorageError, UserError, nearest
from bst_base.places import with_base
from bst_base.shipped import base_of
from bst_base.yaml_text import SettingsError, read_yaml, write_yaml


class Config(BaseModel):
    """Base of every settings class. Instances are immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def changed(self, *names: str) -> list[str]:
        """Return those of the fields `names` that differ from their defaults."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]


C = TypeVar("C", bound=Config)


class ConfigError(UserError):
    """A settings file or an override is not valid."""


def load(cls: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """Read a YAML file into `cls`, after applying overrides of the form ``section.field=value``.

    Values of overrides are YAML too: ``model.width=256``, ``model.layers=[sliding,bst]``. Relative paths in the file
    count from its folder (`shipped.base_of`), those in overrides from the working directory. Raises ConfigError with
    the file, the key and, for an unknown key, the nearest existing one.
    """
    base = base_of(Path(path))
    return parse(cls, overridden(with_base(read_settings(path), base), overrides), where=str(path))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file, not yet validated.

    Raises ConfigError when there is no such file or it has no settings, StorageError when the system cannot read it.
    """
    path = Path(path)
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a directory, not a file of settings") from None
    except OSError as error:
        raise StorageError.of(error, path, doing="read") from None
    except (SettingsError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected settings (key: value), found {type(data).__name__}")
    return data


def overridden(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply overrides ``section.field=value`` to `data` in place and return it; raises ConfigError for an invalid one.

    Relative paths in overrides count from the working directory.
    """
    for override in overrides:
        _apply(data, override)
    return data


def parse(cls: type[C], data: dict[str, Any], where: str = "settings") -> C:
    """Validate `data` against `cls`; raises ConfigError that lists every problem, one per line."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = _explained(cls, error.errors())
    raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))


def dump(config: Config) -> str:
    """Return the settings as YAML, including defaults. `load` reads it back to an equal object."""
    return write_yaml(config.model_dump(mode="json"))


def fields(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Yield every leaf field as (dotted name, type, default, documentation), in the order of declaration.

    For a section that can be of several kinds, the fields of each kind follow. Their documentation begins with the
    kind. A section that may be missing, and a list of sections, are yielded like a leaf field, and then their fields:
    ``branch.run``, ``train.length_changes[].step``.
    """
    texts = documentation(cls)
    for name, field in cls.model_fields.items():
        kinds = _kinds(field.annotation)
        for kind, section in kinds.items():
            for inner, annotation, default, text in fields(section, f"{prefix}{name}."):
                yield inner, annotation, default, f"({kind}) {text}" if kind else text
        if not kinds:
            annotation = _type_name(field.annotation)
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", annotation, default, texts.get(name, "")
            section = _optional(field.annotation)
            listed = _listed(field.annotation)
            if section:
                yield from fields(section, f"{prefix}{name}.")
            if listed:
                yield from fields(listed, f"{prefix}{name}[].")


def _type_name(annotation: Any) -> str:
    """Return a type in its usual notation, without its validators."""
    origin = get_origin(annotation)
    members = get_args(annotation)
    if origin is Annotated:
        return _type_name(members[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, members))
    if origin in (tuple, list, dict):
        inner = ("..." if member is Ellipsis else _type_name(member) for member in members)
        return f"{origin.__name__}[{', '.join(inner)}]"
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not members:
        return "section" if issubclass(annotation, Config) else annotation.__name__
    return str(annotation).replace("typing.", "")


def _kinds(annotation: Any) -> dict[str, type[Config]]:
    """Return the possible classes of a section, by kind; with the key "" if it has no kinds. Empty for a leaf field."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return {"": annotation}
    tagged = [get_args(member) for member in get_args(annotation) if get_origin(member) is Annotated]
    return {tag.tag: section for section, *marks in tagged for tag in marks if isinstance(tag, Tag)}


def _optional(annotation: Any) -> type[Config] | None:
    """Return the class of a section that may also be missing or another value; None if the value is no section."""
    if get_origin(annotation) not in (Union, UnionType):
        return None
    for member in get_args(annotation):
        if section := _kinds(member).get(""):
            return section
    return None


def _listed(annotation: Any) -> type[Config] | None:
    """Return the class of the sections in a list; None if the value is not a list of sections."""
    listed = get_origin(annotation) in (tuple, list)
    for member in get_args(annotation):
        section = _kinds(member).get("") if listed else _listed(member)
        if section:
            return section
    return None


def _of_several(annotation: Any) -> bool:
    """Whether a value may have more than one type, not counting None."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return len([member for member in members if member is not type(None)]) > 1


def split_override(override: str, form: str) -> tuple[str, Any]:
    """Return name and value of ``name=value``.

    Raises ConfigError when it is not of this `form` or the value is not YAML.
    """
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r}: expected {form}")
    try:
        return key, read_yaml(text)
    except SettingsError as error:
        quoted = shlex.quote(f'{key}="{text}"')
        raise ConfigError(
            f"override {override!r}: the value is not YAML: {error}; text like this needs quotes of its own: {quoted}"
        ) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, value = split_override(override, "section.field=value")
    if not all(key.split(".")):
        raise ConfigError(f"override {override!r}: expected section.field=value")
    value = with_base(value, Path.cwd())
    *parents, leaf = key.split(".")
    node = data
    for parent in parents:
        if node.get(parent) is None:  # the section is missing, or null
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    node[leaf] = value


def _explained(cls: type[Config], problems: Iterable[Any]) -> list[str]:
    """Return one line for each field with problems.

    For a value of several possible types, pydantic reports a problem with each type. If one of these types is a list or
    a section with a wrong part, only the problem of that part is shown.
    """
    found: dict[str, list[Any]] = {}
    for problem in problems:
        location, _ = _place(cls, [str(part) for part in problem["loc"]])
        found.setdefault(".".join(location), []).append(problem)
    return [
        _explain(cls, name, those)
        for name, those in found.items()
        if not any(other.startswith(f"{name}.") for other in found)
    ]


def _explain(cls: type[Config], name: str, problems: list[Any]) -> str:
    """Return one line for pydantic's problems with one field: where, what, and what to do."""
    problem, *_ = problems
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name!r}{_nearest(cls, *reversed(_place(cls, [str(part) for part in problem['loc']])))}"
    if problem["type"] == "missing":
        return f"key {name!r} is required and missing"
    message = ", or ".join(_in_words(cls, each) for each in problems)
    given = problem.get("input")
    shown = (
        "" if isinstance(given, (dict, Config)) else redacted(f" (got {given!r}{_as_written(problem['type'], given)})")
    )
    return f"{name}: {message}{shown}" if name else message


def _in_words(cls: type[Config], problem: Any) -> str:
    """Return pydantic's message on one problem, in terms of a recipe instead of Python types."""
    kind = problem["type"]
    message = problem["msg"].removeprefix("Value error, ")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location, owner = _place(cls, [str(part) for part in problem["loc"]])
        kinds = _kinds(owner.model_fields[location[-1]].annotation) if owner else {}
        given = f", not {problem['ctx']['tag']!r}" if kind == "union_tag_invalid" else ""
        return f"{_tagged_by(kinds)} must be one of {', '.join(kinds)}{given}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "input should be a section, with fields of its own"
    message = message.replace("a valid tuple", "a list").replace("a valid list", "a list")
    return message[0].lower() + message[1:]


def _tagged_by(kinds: dict[str, type[Config]]) -> str:
    """Return the name of the field that gives the kind of a section."""
    return next(
        name
        for tag, section in kinds.items()
        for name, field in section.model_fields.items()
        if tag in get_args(field.annotation)
    )


def _as_written(problem: str, given: Any) -> str:
    """Return a hint for a value that YAML reads differently from what a person would expect."""
    if problem == "string_type" and isinstance(given, (bool, int, float)):
        return "; put it in quotes if it is text"
    if problem in ("int_parsing", "float_parsing") and re.fullmatch(r"[\d.]+\s?[kKmMgGtTbB]i?", str(given)):
        suffix = str(given).lstrip("0123456789. ")
        return f"; write the number out, or as 1e3: the suffix {suffix!r} is not accepted"
    return ""


def _nearest(cls: type[Config], owner: type[Config] | None, location: list[str]) -> str:
    """Return a hint for an unknown key: the closest sibling, else the closest field anywhere, else all siblings."""
    *parents, leaf = location
    siblings = list(owner.model_fields) if owner else []
    prefix = "".join(f"{parent}." for parent in parents)
    close = nearest(leaf, siblings)
    if close:
        return f": did you mean {prefix + close!r}?"
    every = [name for name, *_ in fields(cls) if "[]" not in name]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(every)}
    elsewhere = nearest(leaf, by_leaf, cutoff=0.8)
    if elsewhere and by_leaf[elsewhere] != ".".join(location):  # equal: another kind of the section has the key
        return f": did you mean {by_leaf[elsewhere]!r}?"
    return f"; known there: {', '.join(siblings)}" if siblings else ""


def _place(cls: type[Config], location: list[str]) -> tuple[list[str], type[Config] | None]:
    """Return a location as the user wrote it, and the class of its last key.

    Pydantic's tags of kinds and types are removed.
    """
    written: list[str] = []
    owner: type[Config] | None = cls
    section: type[Config] | None = cls
    kinds: dict[str, type[Config]] = {}
    typed = False  # whether the next part is pydantic's name of one of several possible types
    for part in location:
        if part in kinds:
            section, kinds = kinds[part], {}
            continue
        if typed:
            typed = False
            continue
        written.append(part)
        if part.isdigit():  # an index into a list of sections of the same class
            continue
        owner = section
        field = owner.model_fields.get(part) if owner else None
        kinds = _kinds(field.annotation) if field else {}
        typed = field is not None and not kinds and _of_several(field.annotation)
        section = kinds.get("") or (_listed(field.annotation) if field else None)
    return written, owner
