"""Problems that the preflight finds, by host."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from bst_dist.cluster.controller import LaunchOptions
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.preflight import (
    CHECKS,
    Checked,
    Needs,
    PreflightError,
    examine,
    record_problems,
    require,
    show,
    unreachable,
)
from bst_dist.cluster.probe import memory_errors, old_ranks, probe, unmark
from bst_dist.cluster.processes import StopSignals
from bst_dist.cluster.space import Space

SOUND: dict[str, Any] = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
    "code": "c" * 64,
    "nonce": "job",
    "files": {"/shared/recipe.yaml": "a" * 64, "/shared/corpus/manifest.json": "b" * 64},
    "free_bytes": 10**12,
    "ranks": [],
    "devices": [],
    "memory_errors": {},
    "open_files": 4096,
    "available_memory": 4 * 10**9,
}
TWO = Space(2, 10**9)
NOTHING = Needs([], Path("/shared/run"), Space(2, 0), 0)


def checked_hosts(
    *changes: dict[str, Any], clocks: tuple[float, ...] = (0.0, 0.0, 0.0), accepted=(), space=TWO
) -> list[Checked]:
    """Return three checked hosts that are sound except for the changes."""
    answers = []
    for change in (*changes, {}, {}, {})[:3]:
        answer = copy.deepcopy(SOUND)
        for key, value in change.items():
            answer[key] = {**answer[key], **value} if isinstance(value, dict) else value
        answers.append(answer)
    checked = [
        Checked(Host(f"n{i}", 8), answer=answer, clock_offset_s=clock)
        for i, (answer, clock) in enumerate(zip(answers, clocks, strict=True))
    ]
    record_problems(checked, "job", Needs([], Path("/shared/run"), space, 125 * 10**6), accepted)
    return checked


def judged(*changes: dict[str, Any]) -> list[list[str]]:
    """Return the problems of three hosts that are sound except for the changes."""
    return [one.problems for one in checked_hosts(*changes)]


def test_healthy_hosts_have_no_problems():
    assert judged() == [[], [], []]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"torch": "2.12.0"}}, "torch is 2.12.0, the other hosts have 2.13.0"),
        ({"versions": {"deepspeed": None}}, "deepspeed is missing"),
        ({"versions": {"numpy": "2.4.0"}}, "numpy is 2.4.0, the other hosts have none"),
        ({"code": "d" * 64}, "this project's code has other contents than on the other hosts (check: code)"),
        ({"files": {"/shared/recipe.yaml": "d" * 64}}, "recipe.yaml has other contents than on the other hosts"),
        ({"files": {"/shared/corpus/manifest.json": None}}, "/shared/corpus/manifest.json is missing"),
        ({"nonce": None}, "is it shared?"),
        ({"nonce": "another"}, "is it shared?"),
        ({"free_bytes": 10**8}, "100.0 MB free on the file system of the run directory, 2 checkpoints need 1.0 GB"),
        ({"devices": ["nvidia0", "nvidia1"]}, "8 slots, but 2 accelerators"),
        ({"memory_errors": {"3": 2}}, "accelerator 3 has 2 uncorrected memory errors"),
        (
            {"available_memory": 10**9},
            "8 ranks need 4.0 GB of host memory to build the model, 1.0 GB are available: start fewer ranks on a host",
        ),
        ({"open_files": 583}, "a process may open 583 files, rank 0 of 24 needs 584: raise the hard limit"),
        ({"ranks": [4711]}, "(processes 4711): wait until they end, or stop them (check: ranks)"),
    ],
)
def test_the_host_that_differs_is_reported_even_if_it_is_first(change, said):
    first, *others = judged(change)
    assert len(first) == 1
    assert said in first[0]
    assert others == [[], []]


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("versions", {"versions": {"torch": "2.12.0"}}),
        ("code", {"code": "d" * 64}),
        ("files", {"files": {"/shared/recipe.yaml": "d" * 64}}),
        ("shared", {"nonce": None}),
        ("space", {"free_bytes": 10**8}),
        ("ranks", {"ranks": [4711]}),
        ("devices", {"devices": ["nvidia0"]}),
        ("memory", {"memory_errors": {"3": 2}}),
        ("host-memory", {"available_memory": 10**9}),
        ("limits", {"open_files": 256}),
    ],
)
def test_accepted_problems_do_not_prevent_a_start_and_are_shown(check, change, capsys):
    first, *others = checked_hosts(change, accepted=[check])
    assert [one.problems for one in (first, *others)] == [[], [], []]
    show([first])
    assert f"(accepted: {check})" in capsys.readouterr().out
    assert checked_hosts(change, accepted=set(CHECKS) - {check})[0].problems


@pytest.mark.parametrize("odd", [0, 1])
def test_a_host_whose_code_reports_other_packages_is_compared_all_the_same(odd):
    answers = [copy.deepcopy(SOUND) for _ in range(3)]
    del answers[odd]["versions"]["deepspeed"]
    answers[odd] |= {"code": "d" * 64}
    checked = [Checked(Host(f"n{i}", 8), answer=answer, clock_offset_s=0.0) for i, answer in enumerate(answers)]
    record_problems(checked, "job", NOTHING)
    found = [one.problems for one in checked]
    assert sorted(found.pop(odd)) == [
        "deepspeed is missing (check: versions)",
        "this project's code has other contents than on the other hosts (check: code)",
    ]
    assert found == [[], []]


def test_a_run_that_has_a_checkpoint_needs_space_for_one_more():
    (first, *_) = checked_hosts({"free_bytes": 10**8}, space=Space(1, 10**9))
    assert "100.0 MB free on the file system of the run directory, a checkpoint needs 1.0 GB" in first.problems[0]


def test_a_host_that_cannot_say_what_memory_it_has_is_not_refused():
    assert judged({"available_memory": None}) == [[], [], []]


def test_only_the_host_of_rank_0_needs_many_open_files():
    assert judged({}, {"open_files": 256}) == [[], [], []]


@pytest.mark.parametrize(("clock", "said"), [(300.0, "300.0 s ahead"), (-3.0, "3.0 s behind")])
def test_a_wrong_clock_is_a_warning(clock, said):
    found = checked_hosts(clocks=(0.01, clock, -0.01))
    assert [one.problems for one in found] == [[], [], []]
    assert [bool(one.warnings) for one in found] == [False, True, False]
    assert said in found[1].warnings[0]


def test_unused_accelerators_are_a_warning():
    """Example: a Slurm job with one task on a node with many accelerators would silently train on one."""
    (first, *_) = checked_hosts({"devices": [f"nvidia{i}" for i in range(16)]})
    assert first.warnings == ["16 accelerators, but 8 slots: the others are not used"]


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("printf '0, 0\\n1, 12\\n2, [N/A]\\n'", {"1": 12}),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", {}),
        ("sleep 60", {}),
    ],
)
def test_memory_errors_are_read_from_nvidia_smi(tmp_path, monkeypatch, script, found):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("bst_dist.cluster.probe.NVIDIA_S", 0.5)
    assert memory_errors() == found


def test_a_host_without_answer_is_refused():
    checked = [Checked(Host("n0", 1), answer=copy.deepcopy(SOUND), clock_offset_s=0.0), Checked(Host("n1", 1))]
    record_problems(checked, "job", NOTHING)
    assert checked[0].problems == []
    assert checked[1].problems
    assert math.isnan(checked[1].clock_offset_s)
    with pytest.raises(PreflightError, match="not started: fix the problems of n1 above"):
        require(checked)


def test_every_host_is_shown_on_one_line(capsys):
    show([Checked(Host("n0", 8), answer=SOUND, clock_offset_s=0.001), Checked(Host("n1", 1), ["it [burns]"])])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("n0  8 slots  python 3.11.7, torch 2.13.0, deepspeed 0.19.8, clock +0.001 s, 1.0 TB free")
    assert said[1] == "n1  1 slot  it [burns]"


def test_a_probe_sees_the_mark_of_another_and_leaves_no_files(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: small")
    run_dir = tmp_path / "runs" / "first"
    question = {"job": "job", "files": [str(recipe), str(tmp_path / "none")], "run_dir": str(run_dir)}
    assert probe(**question, write=False)["nonce"] is None
    written, read = probe(**question, write=True), probe(**question, write=False)
    assert written == read | {name: written[name] for name in ("free_bytes", "available_memory")}
    assert read["nonce"] == "job"
    assert read["files"][str(tmp_path / "none")] is None
    assert len(read["files"][str(recipe)]) == 64
    unmark("job", str(run_dir))
    assert list(run_dir.parent.iterdir()) == []  # no run directory is created, because it would have to be empty
    assert old_ranks(str(run_dir)) == []


SSH = """#!/bin/sh
case "$*" in
    *hung*) exec sleep 3600;;
    *down*) echo "ssh: connect to host down: Connection refused" >&2; exit 255;;
esac
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch) -> LaunchOptions:
    """Options with an ssh that answers for some hosts only."""
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return LaunchOptions("pdsh", tmp_path)


def test_hosts_that_ssh_cannot_log_in_to_are_named_with_its_error(ssh):
    found = unreachable([Host("ok", 1), Host("down", 1)], ssh, StopSignals())
    assert found == {"down": "ssh: connect to host down: Connection refused"}


def test_a_host_whose_login_hangs_is_named_after_a_time_limit(ssh, monkeypatch):
    monkeypatch.setattr("bst_dist.cluster.preflight.LOGIN_S", 0.25)
    found = unreachable([Host("hung-1", 1), Host("hung-2", 1)], ssh, StopSignals())
    assert found == {f"hung-{number}": "ssh: no answer within 0.25 s" for number in (1, 2)}


def test_a_stop_signal_ends_the_wait_for_logins(ssh, monkeypatch):
    monkeypatch.setattr("bst_dist.cluster.preflight.LOGIN_S", 3600.0)
    assert unreachable([Host("hung-1", 1)], ssh, StopSignals(15)) == {}


class Silent:
    """Stub of a controller; `silent` hosts do not answer the probe. Records who is asked what, as kind and hosts."""

    def __init__(self, *silent: str) -> None:
        self.hosts, self.silent, self.job, self.gone = [Host(f"n{i}", 8) for i in range(3)], silent, "job", {}
        self.asked: list[tuple[str, list[str]]] = []
        self.wrote: list[str] = []
        self.removes: list[str] = []
        self.stop_signals = StopSignals()

    def send(self, host: str, kind: str, **fields: Any) -> None:
        assert (kind, fields) == ("unmark", {"job": "job", "run_dir": "/shared/run"})
        self.removes.append(host)

    def call(self) -> dict[str, str]:
        return {}

    def ask(self, kind: str, fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        self.asked.append((kind, list(fields)))
        self.wrote += [host for host, question in fields.items() if question.get("write")]
        return {host: copy.deepcopy(SOUND) for host in fields if host not in self.silent}

    def clock_offsets_s(self, hosts: Collection[str]) -> dict[str, float]:
        self.asked.append(("clock", list(hosts)))
        return dict.fromkeys(hosts, 0.0)


@pytest.mark.parametrize(("silent", "writer", "left"), [("n1", "n0", ["n0", "n2"]), ("n0", "n1", ["n1", "n2"])])
def test_a_host_that_did_not_answer_is_asked_nothing_more(silent, writer, left):
    """Each question to it would take a minute. If it was to write the mark, the next host does."""
    stub = Silent(silent)
    checked = examine(stub, NOTHING)
    problems = {one.host.name: one.problems for one in checked}
    assert problems == {silent: ["no answer: does a file system hang?"], **{name: [] for name in left}}
    assert stub.wrote[-1] == writer
    assert [kind for kind, hosts in stub.asked if silent in hosts] == ["probe"]
    assert ("unmark", [writer]) in stub.asked
    assert stub.removes == [host for host in stub.wrote if host == silent]
    assert ("clock", left) in stub.asked


def test_a_stop_signal_leaves_no_mark(monkeypatch):
    """The first host has been asked to write it, and is not waited for."""
    stub = Silent("n0")
    ask = stub.ask
    monkeypatch.setattr(stub, "ask", lambda *question: (setattr(stub.stop_signals, "first", 15), ask(*question))[1])
    examine(stub, NOTHING)
    assert stub.wrote == stub.removes == ["n0"]
