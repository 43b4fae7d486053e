"""The results of a packed sweep: a table, and the run directories without weights, in a few small files."""

from __future__ import annotations

import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_base.files import atomic_file, write_text
from bst_dist.checkpoint.directory import committed
from bst_dist.report.metrics import FILE
from bst_dist.study.runs.state import RUNS, State
from bst_dist.study.sweep import table
from bst_dist.study.sweep.table import Row
from bst_dist.train.rundir import DS_CONFIG, ENVIRONMENT, OUTCOME, RECIPE, read_outcome

MOST_BYTES = 15_000_000
PARTS = 4
"""Maximum number of archives of run directories. With table.json, table.csv, summary.json, log.txt: eight files."""
KEPT = (RECIPE, DS_CONFIG, ENVIRONMENT, FILE, OUTCOME)
LOG_BYTES = 2_000_000


def write(out: Path, rows: list[Row], state: State, names: Iterable[str], summary: dict[str, Any], log: str) -> None:
    """Write all result files, each atomically. `names` are the runs in order of value.

    Runs that do not fit into the archives are left out, and summary.json lists them.
    """
    out.mkdir(parents=True, exist_ok=True)
    table.write(rows, out / "table.json")
    table.write_csv(rows, out / "table.csv")
    parts, left_out = _parts([name for name in names if (state.directory(name) / RECIPE).exists()], state)
    for number in range(PARTS):
        path = out / f"runs-{number + 1}.tar.xz"
        if number < len(parts):
            with atomic_file(path) as file:
                file.write(parts[number])
        else:
            path.unlink(missing_ok=True)
    write_text(out / "summary.json", json.dumps({**summary, "left_out": left_out}, indent=2) + "\n")
    write_text(out / "log.txt", log[-LOG_BYTES:])


def restore(folder: Path, state: State, wanted: Callable[[str], bool]) -> list[str]:
    """Unpack the wanted run directories that are finished and not yet present; return their names.

    Raises UserError if the folder holds no results, or damaged ones.
    """
    archives = sorted(folder.glob("runs-*.tar.xz"))
    if not archives:
        raise UserError(f"{folder}: no results of a packed sweep there (runs-1.tar.xz is missing)")
    found: list[str] = []
    for archive in archives:
        try:
            found += _unpack(archive, state, wanted)
        except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
            raise UserError(f"{archive}: damaged ({error}): copy it again") from None
    return found


def finished(directory: Path) -> bool:
    """Whether a run is done or has diverged."""
    outcome = read_outcome(directory) or {}
    return bool(outcome.get("finished") or outcome.get("diverged"))


def _parts(names: Sequence[str], state: State) -> tuple[list[bytes], list[str]]:
    """Return at most PARTS archives of at most MOST_BYTES bytes, and the names of runs that do not fit."""
    parts: list[bytes] = []
    waiting = list(names)
    while waiting and len(parts) < PARTS:
        count = len(waiting)
        while len(data := _archive(waiting[:count], state)) > MOST_BYTES and count > 1:
            count = max(1, int(count * 0.9 * MOST_BYTES / len(data)))
        if len(data) > MOST_BYTES:
            break
        parts.append(data)
        waiting = waiting[count:]
    return parts, waiting


def _archive(names: Iterable[str], state: State) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name in names:
            files = [state.directory(name) / file for file in KEPT] + [state.path("attempts", name)]
            for file in files:
                if file.exists():
                    data = file.read_bytes()  # read first: the run may still append, and the archive needs the size
                    member = tarfile.TarInfo(file.relative_to(state.root).as_posix())
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return lzma.compress(raw.getvalue(), preset=3)


def _unpack(archive: Path, state: State, wanted: Callable[[str], bool]) -> list[str]:
    found = []
    with tarfile.open(archive, "r:xz") as tar:
        members: dict[str, list[tarfile.TarInfo]] = {}
        for member in tar.getmembers():
            kind, name = Path(member.name).parts[:2]
            members.setdefault(name.removesuffix(".jsonl") if kind != RUNS else name, []).append(member)
        for name, own in members.items():
            if wanted(name) and not finished(state.directory(name)):
                found += _put_in(tar, own, name, state)
    return found


def _put_in(tar: tarfile.TarFile, members: list[tarfile.TarInfo], name: str, state: State) -> list[str]:
    """Put in the run directory if the run is finished there; put in its file of attempts in any case."""
    partial, kept = State(state.root / "partial", 0), []
    shutil.rmtree(partial.root, ignore_errors=True)
    tar.extractall(partial.root, members, filter="data")
    if partial.path("attempts", name).exists():
        state.path("attempts", name).parent.mkdir(parents=True, exist_ok=True)
        partial.path("attempts", name).replace(state.path("attempts", name))
    if finished(partial.directory(name)) and not committed(state.directory(name)):
        state.directory(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(state.directory(name), ignore_errors=True)
        partial.directory(name).replace(state.directory(name))
        kept = [name]
    shutil.rmtree(partial.root)
    return kept
