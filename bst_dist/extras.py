"""Optional packages (the extras of pyproject.toml), and the message when one is missing."""

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
"""Extra -> the names under which its modules are imported."""


def install_hint(module: str) -> str | None:
    """Return how to install a missing module; None when no extra contains it."""
    top = module.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if top in modules:
            return f"{top} is not installed: pip install 'bst-dist[{extra}]'"
    return None
