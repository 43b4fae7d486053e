"""What a result was made with."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "webdataset", "sentencepiece", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that decide a run's numbers, and of this code."""
    found = {"bst_dist": metadata.version("bst-dist"), "python": platform.python_version()}
    installed = {distribution.name for distribution in metadata.distributions()}
    found |= {name: metadata.version(name) for name in PACKAGES if name in installed}
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def _commit() -> str | None:
    """The checkout's commit, with ``-dirty`` when the work tree differs; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
