"""The launching process and its agents, all on this machine: their messages, and no leftovers when one of them ends."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bst_base.host import free_port
from bst_dist.cluster import agent, launchers, verdict
from bst_dist.cluster.channel import Closed, proof
from bst_dist.cluster.controller import Controller, LaunchOptions
from bst_dist.cluster.elastic import shares
from bst_dist.cluster.gateway import AgentGateway
from bst_dist.cluster.hosts import Host, HostError
from bst_dist.cluster.processes import StopSignals
from bst_dist.cluster.verdict import Ended
from bst_dist.faults.status import RESUBMIT

HOSTS = [Host("a", 1), Host("b", 2)]
LOST_S = 2.0
OPTIONS = LaunchOptions("here", Path.cwd(), lost_after_s=30.0, grace_s=5.0)
"""On a busy machine an agent may be silent for seconds. Only tests of this case use a short timeout."""


@pytest.fixture(autouse=True)
def local_launcher(monkeypatch):
    """Register a launcher that starts all agents on this machine."""

    def start(hosts, directory, agent):
        lines = [f"{shlex.join(agent)} --key {key} &" for key, _ in enumerate(hosts)]
        return ["sh", "-c", f"cd {directory}; {' '.join(lines)} wait"]

    monkeypatch.setitem(launchers.LAUNCHERS, "here", start)
    monkeypatch.setattr(verdict, "SETTLE_S", 0.5)


class Job:
    """A job of three ranks; each writes its process id to a file and runs a line of Python."""

    def __init__(self, directory: Path, options: LaunchOptions = OPTIONS) -> None:
        self.directory, self.stop_signals = directory, StopSignals()
        self.controller = Controller(HOSTS, options, self.stop_signals)

    def run(self, line: str) -> Ended:
        """Run `line` on all ranks; return how the job ended."""
        program = (
            f"import os, signal, sys, time; rank = int(os.environ['RANK']); open(f'{self.directory}/{{rank}}', 'w')"
        )
        program += f".write(str(os.getpid())); {line}"
        with self.controller:
            assert self.controller.call() == {}
            placed = shares(HOSTS, 3, self.controller.address("a"), self.controller.free_port("a"))
            ended = self.controller.run([sys.executable, "-c", program], {}, placed)
            self.ended_at = time.monotonic()
            return ended

    def meanwhile(self, act) -> None:
        """Call `act` once all ranks have started."""
        pump, self.done = self.controller._pump, False

        def watched() -> None:
            pump()
            if not self.done and len(self.ranks()) == 3:
                self.done = True
                act()

        self.controller._pump = watched

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks."""
        return [int(path.read_text()) for path in self.directory.glob("[0-9]") if path.read_text()]

    def agent(self, host: str) -> psutil.Process:
        """Return the agent of a host."""
        return next(
            one
            for one in psutil.process_iter()
            if self.controller.job in (line := words(one))
            and line[:2] == [sys.executable, "-m"]
            and line[-1] == str("ab".index(host))
        )

    def require_nothing_left(self) -> None:
        """Assert that all ranks end within a minute."""
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in self.ranks()):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_output_and_exit_statuses_of_ranks_arrive(job, capfd):
    ended = job.run("print('rank', rank, 'é'); print('last', end='', file=sys.stderr)")
    assert (ended.statuses, ended.status) == ({0: 0, 1: 0, 2: 0}, 0)
    said = capfd.readouterr()
    assert sorted(said.out.splitlines()) == ["rank 0 é", "rank 1 é", "rank 2 é"]
    assert said.err.splitlines() == ["last"] * 3


def test_a_failed_rank_ends_the_other_ranks(job):
    ended = job.run("time.sleep(60) if rank != 1 else sys.exit(3)")
    assert (ended.statuses, ended.status) == ({1: 3}, 3)
    job.require_nothing_left()


def test_a_stop_signal_reaches_the_ranks_and_their_status_is_returned(job):
    job.meanwhile(lambda: setattr(job.stop_signals, "first", signal.SIGUSR1))
    ended = job.run("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(60)")
    assert (ended.status, ended.stop_signal) == (75, signal.SIGUSR1)


@pytest.mark.parametrize("on_sigterm", ["SIG_DFL", "SIG_IGN"])
def test_an_agent_that_is_told_to_stop_reports_the_signal(tmp_path, on_sigterm):
    """As Slurm does it, which signals the processes of a step and not the launching process."""
    job = Job(tmp_path, replace(OPTIONS, grace_s=0.5))
    job.meanwhile(lambda: job.agent("b").send_signal(signal.SIGUSR1))
    ended = job.run(f"signal.signal(signal.SIGTERM, signal.{on_sigterm}); time.sleep(600)")
    assert (ended.status, ended.worth_a_restart) == (RESUBMIT, False)
    assert ended.told == job.controller.told == {"b": signal.SIGUSR1}
    assert job.stop_signals == StopSignals()


def test_the_message_at_a_stop_signal_can_be_chosen(tmp_path, capfd):
    """In the check of all ranks nothing is saved."""
    stop_signals = StopSignals(signal.SIGUSR1)
    with Controller(HOSTS, OPTIONS, stop_signals) as controller:
        while len(controller.channels) < len(HOSTS):
            controller.listen(0.1)
        placed = shares(HOSTS, 3, "127.0.0.1", 1)
        controller.run([sys.executable, "-c", "import time; time.sleep(600)"], {}, placed, "heard of {}")
    assert capfd.readouterr().err == "bst launch: heard of SIGUSR1\n"


def test_a_second_stop_kills_the_ranks_at_once(job):
    job.meanwhile(lambda: vars(job.stop_signals).update(first=15, at_once=True))
    ended = job.run("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    assert ended.status == 128 + signal.SIGINT
    job.require_nothing_left()


def test_a_stop_signal_ends_the_wait_for_an_answer(job):
    with job.controller as controller:
        assert controller.call() == {}
        job.stop_signals.first = signal.SIGTERM
        controller.channels["a"].send = lambda *_, **__: None  # the request is lost, and would be waited for
        before = controller.liveness.listened_s
        assert controller.ask("clock", {"a": {}}) == {}
        assert controller.liveness.listened_s == before


def test_every_question_gets_the_answer_of_every_agent(job):
    with job.controller as controller:
        assert controller.call() == {}
        assert set(controller.clock_offsets_s(["a", "b"])) == {"a", "b"}
        assert set(controller.clock_offsets_s(["b"])) == {"b"}
        where = {"job": "7", "run_dir": str(job.directory / "run")}
        found = controller.ask("probe", {"b": {**where, "files": [], "write": True}})
        assert found["b"]["nonce"] == "7"
        assert set(controller.ask("unmark", {"b": where})) == {"b"}
        assert list(job.directory.iterdir()) == []
        assert set(controller.ask("kill", {"a": {}, "b": {}})) == {"a", "b"}


def test_agents_start_in_the_given_environment(tmp_path, monkeypatch):
    """Not in that of this process, which has been changed since it was started."""
    given = dict(os.environ)
    monkeypatch.setenv("CHANGED_SINCE", "1")
    ended = Job(tmp_path, replace(OPTIONS, environment=given)).run("sys.exit('CHANGED_SINCE' in os.environ)")
    assert ended.status == 0


def test_a_host_whose_agent_is_killed_is_lost_and_so_are_its_ranks(job):
    job.meanwhile(lambda: job.agent("b").kill())
    ended = job.run("time.sleep(60)")
    assert list(ended.lost) == ["b"]
    assert "its agent is gone" in ended.lost["b"]
    job.require_nothing_left()


def test_a_silent_host_is_lost_only_after_its_lease_has_ended(tmp_path):
    job, stopped = Job(tmp_path, replace(OPTIONS, lost_after_s=LOST_S)), []

    def freeze() -> None:
        stopped.append(job.agent("b"))
        stopped[0].suspend()
        stopped.append(time.monotonic())

    job.meanwhile(freeze)
    ended = job.run("time.sleep(60)")
    agent, frozen_at = stopped
    assert ended.lost["b"].startswith("silent for")
    assert job.ended_at - frozen_at > 3 * LOST_S
    agent.resume()  # its remaining processes end by themselves
    job.require_nothing_left()


STRANGE = {
    "a line": b"1\n",
    "another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "no object": b"[1]\n",
    "no kind": b"{}\n",
    "nested without end": b"[" * 4000 + b"\n",
    "no text": b"\xff\xfe\x00\n",
    "too long": b"a" * 5000,
    "another secret": b'{"kind": "hello", "key": "0", "salt": "s", "proof": "p"}\n',
    "odd types": b'{"kind": "hello", "key": ["0"], "salt": 1, "proof": null}\n',
    "another host": b'{"kind": "hello", "key": "7", "salt": "s", "proof": "p"}\n',
    "more than a hello": b'{"kind": "hello", "key": "0", "salt": "s", "proof": "p"}\n{"kind": "ended"}\n',
}


def test_unknown_connections_are_closed_and_do_not_disturb_the_job(job):
    """Whatever connects to the port, before the agents and during the job."""
    address = ("127.0.0.1", job.controller._gateway.port)
    strangers = {}

    def knock() -> None:
        for name, text in STRANGE.items():
            connection = socket.create_connection(address)
            connection.sendall(text)
            strangers.setdefault(name, []).append(connection)
        socket.create_connection(address).close()

    knock()
    job.meanwhile(knock)
    assert job.run("time.sleep(1)").status == 0
    for name, connections in strangers.items():
        for one in connections:
            one.settimeout(5)
            with contextlib.suppress(ConnectionResetError):  # closed with bytes unread
                assert one.recv(1) == b"", name
            one.close()


def test_a_hello_in_pieces_is_accepted_but_not_a_replayed_one(monkeypatch):
    """As it may arrive over a real network: one byte per segment."""
    with selectors.DefaultSelector() as selector:
        welcomed = {}
        gateway = AgentGateway(selector, {"0": "a"}, welcomed.__setitem__)
        gateway._secrets["0"] = "secret"
        hello = {"kind": "hello", "key": "0", "salt": "s", "proof": proof("secret", "hello", "0", "s")}
        with socket.create_connection(("127.0.0.1", gateway.port)) as agent:
            for byte in (json.dumps(hello) + "\n").encode():
                agent.sendall(bytes([byte]))
                for key, _ in selector.select(0.2):
                    key.data()
            assert list(welcomed) == ["a"]
            answer = json.loads(agent.recv(1000))
            assert answer == {"kind": "welcome", "proof": proof("secret", "welcome", "0", "s")}
        with socket.create_connection(("127.0.0.1", gateway.port)) as again:  # a replayed message
            again.sendall((json.dumps(hello) + "\n").encode())
            for _ in range(3):
                for key, _ in selector.select(0.2):
                    key.data()
            assert again.recv(1) == b""
        gateway.close()


def test_an_agent_refuses_a_controller_without_its_secret():
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def answer() -> None:
            connection, _ = impostor.accept()
            connection.recv(1000)
            connection.sendall(b'{"kind": "welcome", "proof": "p"}\n{"kind": "start", "command": ["id"]}\n')

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(Closed, match="not the launching process"):
            agent.call(f"127.0.0.1:{impostor.getsockname()[1]}", "0", "secret")


def test_no_secret_is_in_any_command_line(job):
    job.meanwhile(lambda: lines.extend(words(one) for one in psutil.process_iter()))
    lines: list[list[str]] = []
    assert job.run("time.sleep(0.5)").status == 0
    secrets = set(job.controller._gateway._secrets.values())
    assert len(secrets) == 2
    assert lines
    assert not any(secret in word for secret in secrets for line in lines for word in line)


def test_hosts_that_do_not_call_back_are_named_with_the_launcher_output(monkeypatch):
    monkeypatch.setitem(launchers.LAUNCHERS, "here", lambda *_: ["sh", "-c", "echo b: no route to it >&2; exit 1"])
    with Controller(HOSTS, OPTIONS) as controller:
        missing = controller.call()
    assert missing["b"] == "its agent did not connect to this machine: b: no route to it"


PDSH = ["node-1: bash: line 1: /opt/python: No such file or directory", "pdsh@vm: node-1: ssh exited with exit code 7"]
OPENMPI = ["-----", "prterun was unable to launch the application", "Executable: /opt/python", "\0\0", "-----"]
OTHERS = ["node-1: no space", "node-10: the disk of node-10 is full", "my-node-1: down"]


@pytest.mark.parametrize(
    ("lines", "said"), [(PDSH, PDSH[0]), (PDSH[1:], PDSH[1]), (OPENMPI, "Executable: /opt/python"), (OTHERS, OTHERS[0])]
)
def test_the_reason_is_found_in_the_launcher_output_and_its_last_lines_are_printed(monkeypatch, capsys, lines, said):
    """Its last line often only says that something failed."""
    many = [f"line {number}" for number in range(30)]
    script = "".join(f"printf '%b\\n' '{line.replace(chr(0), chr(92) + '0')}'; " for line in (*many, *lines))
    monkeypatch.setitem(launchers.LAUNCHERS, "here", lambda *_: ["sh", "-c", f"{script} exit 1"])
    with Controller([Host("node-1", 1)], OPTIONS) as controller:
        assert controller.call() == {"node-1": f"its agent did not connect to this machine: {said}"}
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "bst launch: the last lines of here:"
    kept = [line for line in (*many, *lines) if line.strip("-\0")]
    assert printed[1:] == [f"  {line}" for line in kept[-15:]]


def test_a_launcher_that_says_nothing_is_not_quoted(monkeypatch, capsys):
    monkeypatch.setitem(launchers.LAUNCHERS, "here", lambda *_: ["false"])
    with Controller([Host("node-1", 1)], OPTIONS) as controller:
        assert controller.call() == {"node-1": "its agent did not connect to this machine"}
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no IPv6")
def test_hosts_can_be_reached_by_ipv6_and_given_ports(tmp_path):
    port = free_port()
    job = Job(tmp_path, replace(OPTIONS, address="::1", port=port, master_port=4711))
    ended = job.run("sys.exit((os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']) != ('::1', '4711'))")
    assert ended.status == 0
    assert f"--controller ::1:{port}" in " ".join(job.controller.command)


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as taken, pytest.raises(HostError, match=r"--port .* cannot listen"):
        Controller(HOSTS, replace(OPTIONS, port=taken.getsockname()[1]))


def test_an_agent_that_cannot_connect_reports_it_in_its_output(monkeypatch):
    """As behind a firewall: the agents have started, but only their output reaches this machine."""
    here = launchers.LAUNCHERS["here"]

    def blocked(hosts, directory, words):
        return here(
            hosts, directory, [word.rpartition(":")[0] and "127.0.0.1:9" if ":" in word else word for word in words]
        )

    monkeypatch.setitem(launchers.LAUNCHERS, "here", blocked)
    monkeypatch.setattr("bst_dist.cluster.controller.CALL_S", 3600.0)
    begun = time.monotonic()
    with Controller(HOSTS, OPTIONS) as controller:
        missing = controller.call()
    assert list(missing) == ["a", "b"]
    for reason in missing.values():
        assert f"{socket.gethostname()} cannot reach the launching process at 127.0.0.1:9" in reason
        assert "--address and --port" in reason
    assert time.monotonic() - begun < 1800  # an agent that reported this is not waited for


def test_an_agent_error_is_reported_with_its_cause(job):
    with job.controller as controller:
        assert controller.call() == {}
        placed = shares(HOSTS, 3, "127.0.0.1", 1)
        ended = controller.run(["/no/such/program"], {}, placed)
    assert "FileNotFoundError" in ended.lost["a"]
    assert "/no/such/program" in ended.explain({})
