"""Measure the project's performance goals on one GPU, in nine minutes; all figures go to one folder.

    bst bench gpu --output bench-gpu
    bst bench gpu --only layers stack
    bst bench gpu --small

Each part is a separate process with a time limit and does not depend on the others: layers (forward and backward of one
layer of every model, compared with the sliding layer), kernels (where the time of a layer goes), stack (tokens per
second and MFU of whole models), longest (the longest sequence that trains), generation (tokens per second), resume
(whether a run that was stopped and resumed is bitwise equal to one that was not). Each part writes its figures when it
ends: DIR/layers.json and so on. The card, its clock and the versions are in DIR/machine.json.

Before the parts run, all layers are compiled in parallel, on all cores; the parts then read them from torch's cache.

Without a GPU, small sizes are used (--small). This only shows that the parts run; the figures mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bst_base.files import write_json
from bst_base.terminal import Sheet, print_table, say
from bst_dist.tools.bench.gpu_layers import AHEAD, compile_ahead, kernels, layers
from bst_dist.tools.bench.gpu_models import generation, longest, stack
from bst_dist.tools.bench.gpu_resume import resume

PARTS: dict[str, Callable[[bool, float], dict[str, Any]]] = {
    "layers": layers,
    "kernels": kernels,
    "stack": stack,
    "longest": longest,
    "generation": generation,
    "resume": resume,
}
"""Each part is a function of whether sizes are small, and of its deadline on time.monotonic(). It returns a dictionary
with its table's rows."""

AHEAD_S = 120
"""Seconds for compiling ahead. A layer that is not compiled by then is compiled by the part that uses it."""

LIMITS_S = {"layers": 85, "kernels": 30, "stack": 80, "longest": 50, "generation": 60, "resume": 110}
"""Time limit of each part in seconds; with AHEAD_S less than nine minutes in all. A part may also use the time that
earlier parts left over. A part knows its limit and leaves out cases that do not fit. Generation needs its time to
compile attention without gradients, resume to start three runs."""
REHEARSED = 10
"""Factor on the time limits in a rehearsal (small sizes), because its CPU may be shared."""
TOLD_S = 2
"""A part prints its stack trace this many seconds before its time limit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("bench-gpu"), help="folder for all figures")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="small sizes, as always without a GPU: a rehearsal")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each part, print the figures, and return them all."""
    small = args.small or not torch.cuda.is_available()
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(small)}
    write_json(args.output / "machine.json", found["machine"])
    say(f"{found['machine']['device']}, torch {torch.__version__}" + (", small: a rehearsal" * small))
    end = time.monotonic()
    if not small and {"layers", "kernels", "stack"} & set(args.only or PARTS):
        end += AHEAD_S
        found["ahead"] = _compile_ahead()
        write_json(args.output / "ahead.json", found["ahead"])
    for name in args.only or PARTS:
        end = max(end, time.monotonic()) + LIMITS_S[name] * (REHEARSED if small else 1)
        found[name] = _in_a_process(name, small, end - time.monotonic())
        _print(name, found[name])
        write_json(args.output / f"{name}.json", found[name])
    return found | {"passed": not any("failed" in found[name] for name in args.only or PARTS)}


def machine(small: bool) -> dict[str, Any]:
    """Return the device and the versions that the figures were measured with. Clocks are the current ones, in MHz."""
    about: dict[str, Any] = {"device": "CPU", "torch": torch.__version__, "cuda": torch.version.cuda, "small": small}
    if torch.cuda.is_available():
        about |= {"device": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.mem_get_info()[1]}
        asked = "clocks.sm,clocks.max.sm,power.limit,driver_version"
        try:
            said = subprocess.run(
                ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"],
                check=True,
                capture_output=True,
                text=True,
                timeout=20,
            ).stdout
            about |= dict(zip(asked.split(","), said.splitlines()[0].split(", "), strict=True))
        except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
            about["nvidia-smi"] = f"did not answer: {error}"
    return about


def _compile_ahead() -> dict[str, Any]:
    """Compile all kinds of layers in parallel; return the seconds each took, None if it failed or was too late."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "bst_dist.tools.bench.gpu", "ahead"]
    started = {
        f"{name}, D {width}": subprocess.Popen([*command, name, str(width)], stdout=subprocess.DEVNULL)
        for name, width in AHEAD
    }
    took: dict[str, float | None] = dict.fromkeys(started)
    try:
        while started and time.monotonic() < begin + AHEAD_S:
            time.sleep(0.2)
            for name in [name for name, process in started.items() if process.poll() is not None]:
                if started.pop(name).returncode == 0:
                    took[name] = time.monotonic() - begin
    finally:  # also on an interrupt: no process may keep using the GPU
        for process in started.values():
            process.kill()
            process.wait()
    say(
        f"compiled {sum(s is not None for s in took.values())} of {len(took)} kinds of layers in "
        f"{time.monotonic() - begin:.0f} s"
    )
    return took


def _in_a_process(name: str, small: bool, limit: float) -> dict[str, Any]:
    return _ended([sys.executable, "-m", "bst_dist.tools.bench.gpu", name, str(int(small)), str(limit)], limit)


def _ended(command: list[str], limit: float) -> dict[str, Any]:
    """Run a part's command and return the JSON object of its last line.

    If it failed or timed out, return {"failed": the end of its stderr}.
    """
    begin = time.monotonic()
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace").splitlines()  # bytes here, in spite of text=True
        return {"failed": "\n".join([*_last(said), f"not done after {limit:.0f} s"])}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = "\n".join(_last(done.stderr.splitlines()))
        return {"failed": said or f"ended with status {done.returncode}"}
    return json.loads(lines[-1]) | {"part_s": time.monotonic() - begin}


def _last(lines: list[str]) -> list[str]:
    """Return the last 20 lines, or the first 20 of the last stack trace: faulthandler prints recent calls first."""
    begin = max((i for i, line in enumerate(lines) if line.endswith("(most recent call first):")), default=None)
    return lines[-20:] if begin is None else lines[begin : begin + 20]


def _print(name: str, found: dict[str, Any]) -> None:
    if "failed" in found:
        say(f"{name}: failed: {found['failed'].splitlines()[-1]}")
        return
    rows = found["rows"]
    columns = [key for key in rows[0] if not isinstance(rows[0][key], dict)]
    shown = [row for row in rows if row.get("share", 1) > 0.02]
    print_table(Sheet(columns, [[_shown(row.get(column)) for column in columns] for row in shown]), name)


def _shown(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    part, first, second = sys.argv[1:]
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    if part == "ahead":
        compile_ahead(first, int(second))
        sys.exit()
    faulthandler.dump_traceback_later(float(second) - TOLD_S)
    print(json.dumps(PARTS[part](bool(int(first)), time.monotonic() + 0.85 * float(second))))
