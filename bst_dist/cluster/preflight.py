"""Looking at all hosts before a rank is started: what is wrong, and with which of them."""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bst_base.errors import UserError
from bst_base.sizes import readable_size
from bst_dist.cluster import launchers
from bst_dist.cluster.controller import Controller, Means
from bst_dist.cluster.hosts import Host

CLOCK_S = 2.0
"""How far a clock may be off before it is said: people compare times of logs and files; no result rests on them."""
CHECKS = ("ssh", "versions", "code", "files", "shared", "space", "ranks", "devices", "memory", "sum", "speed")
"""Each by the name that `--accept` takes."""


Found = Iterator[tuple[str, str]]
"""Names of checks, and what they have found."""


class PreflightError(UserError):
    """Hosts that the job cannot run on."""


@dataclass(frozen=True)
class Needs:
    """What every host must have."""

    files: Sequence[Path]
    """Equal everywhere."""
    run_dir: Path
    """Shared by all."""
    free_bytes: int
    """Left where the run directory is."""


@dataclass
class Checked:
    """What was found out about one host."""

    host: Host
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What is to be known, and keeps nobody from starting."""
    answer: dict[str, Any] = field(default_factory=dict)
    clock_offset_s: float = math.nan


def unreachable(hosts: Sequence[Host], means: Means) -> dict[str, str]:
    """The hosts that ssh does not get into without a password, and what it says; all are tried at once."""
    ssh = launchers.ssh(means.launcher, means.ssh_port)

    def tried(host: Host) -> str | None:
        done = subprocess.run([*ssh, host.name, "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return (done.stderr.strip().splitlines() or ["ssh failed"])[-1] if done.returncode else None

    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        reasons = pool.map(tried, hosts)
    return {host.name: reason for host, reason in zip(hosts, reasons, strict=True) if reason is not None}


def require_reachable(hosts: Sequence[Host], means: Means, accepted: Collection[str] = ()) -> None:
    """Raise PreflightError, having shown all hosts, when ssh does not get into each of them."""
    if "ssh" in accepted:
        return
    if reasons := unreachable(hosts, means):
        checked = [Checked(host, [reasons[host.name]] if host.name in reasons else []) for host in hosts]
        show(checked)
        require(checked)


def examine(controller: Controller, needs: Needs, accepted: Collection[str] = ()) -> list[Checked]:
    """Wait for the agents, ask each about its host, and judge the answers."""
    if missing := controller.call():
        return [Checked(host, [missing[host.name]] if host.name in missing else []) for host in controller.hosts]
    first, *others = [host.name for host in controller.hosts]
    question = {"job": controller.job, "files": [str(path) for path in needs.files], "run_dir": str(needs.run_dir)}
    answers = controller.ask("probe", {first: {**question, "write": True}})  # the mark must be there for the others
    answers |= controller.ask("probe", {name: {**question, "write": False} for name in others})
    controller.ask("unmark", {first: {"job": controller.job, "run_dir": str(needs.run_dir)}})
    checked = [Checked(host, answer=answers.get(host.name, {})) for host in controller.hosts]
    offsets = controller.clock_offsets_s()
    for one in checked:
        one.clock_offset_s = offsets.get(one.host.name, math.nan)
        if one.host.name in controller.gone:
            one.problems.append(controller.gone[one.host.name])
    judge(checked, controller.job, needs.free_bytes, accepted)
    return checked


def judge(checked: Sequence[Checked], job: str, needed_bytes: int, accepted: Collection[str] = ()) -> None:
    """Write down what is wrong with each host, measured by what most of them say."""
    common = _common([one.answer for one in checked if one.answer])
    for one in checked:
        if not one.answer:
            one.problems += [] if one.problems else ["no answer: does a file system hang?"]
            continue
        for check, problem in _problems(one, common, job, needed_bytes):
            if check in accepted:
                one.warnings.append(f"{problem} (accepted: {check})")
            else:
                one.problems.append(problem)
        one.warnings += _warnings(one)


def _problems(one: Checked, common: Mapping[str, tuple[str, str]], job: str, needed_bytes: int) -> Found:
    """What a job would fail of, each with the name of its check."""
    answer = one.answer
    yield from _differences(answer, common)
    if answer["nonce"] != job:
        yield "shared", "does not see the run directory that the first host wrote to: is it shared?"
    elif answer["free_bytes"] is not None and answer["free_bytes"] < needed_bytes:
        free, needed = readable_size(answer["free_bytes"]), readable_size(needed_bytes)
        yield "space", f"{free} free for the run directory, its checkpoints take {needed}"
    if answer["ranks"]:
        pids = ", ".join(map(str, answer["ranks"]))
        yield "ranks", f"ranks of an earlier start still train in this run directory (processes {pids})"
    devices, slots = answer["devices"], one.host.slots
    if 0 < len(devices) < slots:
        yield "devices", f"{slots} slots, but {len(devices)} accelerators"
    for device, errors in answer["memory_errors"].items():
        yield (
            "memory",
            f"accelerator {device} has {errors} uncorrected memory errors: reset or replace it",
        )


def _warnings(one: Checked) -> list[str]:
    found = []
    if abs(one.clock_offset_s) > CLOCK_S:
        ahead = "ahead" if one.clock_offset_s > 0 else "behind"
        found.append(f"its clock is {abs(one.clock_offset_s):.1f} s {ahead}: is a time server running?")
    devices, slots = len(one.answer["devices"]), one.host.slots
    if devices > slots and one.host.devices is None:
        found.append(f"{devices} accelerators, but {slots} slot{'s' * (slots > 1)}: the others are not used")
    return found


def _flat(answer: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What must be the same on all hosts, by the name to call it by, each with the name of its check."""
    files = {Path(path).name if Path(path).suffix == ".yaml" else path: ("files", digest or "missing")
             for path, digest in answer["files"].items()}  # fmt: skip
    versions = {name: ("versions", version or "missing") for name, version in answer["versions"].items()}
    return {**versions, "this project's code": ("code", answer["code"]), **files}


def _common(answers: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """For each thing what most hosts have; the first host decides a tie."""
    flat = [_flat(answer) for answer in answers]
    return {name: Counter(one[name] for one in flat).most_common(1)[0][0] for name in flat[0]} if flat else {}


def _differences(answer: Mapping[str, Any], common: Mapping[str, tuple[str, str]]) -> Found:
    for name, (check, here) in _flat(answer).items():
        there = common[name][1]
        if here == "missing":
            yield check, f"{name} is missing"
        elif here != there:
            short = len(here) == 64  # a digest says nothing to people
            yield check, (f"{name} differs from the other hosts'" if short else
                          f"{name} is {here}, the other hosts have {there}")  # fmt: skip


def show(checked: Sequence[Checked]) -> None:
    """One line per host, and one for each thing that is wrong with it."""
    console, width = Console(highlight=False, soft_wrap=True), max(len(one.host.name) for one in checked)
    for one in checked:
        head = f"{one.host.name:<{width}}  {one.host.slots} slot{'s' * (one.host.slots > 1)}"
        if one.problems:
            console.print(f"{escape(head)}  [red]{escape('; '.join(one.problems))}[/]")
        else:
            console.print(escape(f"{head}  {_described(one) if one.answer else 'reached'}"))
        for warning in one.warnings:
            console.print(f"{'':<{width}}  [yellow]{escape(warning)}[/]")


def _described(one: Checked) -> str:
    versions, free, devices = one.answer["versions"], one.answer["free_bytes"], len(one.answer["devices"])
    parts = [
        f"python {versions['python']}, torch {versions['torch']}, deepspeed {versions['deepspeed']}",
        f"clock {one.clock_offset_s:+.3f} s",
        *([f"{readable_size(free)} free"] if free is not None else []),
        *([f"{devices} accelerator{'s' * (devices > 1)}"] if devices else []),
    ]
    return ", ".join(parts)


def require(checked: Sequence[Checked]) -> None:
    """Raise PreflightError, naming the hosts that failed a check."""
    if bad := [one.host.name for one in checked if one.problems]:
        raise PreflightError(f"not started: fix {', '.join(bad)}, or start without (see above); --accept CHECK starts "
                             "anyway")  # fmt: skip
