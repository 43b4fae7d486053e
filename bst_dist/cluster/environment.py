"""The environment variables that ranks on all hosts get: from the launching process, and from `.deepspeed_env`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template

from bst_base.addresses import SECRET, redacted
from bst_base.errors import UserError

PREFIXES = (
    "NCCL_",
    "RCCL_",
    "GLOO_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
    "DS_",
    "DEEPSPEED_",
    "CUDA_",
    "CUBLAS_",
    "HIP_",
    "HSA_",
    "MIOPEN_",
    "OMP_",
    "MKL_",
    "UCX_",
    "FI_",
    "PYTHON",
    "AWS_",
    "WANDB_",
    "MLFLOW_",
)
NAMES = ("LD_LIBRARY_PATH",)
OF_ONE_HOST = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
"""Variables that are valid on one host only and are not passed on."""
FILE = ".deepspeed_env"
FILE_VARIABLE = "DS_ENV_FILE"
"""The variable that names another file; DeepSpeed uses it too."""


class EnvironmentFileError(UserError):
    """An invalid file of environment variables, or one that was named and does not exist."""


def collect_environment(environment: Mapping[str, str], directories: Sequence[Path] | None = None) -> dict[str, str]:
    """Return the variables that the ranks get: those in the files, overridden by those in `environment` to pass on.

    Call it before anything changes the environment: changes for this process (for example to import DeepSpeed without
    an accelerator) must not reach the ranks. Raises EnvironmentFileError.
    """
    found: dict[str, str] = {}
    tried = directories if directories is not None else (Path.home(), Path.cwd())
    paths = dict.fromkeys(directory / environment.get(FILE_VARIABLE, FILE) for directory in tried)
    if FILE_VARIABLE in environment and not any(path.is_file() for path in paths):
        named = f"{FILE_VARIABLE}={environment[FILE_VARIABLE]}"
        raise EnvironmentFileError(f"{named}: no such file: {', '.join(map(str, paths))}")
    for path in paths:
        if path.is_file():
            found |= read_file(path, environment)
    concerns = {name: value for name, value in environment.items() if name.startswith(PREFIXES) or name in NAMES}
    return found | {name: value for name, value in concerns.items() if name not in OF_ONE_HOST}


def read_file(path: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Read the variables of a file in the forms that DeepSpeed's launcher accepts.

    A line is ``NAME=value``, optionally after ``export``, with spaces around ``=``, or with a quoted value. ``$NAME``
    is replaced by a variable of `environment`.
    """
    return dict(_variables(path, environment))


def _variables(path: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, sign, value = text.removeprefix("export ").partition("=")
        if not sign or not name.strip().isidentifier():
            raise EnvironmentFileError(f"{path}:{number}: {name.strip()!r} sets no variable: write NAME=value")
        try:
            words = shlex.split(value, comments=True)
        except ValueError as error:
            raise EnvironmentFileError(f"{path}:{number}: {name.strip()}: {error}") from None
        yield name.strip(), Template(" ".join(words)).safe_substitute(environment)


def explain_not_passed_on(environment: Mapping[str, str]) -> list[str]:
    """Return a message for each variable that users might expect on the hosts but that is not passed on."""
    return [
        f"{name}={environment[name]} applies to this machine only and is not passed on; write devices=0,1 after a "
        "host's slots to choose its devices"
        for name in OF_ONE_HOST
        if name in environment
    ]


def format_environment(environment: Mapping[str, str]) -> str:
    """Return the variables as text in alphabetical order, with secrets hidden, also those in addresses."""
    hidden = {name: "..." if _secret(name) else redacted(value) for name, value in environment.items()}
    return " ".join(f"{name}={value}" for name, value in sorted(hidden.items()))


def _secret(name: str) -> bool:
    """Whether a variable's name says that it holds a secret. Users choose these names, so any kind of key counts."""
    return bool(SECRET.search(name)) or "key" in name.lower()
