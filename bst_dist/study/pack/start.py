"""Train the runs of this folder: install the packed wheels into a separate folder, then start the program.

    ./run.sh --minutes 9 --out results

Needs Python, torch, numpy and pip, but no network. A second call continues. `--help` lists the other options.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

DATA = "data.tar.xz"


def main(argv: list[str]) -> str:
    """Unpack and install at the first call, then replace this process by the program; return an error message."""
    folder = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(prog="run.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("--state", type=Path, metavar="DIR", default=folder / "state")
    state = parser.parse_known_args(argv)[0].state.resolve()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    known = (folder / "pythons").read_text().split()
    if python not in known:
        return (
            f"this is Python {python}, and the folder has packages for {' and '.join(known)}: set PYTHON, or make "
            f"the folder again with --python {python}"
        )
    for name in ("torch", "numpy"):
        try:
            __import__(name)
        except ImportError as error:
            return f"{sys.executable} has no {name} ({error}): set PYTHON to one that has"
    if not (state / "packages").exists() and (problem := _install(folder / "wheels", state / "packages")):
        return problem
    if not (state / "data").exists():
        _unpack(folder / DATA, state / "data")
    before = os.environ.get("PYTHONPATH")
    paths = [str(folder / "code"), str(state / "packages"), *([before] if before else [])]
    # pip has compiled nothing, so bytecode is written at import, and processes that start later reuse it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": ""}
    program = [sys.executable, "-m", "bst_dist.study.pack.machine", str(folder), *argv, "--state", str(state)]
    return os.execve(sys.executable, program, environment)


def _install(wheels: Path, target: Path) -> str:
    """Install all wheels into a folder atomically; return an error message, empty on success."""
    names = sorted({wheel.name.split("-")[0] for wheel in wheels.glob("*.whl")})
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--find-links",
        str(wheels),
        "--target",
        str(partial),
        *names,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"pip could not install the wheels of {wheels}:\n{done.stdout}{done.stderr}"
    partial.rename(target)
    return ""


def _unpack(archive: Path, target: Path) -> None:
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with lzma.open(archive) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
        tar.extractall(partial, filter="data")
    partial.rename(target)


if __name__ == "__main__":
    sys.exit(f"run.py: {main(sys.argv[1:])}")
