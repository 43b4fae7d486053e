"""The packages that training needs besides torch and numpy, as wheels that pip installs without a network.

Wheels are rebuilt from the packages installed here, which are the tested ones, if they run on the other Python too.
Compiled packages for another Python version are downloaded with pip.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bst_base.errors import UserError

PROJECT, EXTRA = "bst-dist", "train"
PRESENT = {"torch", "numpy"}
"""Packages that must be installed on the other machine."""
UNUSED = {"scipy", "matplotlib", "pillow", "tensorboard", "huggingface-hub"}
"""Packages for fits, figures, images and downloads, which training on the other machine does not use."""
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_12_x86_64",
    "manylinux2010_x86_64",
)


def gather(folder: Path, pythons: Sequence[str], also: Sequence[str] = ()) -> list[str]:
    """Write wheels into `folder` for these Python versions, of the packages that training and `also` need.

    Return the sorted names of the packages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = needed(pythons, also)
    for name in names:
        distribution = metadata.distribution(name)
        if _is_pure(distribution):
            rebuild(distribution, folder)
            continue
        if HERE in pythons:
            rebuild(distribution, folder)
        for python in pythons:
            if python != HERE:
                _fetch(name, distribution.version, python, folder)
    return names


def needed(pythons: Sequence[str], also: Sequence[str] = ()) -> list[str]:
    """Return the sorted names of the packages that training and `also` need, with all dependencies.

    Packages in PRESENT and UNUSED are left out.
    """
    found, waiting = set(), [*_requirements(PROJECT, pythons, EXTRA), *also]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found | PRESENT | UNUSED:
            found.add(name)
            waiting += _requirements(name, pythons)
    return sorted(found)


def rebuild(distribution: metadata.Distribution, folder: Path) -> Path:
    """Build a wheel of an installed package from its files; raises UserError if a file is missing."""
    name = f"{distribution.metadata['Name'].replace('-', '_')}-{distribution.version}"
    parts = zip(*(tag.split("-") for tag in _tags(distribution)), strict=True)  # Pythons, ABIs, platforms
    path = folder / ("-".join([name, *(".".join(dict.fromkeys(part)) for part in parts)]) + ".whl")
    records = io.StringIO()
    listing = csv.writer(records, lineterminator="\n")
    record = ""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in distribution.files or ():
            inside = file.as_posix()
            if inside.startswith("..") or inside.endswith(".pyc"):
                continue  # scripts, which pip creates again, and bytecode
            if file.name == "RECORD":
                record = inside
                continue
            if not file.locate().is_file():
                raise UserError(f"{name}: {inside} is missing: install it again, to be packed")
            data = file.locate().read_bytes()
            wheel.writestr(zipfile.ZipInfo(inside, (2020, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            listing.writerow([inside, f"sha256={digest}", len(data)])
        if not record:
            raise UserError(f"{name}: was not installed by pip, so its files are not known: install it with pip")
        listing.writerow([record, "", ""])
        wheel.writestr(record, records.getvalue())
    return path


def _requirements(name: str, pythons: Sequence[str], extra: str = "") -> list[str]:
    """Return the names of the packages that a package requires under any of these Python versions."""
    try:
        lines = metadata.distribution(name).requires or []
    except metadata.PackageNotFoundError:
        raise UserError(f"{name} is not installed, so it cannot be packed: pip install '{PROJECT}[{EXTRA}]'") from None
    return [r.name for r in map(Requirement, lines) if _wanted(r, pythons, extra)]


def _wanted(requirement: Requirement, pythons: Iterable[str], extra: str) -> bool:
    return requirement.marker is None or any(
        requirement.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0", "extra": extra})
        for python in pythons
    )


def _tags(distribution: metadata.Distribution) -> list[str]:
    lines = (distribution.read_text("WHEEL") or "").splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("Tag: ")] or ["py3-none-any"]


def _is_pure(distribution: metadata.Distribution) -> bool:
    """Whether the package runs on any Python version; raises UserError for a DeepSpeed with compiled operators."""
    compiled = [file.name for file in distribution.files or () if file.suffix == ".so"]
    if distribution.metadata["Name"] == "deepspeed" and compiled:
        raise UserError(
            f"the DeepSpeed installed here has compiled operators ({compiled[0]}), which fit one machine alone: pack "
            "from an environment where it was installed with DS_BUILD_OPS=0"
        )
    return _tags(distribution)[0].endswith("-none-any")


def _fetch(name: str, version: str, python: str, folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={python}",
        "-d",
        str(folder),
        *(f"--platform={platform}" for platform in PLATFORMS),
        f"{name}=={version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(f"no wheel of {name} {version} for Python {python}: {said}")
