"""Making a packed folder: code, wheels, corpora, DeepSpeed files, the runs in order of value, and the command."""

from __future__ import annotations

import lzma
import shutil
import tarfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import bst_dist
from bst_base.errors import UserError
from bst_base.files import atomic_directory
from bst_base.shipped import STRATEGIES, root
from bst_dist.config import Recipe, deepspeed_file
from bst_dist.study.pack import start
from bst_dist.study.pack.contents import SIDE_BY_SIDE, Pack, described
from bst_dist.study.pack.order import in_order_of_value
from bst_dist.study.pack.wheels import PROJECT, gather
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.design import Run
from bst_dist.version import COMMIT, versions
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import open_corpora

PACKAGES = ("bst_base", "bst_dist", "data_pipeline")
NOT_CARRIED = shutil.ignore_patterns("__pycache__", ".lock", "skipped.jsonl")


def make(
    sweep: SweepConfig, runs: Sequence[Run], folder: Path, minutes: float, pythons: Sequence[str], most_bytes: int
) -> Pack:
    """Write the folder atomically; raises UserError if the sweep cannot be packed or the folder would be too large."""
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or give another --output")
    _require_packable(sweep, runs)

    def price_s(run: Run) -> float:  # start times overlap, because several runs share the device
        return run.own_flops / sweep.budget.flops_per_s + sweep.budget.start_s / SIDE_BY_SIDE

    ordered = in_order_of_value(runs, price_s, sweep.noise, sweep.baseline)
    with atomic_directory(folder) as new:
        gather(new / "wheels", pythons)  # first, because it raises the error if the project is not installed
        (new / "code").mkdir()
        _copy_code(new / "code")
        recipes, corpora, strategies = _moved([run.recipe for run in ordered])
        _compress(corpora, strategies, new / start.DATA)
        pack = Pack(
            sweep.name,
            versions(),
            sweep.retries,
            minutes,
            _reached(ordered, price_s, minutes),
            described(ordered, recipes, sweep.baseline),
        )
        pack.write(new)
        _write_commands(new, pythons, minutes)
        _require_size(new, most_bytes)
    return pack


def _require_packable(sweep: SweepConfig, runs: Sequence[Run]) -> None:
    """Raise UserError for a sweep that cannot be packed."""
    if sweep.budget.flops_per_s is None:
        raise UserError(
            "set budget.flops_per_s (training FLOP/s of one device, summed over the runs that train on it side by "
            "side): the order of the runs is computed from it"
        )
    if any(run.recipe.initial_weights for run in runs):
        raise UserError("initial_weights: the weights of another run are not packed")
    several = next((run for run in runs if (run.recipe.ranks or 1) > 1), None)
    if several:
        raise UserError(f"runs of {several.recipe.ranks} ranks are not packed: give ranks: 1 in the base recipe")


def _require_size(folder: Path, most_bytes: int) -> None:
    """Raise UserError if the folder is larger than allowed."""
    if (size := size_of(folder)) > most_bytes:
        text = (folder / start.DATA).stat().st_size
        raise UserError(
            f"the folder would have {size / 1e6:.1f} MB, of which {text / 1e6:.1f} MB are the corpus, compressed; "
            f"{most_bytes / 1e6:.0f} MB are allowed (--most-mb): prepare a smaller corpus"
        )


def size_of(folder: Path) -> int:
    """Return the total size of all files in a folder in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _copy_code(target: Path) -> None:
    """Copy this program so that it can be imported without installation, and write down its commit."""
    source = Path(bst_dist.__file__).parents[1]
    for name in PACKAGES:
        shutil.copytree(source / name, target / name, ignore=NOT_CARRIED)
    if root() == source:  # a checkout; in an installed program the packages contain these files
        shutil.copytree(source / STRATEGIES, target / STRATEGIES)
        shutil.copytree(source / "launch", target / "launch")
    if commit := versions().get("commit"):
        (target / COMMIT).write_text(commit + "\n")
    about = target / f"{PROJECT.replace('-', '_')}-{metadata.version(PROJECT)}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(metadata.distribution(PROJECT).read_text("METADATA") or "")


def _moved(recipes: Sequence[Recipe]) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[Path, str]]:
    """Return the recipes with paths inside the folder, and for corpora and DeepSpeed files: source -> path there."""
    corpora: dict[str, str] = {}
    strategies: dict[Path, str] = {}
    found = {}
    for recipe in recipes:
        data = recipe.model_dump(mode="json")
        if isinstance(recipe.data, DataConfig):
            new = [corpora.setdefault(url, f"corpora/{len(corpora)}-{Path(url).name}") for url in recipe.data.urls()]
            if isinstance(data["data"]["corpus"], str):
                data["data"]["corpus"] = new[0]
            else:
                for corpus, place in zip(data["data"]["corpus"], new, strict=True):
                    corpus["corpus"] = place
        file = deepspeed_file(recipe)
        data["deepspeed"] = strategies.setdefault(file, f"deepspeed/{len(strategies)}-{file.name}")
        data["log"]["tensorboard"] = False  # tensorboard is not packed; the metrics are in metrics.jsonl
        found[recipe.name] = data
        if any("://" in url for url in corpora):
            raise UserError(f"{next(iter(corpora))}: only corpora on this machine's disk are packed")
    if corpora:  # raises UserError for a missing corpus
        for url in corpora:
            open_corpora(DataConfig(corpus=url), "train")
    return found, corpora, strategies


def _compress(corpora: dict[str, str], strategies: dict[Path, str], path: Path) -> None:
    """Write corpora and DeepSpeed files into one archive. The LZMA parameters suit tokens of two bytes."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26, "lc": 1, "lp": 1, "pb": 1}]
    with lzma.open(path, "w", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for url, place in corpora.items():
            for file in sorted(Path(url).iterdir()):
                if file.is_file() and file.name not in NOT_CARRIED(url, [file.name]):
                    tar.add(file, f"{place}/{file.name}")
        for file, place in strategies.items():
            tar.add(file, place)


def _reached(ordered: Sequence[Run], price_s: Any, minutes: float) -> int:
    left, count = minutes * 60, 0
    for run in ordered:
        left -= price_s(run)
        if left < 0:
            break
        count += 1
    return count


def _write_commands(folder: Path, pythons: Sequence[str], minutes: float) -> None:
    shutil.copy(start.__file__, folder / "run.py")
    (folder / "pythons").write_text("\n".join(pythons) + "\n")
    (folder / "run.sh").write_text('#!/bin/sh\nexec "${PYTHON:-python3}" "$(dirname "$0")/run.py" "$@"\n')
    (folder / "run.sh").chmod(0o755)
    (folder / "README.md").write_text(f"""# A sweep in a folder

    ./run.sh --minutes 9 --out results

Needs Python {" or ".join(pythons)}, torch (2.11 or newer) and numpy, but no network. It trains the runs of pack.json in
order, several side by side on each GPU, for this many minutes, and leaves at most eight files of at most 16 MB in
`--out`. Start it again to continue; it is meant for about {minutes:g} minutes in total. `--state DIR` unpacks and
trains in another folder than this one. On another machine, `--results DIR` (the files of an earlier `--out`) skips the
runs that are already done.
""")
