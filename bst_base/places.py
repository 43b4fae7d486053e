"""Relative paths in settings files: each counts from a fixed folder, not from the working directory.

`with_base` marks the strings of a file with that folder. The value of a `LocalPath` or `Address` field is then an
absolute path; `~` at its beginning is the home directory. When the settings are written or compared, it appears as it
was written in the file. A relative path that counts from another folder than the rest (in an override: from the working
directory) is written out as an absolute path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator

from bst_base.errors import UserError

T = TypeVar("T")


class StringWithBase(str):
    """A string of a settings file, with the folder from which it counts if it is a relative path."""

    base: Path
    elsewhere: bool
    """Whether `base` differs from the folder of the settings as a whole."""

    @classmethod
    def of(cls, text: str, base: Path, elsewhere: bool = False) -> StringWithBase:
        marked = cls(text)
        marked.base, marked.elsewhere = base, elsewhere
        return marked


class ResolvedAddress(str):
    """An absolute path that was written as a relative one."""

    written: str


class ResolvedPath(type(Path())):
    """The same as a Path."""

    written: Path


def with_base(data: T, base: Path) -> T:
    """Mark the strings in settings from YAML: relative paths among them count from `base`.

    Strings that are already marked with another folder keep it.
    """
    if isinstance(data, dict):
        return {key: with_base(value, base) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [with_base(value, base) for value in data]
    if isinstance(data, StringWithBase):
        return StringWithBase.of(data, data.base, elsewhere=data.base != base)
    return StringWithBase.of(data, base) if isinstance(data, str) else data


def written(value: T) -> T:
    """Return a path as it was written in the settings."""
    return getattr(value, "written", value)


def with_home(path: str | Path) -> Path:
    """Return a path with `~` at its beginning replaced by the home directory; raises UserError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from None


def _resolve(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    found = validate(value)
    if str(value).startswith("~"):
        return _resolved(found, str(with_home(value)))
    if not isinstance(value, StringWithBase) or not _is_relative(value):
        return found
    absolute = str(value.base / value)
    return type(found)(absolute) if value.elsewhere else _resolved(found, absolute)


def _resolve_path(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    return _resolve(value, validate) if Path(str(value)).suffix or "/" in str(value) else validate(value)


def _resolved(found: Any, absolute: str) -> Any:
    """Return an absolute path that is written to settings files as `found`, and of the same type."""
    result = ResolvedPath(absolute) if isinstance(found, Path) else ResolvedAddress(absolute)
    result.written = found
    return result


def _is_relative(text: str) -> bool:
    """Whether the text is a relative path: no address, command or path from the home directory."""
    return not ("://" in text or text.startswith(("pipe:", "~", "/")))


_RESOLVED = (WrapValidator(_resolve), PlainSerializer(written))
LocalPath: TypeAlias = Annotated[Path, *_RESOLVED]
"""A file or directory. A relative path counts from the folder of the settings file."""
Address: TypeAlias = Annotated[str, *_RESOLVED]
"""A directory, or the address of one."""
NameOrPath: TypeAlias = Annotated[str, WrapValidator(_resolve_path), PlainSerializer(written)]
"""A name, which stays as it is, or the path of a file, which has a suffix or a slash."""
