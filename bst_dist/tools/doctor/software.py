"""Checks of the software: Python, packages, this project, compilers, and the kernels that DeepSpeed can compile."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata

from bst_base import shipped
from bst_dist.tools.doctor.finding import Finding, ask, ask_python, broken, good, lacking
from bst_dist.version import DISTRIBUTION, versions

OLDEST_PYTHON = (3, 11)
# Packages that every run needs. The others are for some corpora, launchers and reports.
NEEDED = (
    "torch",
    "deepspeed",
    "numpy",
    "pydantic",
    "pyyaml",
    "rich",
    "safetensors",
    "sentencepiece",
    "fsspec",
    "webdataset",
    "tensorboard",
    "psutil",
    "isal",
)
NAMED = ("torch", "deepspeed", "webdataset", "sentencepiece", "mpi4py")

_OPERATORS = """
import json, os
import torch
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
from deepspeed.ops.op_builder.all_ops import ALL_OPS
found = {}
for name, builder in ALL_OPS.items():
    try:
        found[name] = bool(builder.is_compatible(verbose=False))
    except Exception:
        found[name] = False
print(json.dumps(found))
"""


def python() -> Iterator[Finding]:
    """Check the version of Python."""
    text = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield broken(f"{text}: {oldest} or later is needed", "make setup PYTHON=python3.11")
    else:
        yield good(text)


def packages() -> Iterator[Finding]:
    """Check the pinned packages: which are missing, and which have another version."""
    pinned = requirements()
    found = {}
    for name in pinned:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            kind = broken if name in NEEDED else lacking
            yield kind(f"{name} is missing", f"pip install {name}=={pinned[name]}")
    other = {name: version for name, version in found.items() if version.partition("+")[0] != pinned[name]}
    for name, version in other.items():
        yield lacking(f"{name} {version} (tested: {pinned[name]})", f"pip install {name}=={pinned[name]}")
    named = ", ".join(f"{name} {found[name]}" for name in NAMED if name in found)
    if len(found) > len(other):
        yield good(f"{named}; {len(found) - len(other)} of {len(pinned)} as pinned in requirements.txt")


def extras() -> Iterator[Finding]:
    """Check the packages that only some commands need, with the extra that installs each."""
    try:
        requires = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield lacking("the project is on the path and not installed: what its extras need is not known", "make setup")
        return
    for requirement in requires:
        name = _name(requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        if not extra or name in requirements():
            continue
        try:
            yield good(f"{name} {metadata.version(name)} ({extra[1]})")
        except metadata.PackageNotFoundError:
            yield lacking(f"{name} is not installed (extra {extra[1]})", f"pip install 'bst-dist[{extra[1]}]'")


def project() -> Iterator[Finding]:
    """Report the version of this code, and where its recipes and strategies are."""
    found = versions()
    text = f"bst_dist {found['bst_dist']}" + (f", commit {found['commit']}" if "commit" in found else "")
    yield good(f"{text}; recipes and DeepSpeed strategies in {shipped.root()}")


def compilers() -> Iterator[Finding]:
    """Check the compilers: DeepSpeed compiles a kernel at its first use, torch compiles attention for a GPU."""
    tools = {"g++": ("g++", "--version"), "ninja": ("ninja", "--version"), "nvcc": ("nvcc", "--version")}
    said = {name: ask(command).said for name, command in tools.items() if shutil.which(name)}
    there = [f"{name} {_release(text)}" for name, text in said.items()]
    if "g++" in said:
        yield good(", ".join(there) + ("" if "nvcc" in said else "; no nvcc, which no strategy here needs"))
    else:
        yield lacking(
            "no g++: training on a GPU (torch compiles attention) and offloading to NVMe need it", "apt-get install g++"
        )
    if "ninja" not in said:
        yield lacking("no ninja: DeepSpeed compiles with it", "pip install ninja")


def operators() -> Iterator[Finding]:
    """Check DeepSpeed's kernels. The strategies in ds_configs/ use only one: async_io, for offload to NVMe."""
    compatible = ask_python(_OPERATORS)
    names = ", ".join(name for name, well in compatible.items() if well and name != "deepspeed_not_implemented")
    if compatible.get("async_io"):
        yield good(f"DeepSpeed could compile {names}")
    else:
        text = f"DeepSpeed could compile {names or 'nothing'}; not async_io, which only zero3_nvme_offload.json needs"
        yield lacking(text, "apt-get install libaio-dev")


def requirements() -> dict[str, str]:
    """Return the pinned (tested) version of each package."""
    lines = (shipped.root() / "requirements.txt").read_text().splitlines()
    pairs = [line.partition("#")[0].partition("==") for line in lines]
    return {_name(name): version.strip() for name, _, version in pairs if version}


def _name(requirement: str) -> str:
    """Return the package name of a requirement."""
    return re.split(r"[\[<>~!=; ]", requirement.strip())[0]


def _release(text: str) -> str:
    """Return the version from a compiler's `--version` output. nvcc prints its release after its copyright years."""
    found = re.search(r"release (\d+\.\d+)", text) or re.search(r"(\d+(?:\.\d+)+)", text)
    return found[1] if found else ""
