"""Packages that only some roles need (the extras of pyproject.toml), and what to say where one is missing."""

from __future__ import annotations

EXTRAS = {
    "train": ("deepspeed", "tensorboard"),
    "data": ("webdataset", "mpi4py", "rensa", "pyarrow", "backports", "aiohttp", "s3fs"),
    "study": ("cpuinfo",),
    "hub": ("transformers",),
    "harness": ("lm_eval",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
"""The modules of each extra, by the name that they are imported by."""


def missing(module: str) -> str | None:
    """How to install what brings a module; None when no extra does."""
    top = module.partition(".")[0]
    extra = next((name for name, modules in EXTRAS.items() if top in modules), None)
    return extra and f"{top} is not installed: pip install 'bst-dist[{extra}]'"
