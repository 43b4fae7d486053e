"""The preflight: checks all hosts before a rank is started, and names the problems of each."""

from __future__ import annotations

import math
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bst_base.errors import UserError
from bst_base.sizes import readable_size
from bst_dist.cluster import launchers
from bst_dist.cluster.channel import Message
from bst_dist.cluster.controller import Controller, LaunchOptions
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.processes import StopSignals, signal_session
from bst_dist.cluster.space import Space
from bst_dist.train.start.host_memory import shortage

CLOCK_S = 2.0
"""Clock offset in seconds above which a warning is printed. No result depends on clocks, but users compare the times
of logs and files."""
CHECKS = (
    *("ssh", "versions", "code", "files", "shared", "space", "ranks"),
    *("devices", "memory", "host-memory", "limits", "sum", "speed"),
)
"""The names of the checks, as `--accept` takes them."""
FILES_PER_RANK, OWN_FILES = 3, 512
"""Open files of rank 0's process: its connections with each rank (torch's, that of the heartbeats, and one more while
the ranks meet or report an error), and its own, of which up to 256 are shards of the corpus."""
LOGIN_S = 30.0
"""Maximum seconds for an ssh login; ssh's own limit ends with the TCP connection, and a login may hang after that."""

Found = Iterator[tuple[str, str]]
"""Pairs of a check's name and a problem that it found."""


class PreflightError(UserError):
    """Some hosts failed the preflight."""


@dataclass(frozen=True)
class Needs:
    """The requirements that every host must meet."""

    files: Sequence[Path]
    """Files that must be equal on all hosts."""
    run_dir: Path
    """The run directory, which all hosts must share."""
    space: Space
    """Free space required on the file system of the run directory."""
    parameters: int
    """Parameters of the model, which every rank builds in the memory of its host."""


@dataclass
class Checked:
    """The result of the preflight for one host."""

    host: Host
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Messages that do not prevent a start."""
    answer: dict[str, Any] = field(default_factory=dict)
    clock_offset_s: float = math.nan


def unreachable(hosts: Sequence[Host], options: LaunchOptions, stop_signals: StopSignals) -> dict[str, str]:
    """Return the hosts that ssh cannot log in to without a password, with its error; all are tried in parallel.

    A stop signal ends the wait; hosts that have not answered by then are not in the result.
    """
    ssh = launchers.ssh(options.launcher, options.ssh_port)
    commands = [[*ssh, host.name, "true"] for host in hosts]
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        reasons = pool.map(partial(_login_problem, stop_signals=stop_signals), commands)
    return {host.name: reason for host, reason in zip(hosts, reasons, strict=True) if reason is not None}


def _login_problem(command: Sequence[str], stop_signals: StopSignals) -> str | None:
    """Return why an ssh command failed; None if it succeeded or was ended because of a stop signal.

    Its errors go to a file, because a connection that ssh keeps for later (ControlPersist) keeps a pipe open.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        deadline = time.monotonic() + LOGIN_S
        while process.poll() is None and stop_signals.first is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            signal_session(process, signal.SIGKILL)
            process.wait()
            return f"ssh: no answer within {LOGIN_S:g} s" if stop_signals.first is None else None
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    return (lines or ["ssh failed"])[-1] if process.returncode else None


def require_reachable(
    hosts: Sequence[Host], options: LaunchOptions, accepted: Collection[str], stop_signals: StopSignals
) -> None:
    """Print all hosts and raise PreflightError unless ssh can log in to every one of them."""
    if "ssh" in accepted:
        return
    if reasons := unreachable(hosts, options, stop_signals):
        problems = {name: [f"{reason} (check: ssh)"] for name, reason in reasons.items()}
        checked = [Checked(host, problems.get(host.name, [])) for host in hosts]
        show(checked)
        require(checked)


def examine(controller: Controller, needs: Needs, accepted: Collection[str] = ()) -> list[Checked]:
    """Wait for the agents, query each about its host, and return the problems and warnings of each host."""
    if missing := controller.call():
        return [Checked(host, [missing[host.name]] if host.name in missing else []) for host in controller.hosts]
    answers = _answers(controller, needs)
    checked = [Checked(host, answer=answers.get(host.name, {})) for host in controller.hosts]
    offsets = controller.clock_offsets_s([host.name for host in controller.hosts if host.name in answers])
    for one in checked:
        one.clock_offset_s = offsets.get(one.host.name, math.nan)
        if one.host.name in controller.gone:
            one.problems.append(controller.gone[one.host.name])
    record_problems(checked, controller.job, needs, accepted)
    return checked


def _answers(controller: Controller, needs: Needs) -> dict[str, Message]:
    """Return what each host reports about itself; hosts that do not answer in time are missing.

    The first host that answers has written the mark that the others read. One that does not answer may write it later,
    and removes it then.
    """
    where = {"job": controller.job, "run_dir": str(needs.run_dir)}
    question = {**where, "files": [str(path) for path in needs.files]}
    names = [host.name for host in controller.hosts]
    answers: dict[str, Message] = {}
    while names and not answers and controller.stop_signals.first is None:
        writer = names.pop(0)
        answers = controller.ask("probe", {writer: {**question, "write": True}})
        if not answers:
            controller.send(writer, "unmark", **where)
    others = controller.ask("probe", {name: {**question, "write": False} for name in names})
    controller.ask("unmark", dict.fromkeys(answers, where))
    return answers | others


def record_problems(checked: Sequence[Checked], job: str, needs: Needs, accepted: Collection[str] = ()) -> None:
    """Record the problems and warnings of each host, comparing it with the majority of hosts."""
    common = _common([one.answer for one in checked if one.answer])
    for one in checked:
        if not one.answer:
            one.problems += [] if one.problems else ["no answer: does a file system hang?"]
            continue
        problems = [*_problems(one, common, job, needs)]
        if one is checked[0]:  # rank 0 will be there
            problems += _limits(one, sum(each.host.slots for each in checked))
        for check, problem in problems:
            if check in accepted:
                one.warnings.append(f"{problem} (accepted: {check})")
            else:
                one.problems.append(f"{problem} (check: {check})")
        one.warnings += _warnings(one)


def _problems(one: Checked, common: Mapping[str, tuple[str, str]], job: str, needs: Needs) -> Found:
    """Yield the problems of a host that would make a job fail, with the name of the check."""
    answer = one.answer
    yield from _differences(answer, common)
    if answer["nonce"] != job:
        yield "shared", "does not see the run directory that the first host wrote to: is it shared?"
    elif answer["free_bytes"] is not None and answer["free_bytes"] < needs.space.bytes:
        free, needed = readable_size(answer["free_bytes"]), readable_size(needs.space.bytes)
        what = "a checkpoint needs" if needs.space.checkpoints == 1 else f"{needs.space.checkpoints} checkpoints need"
        yield (
            "space",
            (
                f"{free} free on the file system of the run directory, {what} {needed}: free space, or choose "
                "another --run-dir"
            ),
        )
    if answer["ranks"]:
        pids = ", ".join(map(str, answer["ranks"]))
        yield (
            "ranks",
            (
                f"ranks of an earlier start still train in this run directory (processes {pids}): wait until "
                "they end, or stop them"
            ),
        )
    devices, slots = answer["devices"], one.host.slots
    if 0 < len(devices) < slots:
        yield "devices", f"{slots} slots, but {len(devices)} accelerators"
    for device, errors in answer["memory_errors"].items():
        yield (
            "memory",
            f"accelerator {device} has {errors} uncorrected memory errors: reset or replace it",
        )
    # Missing if the host has older code, which is a problem of its own.
    if message := shortage(needs.parameters, slots, answer.get("available_memory")):
        yield "host-memory", message


def _limits(first: Checked, ranks: int) -> Found:
    """Yield the problem of a host whose processes may not open as many files as rank 0 of so many ranks needs."""
    needed = FILES_PER_RANK * ranks + OWN_FILES
    most = first.answer.get("open_files", needed)  # missing if the host has older code, which is a problem of its own
    if most < needed:
        yield (
            "limits",
            f"a process may open {most:,} files, rank 0 of {ranks} needs {needed:,}: raise the hard limit (ulimit -Hn)",
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
    """Return the values that must be equal on all hosts: name for messages -> (check, value)."""
    files = {
        Path(path).name if Path(path).suffix == ".yaml" else path: ("files", digest or "missing")
        for path, digest in answer["files"].items()
    }
    versions = {name: ("versions", version or "missing") for name, version in answer["versions"].items()}
    return {**versions, "this project's code": ("code", answer["code"]), **files}


def _common(answers: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the most common value of each item over the hosts; in a tie the one that comes first.

    A host with other code may report other items; those that it does not report are missing there.
    """
    flat = [_flat(answer) for answer in answers]
    checks = {name: check for one in flat for name, (check, _) in one.items()}
    return {
        name: Counter(one.get(name, (check, "missing")) for one in flat).most_common(1)[0][0]
        for name, check in checks.items()
    }


def _differences(answer: Mapping[str, Any], common: Mapping[str, tuple[str, str]]) -> Found:
    flat = _flat(answer)
    for name, (check, there) in common.items():
        _, here = flat.get(name, (check, "missing"))
        if name not in flat and there == "missing":
            continue
        if here == "missing":
            yield check, f"{name} is missing"
        elif here != there:
            short = len(here) == 64  # do not print digests
            yield (
                check,
                (
                    f"{name} has other contents than on the other hosts"
                    if short
                    else f"{name} is {here}, the other hosts have {'none' if there == 'missing' else there}"
                ),
            )


def show(checked: Sequence[Checked]) -> None:
    """Print one line per host with its problems, and one line for each of its warnings."""
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
        raise PreflightError(
            f"not started: fix the problems of {', '.join(bad)} above, or start without these hosts; "
            "--accept CHECK starts in spite of a failed check"
        )
