"""Measure what the project promises on one GPU, in one command of nine minutes; all figures go to one folder.

    bst bench gpu --output bench-gpu
    bst bench gpu --only layers stack
    bst bench gpu --small

Parts, each a process of its own with a time limit, independent of the others: layers (forward and
backward of one layer of every model, against the sliding layer), stack (tokens per second and MFU of whole models),
longest (the longest sequence that trains), generation (tokens per second), resume (whether a run that was stopped
and resumed equals one that was not, to the last bit). A part's figures are written when it ends: DIR/layers.json and so
on, with the card, its clock and the versions in DIR/machine.json.

Without a GPU it only rehearses, in small sizes (--small): that shows that the parts run; the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bst_base.files import write_json
from bst_base.terminal import Sheet, print_table, say
from bst_dist.tools.bench.gpu_parts import PARTS

LIMITS_S = {"layers": 240, "stack": 120, "longest": 60, "generation": 40, "resume": 70}
"""Seconds of each part, together less than nine minutes; a part is told of its own and leaves out what does not fit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("bench-gpu"), help="folder of all figures")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="small sizes, as always without a GPU: a rehearsal")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each part, print the figures, and return them all."""
    small = args.small or not torch.cuda.is_available()
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(small)}
    write_json(args.output / "machine.json", found["machine"])
    say(f"{found['machine']['device']}, torch {torch.__version__}" + (", small: a rehearsal" * small))
    for name in args.only or PARTS:
        found[name] = _in_a_process(name, small)
        write_json(args.output / f"{name}.json", found[name])
        _print(name, found[name])
    return found | {"passed": not any("failed" in found[name] for name in args.only or PARTS)}


def machine(small: bool) -> dict[str, Any]:
    """What was measured on; the clock is that of the moment, in MHz."""
    about: dict[str, Any] = {"device": "CPU", "torch": torch.__version__, "cuda": torch.version.cuda, "small": small}
    if torch.cuda.is_available():
        about |= {"device": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.mem_get_info()[1]}
        asked = "clocks.sm,clocks.max.sm,power.limit,driver_version"
        try:
            said = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"],
                                  check=True, capture_output=True, text=True, timeout=20).stdout  # fmt: skip
            about |= dict(zip(asked.split(","), said.splitlines()[0].split(", "), strict=True))
        except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
            about["nvidia-smi"] = f"did not answer: {error}"
    return about


def _in_a_process(name: str, small: bool) -> dict[str, Any]:
    """One part in a process of its own; what it printed last when it fails, or that its time was over."""
    limit = LIMITS_S[name] * (2 if small else 1)  # a rehearsal may share its processor
    command = [sys.executable, "-m", "bst_dist.tools.bench.gpu", name, str(int(small)), str(limit)]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"failed": "\n".join(done.stderr.splitlines()[-20:]) or f"ended with status {done.returncode}"}
    return json.loads(lines[-1]) | {"part_s": time.monotonic() - begin}


def _print(name: str, found: dict[str, Any]) -> None:
    if "failed" in found:
        say(f"{name}: failed: {found['failed'].splitlines()[-1]}")
        return
    rows = found["rows"]
    columns = [key for key in rows[0] if not isinstance(rows[0][key], dict)]
    print_table(Sheet(columns, [[_shown(row.get(column)) for column in columns] for row in rows]), name)


def _shown(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    part, in_small, seconds = sys.argv[1:]
    print(json.dumps(PARTS[part](bool(int(in_small)), time.monotonic() + 0.85 * float(seconds))))
