"""Versions of the software that produced a result."""

from __future__ import annotations

import platform
import subprocess
import tomllib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "bst-dist"
COMMIT = "bst_dist/commit.txt"
"""The file with the commit of a copy of this code, as `bst sweep pack` makes it; relative to the folder of packages."""
PACKAGES = ("torch", "deepspeed", "webdataset", "sentencepiece", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python, of the packages that affect a run's numbers, and of this code."""
    found = {"bst_dist": own_version(), "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def own_version() -> str:
    """Return the version of the installed project; if it is only on the path, the version in its pyproject.toml."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        path = _root() / "pyproject.toml"
        said = tomllib.loads(path.read_text(encoding="utf-8"))["project"] if path.is_file() else {}
        own = said.get("name") == DISTRIBUTION  # False: this package was copied into another project
        return f"{said['version']} (not installed)" if own else "not installed"


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


def _commit() -> str | None:
    """Return the checkout's commit, with ``-dirty`` when the work tree differs, or that which a copy was made from.

    None for an installed package.
    """
    root = _root()
    if not (root / ".git").exists():
        return (root / COMMIT).read_text(encoding="utf-8").strip() if (root / COMMIT).is_file() else None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
