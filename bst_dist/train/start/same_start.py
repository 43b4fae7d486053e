"""Checks that all ranks were asked for the same run.

Without `bst launch`, nothing else compares the hosts. A rank with another recipe or corpus would train something else
than the others without an error, and one with another `evaluation.every` or `checkpoint.every` would wait for the
others in another collective until the watchdog ends the job.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from typing import Any

from bst_base.errors import StorageError, UserError
from bst_dist.config import flat
from bst_dist.parallel.ranks import Ranks
from bst_dist.train.start.changes import listed
from bst_dist.train.start.request import Request, Start
from data_pipeline.serve.config import DataConfig

OF_A_HOST = (
    "ranks",
    "paths_from",
    "data.corpus",
    "data.examples",
    "data.storage.",
    "evaluation.corpora.",
    "initial_weights.run",
    "deepspeed",
    "checkpoint.local_directory",
)
"""Settings that hosts may have different values of: where they find things, and how they read them. A name that ends
in a dot stands for all settings below it. What is found there is compared: the corpora by their digests, the completed
DeepSpeed JSON by its settings. Weights and trunk are read by rank 0, or compared as checkpoints."""
PATH_OF_A_DRIVE = "nvme_path"
"""The setting in a DeepSpeed JSON that says where a host has its drive."""
OF_THE_DIRECTORY = "changed since the last start"


def require_same(start: Start, request: Request, ranks: Ranks) -> None:
    """Raise on all ranks unless all have the same settings, data and arguments; every rank calls it.

    UserError names a rank that differs, its host, and the first settings that do. It is StorageError when the hosts
    only see another recipe in the run directory. The ranks exchange digests; only if these differ, one rank for each
    digest sends its settings.
    """
    own = compared(start, request)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    digests, hosts = zip(*ranks.all_gather_object((digest, socket.gethostname())), strict=True)
    if len(set(digests)) == 1:
        return
    sent = ranks.all_gather_object(own if digests.index(digest) == ranks.rank else None)
    common = digests.index(Counter(digests).most_common(1)[0][0])
    other = next(rank for rank, found in enumerate(digests) if found != digests[common])
    lines = _differences(sent[other], sent[common])
    this, that = f"rank {other} on {hosts[other]}", f"rank {common} on {hosts[common]}"
    if all(line.startswith(OF_THE_DIRECTORY) for line in lines):
        head = f"{start.run_dir}: {this} sees another recipe in it than {that}: is the file system mounted on both?"
        raise StorageError(listed(f"{head} What differs (rank {other}, rank {common}):", lines))
    head = f"{this} was asked for another run than {that}: give all ranks the same recipe, data and arguments."
    raise UserError(listed(f"{head} What differs (rank {other}, rank {common}):", lines))


def compared(start: Start, request: Request) -> dict[str, Any]:
    """Return what must be equal on all ranks, by name: settings of the recipe, of DeepSpeed, digests, arguments."""
    recipe = flat(start.recipe.model_dump(mode="json"))
    settings = {name: value for name, value in recipe.items() if not _of_a_host(name)}
    data = start.recipe.data
    weights = {"data.weights": [list(each) for _, each in data.segments()]} if isinstance(data, DataConfig) else {}
    deepspeed = {
        f"DeepSpeed: {name}": value
        for name, value in flat(start.completed).items()
        if not name.endswith(PATH_OF_A_DRIVE)
    }
    arguments = {
        "--run-dir": str(start.run_dir),
        "--until": start.until,
        "--resume": request.resume,
        "--from-zero": request.from_zero,
        "--replan-schedule": request.replan,
        OF_THE_DIRECTORY: list(start.changed),
    }
    return settings | weights | start.objective.digests() | deepspeed | arguments


def _of_a_host(name: str) -> bool:
    return any(name == one or (one.endswith(".") and name.startswith(one)) for one in OF_A_HOST)


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    names = [name for name in {**other, **one} if one.get(name) != other.get(name)]
    return [f"{name}: {one.get(name)!r}, {other.get(name)!r}" for name in names]
