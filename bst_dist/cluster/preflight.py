"""Looking at all hosts before a rank is started: what is wrong, and with which of them."""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bst_base.errors import UserError
from bst_dist.cluster.controller import Controller
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.launchers import SSH

CLOCK_S = 2.0
"""How far a clock may be off: the times of logs, files and checkpoints are compared by people and programs."""


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
    answer: dict[str, Any] = field(default_factory=dict)
    clock_offset_s: float = math.nan


def unreachable(hosts: Sequence[Host]) -> dict[str, str]:
    """The hosts that ssh does not get into without a password, and what it says; all are tried at once."""

    def tried(host: Host) -> str | None:
        done = subprocess.run([*SSH, host.name, "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return (done.stderr.strip().splitlines() or ["ssh failed"])[-1] if done.returncode else None

    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        reasons = pool.map(tried, hosts)
    return {host.name: reason for host, reason in zip(hosts, reasons, strict=True) if reason is not None}


def require_reachable(hosts: Sequence[Host]) -> None:
    """Raise PreflightError, having shown all hosts, when ssh does not get into each of them."""
    if reasons := unreachable(hosts):
        checked = [Checked(host, [reasons[host.name]] if host.name in reasons else []) for host in hosts]
        show(checked)
        require(checked)


def examine(controller: Controller, needs: Needs) -> list[Checked]:
    """Wait for the agents, ask each about its host, and judge the answers."""
    if missing := controller.call():
        return [Checked(host, [missing[host.name]] if host.name in missing else []) for host in controller.hosts]
    first, *others = [host.name for host in controller.hosts]
    question = {"job": controller.job, "files": [str(path) for path in needs.files], "run_dir": str(needs.run_dir)}
    answers = controller.ask("probe", {first: {**question, "write": True}})  # the mark must be there for the others
    answers |= controller.ask("probe", {name: {**question, "write": False} for name in others})
    controller.ask("unmark", {first: {"job": controller.job, "run_dir": str(needs.run_dir)}})
    checked = [Checked(host, answer=answers.get(host.name, {})) for host in controller.hosts]
    for one in checked:
        if one.answer:
            one.clock_offset_s = controller.clock_offset_s(one.host.name)
    judge(checked, controller.job, needs.free_bytes)
    return checked


def judge(checked: Sequence[Checked], job: str, needed_bytes: int) -> None:
    """Write down what is wrong with each host, measured by what most of them say."""
    common = _common([one.answer for one in checked if one.answer])
    for one in checked:
        answer = one.answer
        if not answer:
            one.problems.append("no answer: a file system that hangs?")
            continue
        one.problems += _differences(answer, common)
        if abs(one.clock_offset_s) > CLOCK_S:
            ahead = "ahead" if one.clock_offset_s > 0 else "behind"
            one.problems.append(f"its clock is {abs(one.clock_offset_s):.1f} s {ahead}: is a time server running?")
        if answer["nonce"] != job:
            one.problems.append("does not see the run directory that the first host wrote to: is it shared?")
        elif answer["free_bytes"] is not None and answer["free_bytes"] < needed_bytes:
            free, needed = answer["free_bytes"] / 1e9, needed_bytes / 1e9
            one.problems.append(f"{free:.1f} GB free for the run directory, its checkpoints take {needed:.1f} GB")
        if answer["ranks"]:
            pids = ", ".join(map(str, answer["ranks"]))
            one.problems.append(f"ranks of an earlier start still train in this run directory (processes {pids})")


def _flat(answer: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same on all hosts, by the name to call it by."""
    files = {Path(path).name if Path(path).suffix == ".yaml" else path: digest or "missing"
             for path, digest in answer["files"].items()}  # fmt: skip
    versions = {name: version or "missing" for name, version in answer["versions"].items()}
    return {**versions, "this project's code": answer["code"], **files}


def _common(answers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each thing what most hosts have; the first host decides a tie."""
    flat = [_flat(answer) for answer in answers]
    return {name: Counter(one[name] for one in flat).most_common(1)[0][0] for name in flat[0]} if flat else {}


def _differences(answer: Mapping[str, Any], common: Mapping[str, str]) -> list[str]:
    found = []
    for name, here in _flat(answer).items():
        if here == "missing":
            found.append(f"{name} is missing")
        elif here != common[name]:
            short = len(here) == 64  # a digest says nothing to people
            found.append(f"{name} differs from the other hosts'" if short else
                         f"{name} is {here}, the other hosts have {common[name]}")  # fmt: skip
    return found


def show(checked: Sequence[Checked]) -> None:
    """One line a host, and one for each thing that is wrong with it."""
    console, width = Console(highlight=False, soft_wrap=True), max(len(one.host.name) for one in checked)
    for one in checked:
        head = f"{one.host.name:<{width}}  {one.host.slots} slot{'s' * (one.host.slots > 1)}"
        if one.problems:
            console.print(f"{escape(head)}  [red]{escape('; '.join(one.problems))}[/]")
            continue
        if not one.answer:
            console.print(f"{escape(head)}  reached")
            continue
        versions = one.answer["versions"]
        free = one.answer["free_bytes"]
        console.print(escape(
            f"{head}  python {versions['python']}, torch {versions['torch']}, deepspeed {versions['deepspeed']}, "
            f"clock {one.clock_offset_s:+.3f} s" + (f", {free / 1e9:,.1f} GB free" if free is not None else "")
        ))  # fmt: skip


def require(checked: Sequence[Checked]) -> None:
    """Raise PreflightError, naming the culprits, unless all hosts are fit."""
    if bad := [one.host.name for one in checked if one.problems]:
        raise PreflightError(f"not started: {', '.join(bad)} must be mended, or taken out of the hosts (see above)")
