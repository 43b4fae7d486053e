"""The launching process's side: calls an agent to every host, asks them, has them run a job, and watches them.

What is true about a job is what its agents say. A host is lost when its connection ends or nothing has come from it
for a while, a heartbeat included; then, as when a rank fails, the ranks of all hosts are ended.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bst_dist.cluster.agent import BEAT_S
from bst_dist.cluster.channel import Channel, Closed, Message
from bst_dist.cluster.hosts import Host, HostError
from bst_dist.cluster.launchers import PDSH_ENVIRONMENT, command
from bst_dist.cluster.processes import Share, die_with_parent, route_to
from bst_dist.cluster.verdict import SETTLE_S, STOP, Ended

TICK_S = 0.1
CALL_S = 60.0
"""How long a host may take to call back, or to answer a question."""


class Controller:
    """Agents on `hosts`, called through `launcher`; a context, at whose end no agent is left."""

    def __init__(
        self, hosts: Sequence[Host], launcher: str, directory: Path, lost_after_s: float, grace_s: float,
        told: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """`told`: a list in which signal numbers appear that mean that the job is to stop."""
        self.hosts, self.directory, self.job = list(hosts), directory, secrets.token_hex(8)
        self.told = told
        self.lost_after_s, self.grace_s = lost_after_s, grace_s
        self.channels: dict[str, Channel] = {}
        self.gone: dict[str, str] = {}
        """Hosts whose connection has ended, and why."""
        self.ended = Ended(0)
        self._answers: dict[str, Message] = {}
        self._beaten = 0.0
        self._listener = socket.create_server(("", 0), backlog=len(hosts))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        called = f"{','.join(_own_addresses(hosts))}:{self._listener.getsockname()[1]}"
        agent = agent_command(called, self.job, lost_after_s, grace_s)
        self.command = command(launcher, hosts, directory, agent)

    def __enter__(self) -> Controller:
        self._said = tempfile.TemporaryFile()
        self._launcher = subprocess.Popen(
            self.command, env={**os.environ, **PDSH_ENVIRONMENT}, stdin=subprocess.DEVNULL, stdout=self._said,
            stderr=self._said, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._tell("leave")
        for channel in self.channels.values():
            channel.close()
        self._listener.close()
        self._end_launcher()
        self._said.close()

    def call(self) -> dict[str, str]:
        """Wait for the agents to call back; returns the hosts that did not, and what is known about why."""
        deadline = time.monotonic() + CALL_S
        while len(self.channels) < len(self.hosts) and time.monotonic() < deadline:
            self._pump()
            if self.told or self._launcher.poll() is not None:
                break
        missing = [host.name for host in self.hosts if host.name not in self.channels]
        return {name: f"no agent called back{self._launcher_said(name)}" for name in missing}

    def ask(self, kind: str, fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Message]:
        """Send each of the hosts named its question at once; returns the answers, by host, that came in time.

        Told twice to stop, no answer is waited for but that the ranks have been killed.
        """
        self._answers.clear()
        for host, question in fields.items():
            self._send(host, kind, **question)
        deadline = time.monotonic() + CALL_S
        while time.monotonic() < deadline and not fields.keys() - self.gone.keys() <= self._answers.keys():
            if kind != "kill" and len(self.told) > 1:
                break
            self._pump()
        return dict(self._answers)

    def clock_offset_s(self, host: str) -> float:
        """How far the host's clock is ahead of this one: the best of three, within half the time an answer takes."""
        found = []
        for _ in range(3):
            asked = time.time()
            answer = self.ask("clock", {host: {}})
            waited = time.time() - asked
            if host in answer:
                found.append((waited, answer[host]["seconds"] - asked - waited / 2))
        return min(found)[1] if found else float("nan")

    def free_port(self, host: str) -> int:
        """A port of the host that nobody listens on; raises HostError when it gives no answer."""
        answer = self.ask("port", {host: {}})
        if host not in answer:
            raise HostError(f"{host} was lost before its ranks could be started")
        return int(answer[host]["number"])

    def address(self, host: str) -> str:
        """The host's address on the network that connects it with this one."""
        return self.channels[host].remote_address

    def run(self, program: Sequence[str], environment: Mapping[str, str], shares: Mapping[str, Share]) -> Ended:
        """Run `program` on all ranks to its end, or to where they stop when told to."""
        self.ended = Ended(next(iter(shares.values())).world)
        now = time.monotonic()
        for channel in self.channels.values():
            channel.heard = now
        for host, share in shares.items():
            self._send(host, "start", command=list(program), directory=str(self.directory),
                       environment=dict(environment), share=vars(share))  # fmt: skip
        self._watch(shares)
        if not self.ended.over:
            self._end_ranks(shares)
        return self.ended

    def _watch(self, shares: Mapping[str, Share]) -> None:
        """Until the ranks have all ended, or something has failed and had the time to be understood."""
        give_up: float | None = None
        while not self.ended.over and (give_up is None or time.monotonic() < give_up):
            self._pump()
            self._look_for_the_lost(shares)
            if self.told and self.ended.told is None:
                self.ended.told = self.told[0]
                print(f"bst launch: {STOP.format(signal.Signals(self.told[0]).name)}", file=sys.stderr, flush=True)
                self._tell("stop")
                give_up = time.monotonic() + self.grace_s + SETTLE_S
            elif len(self.told) > 1:
                self.ended.at_once = True
                return
            if self.ended.failed and not self.ended.told and give_up is None:
                give_up = time.monotonic() + SETTLE_S

    def _look_for_the_lost(self, shares: Mapping[str, Share]) -> None:
        for host in shares.keys() - self.ended.lost.keys():
            silent = time.monotonic() - self.channels[host].heard if host in self.channels else 0.0
            if host in self.gone:
                self.ended.lost[host] = self.gone[host]
            elif silent > self.lost_after_s:
                self.ended.lost[host] = f"silent for {silent:.0f} s"

    def _end_ranks(self, shares: Mapping[str, Share]) -> None:
        """End what is left, and return only when nothing of the job can still write.

        A host that was cut off ends its ranks by itself when it has heard nothing for as long as it takes here to miss
        it, which it may have done that much later: so its lease is twice that time. After a second signal it is not
        waited for: nothing will be started.
        """
        silent = [self.channels[host].heard for host in self.ended.lost if host in self.channels]
        reachable = shares.keys() - self.ended.lost.keys()
        self.ask("kill", {host: {} for host in reachable})
        for host in self.ended.lost:
            self._drop(host, "given up")
        lease = max(silent, default=0.0) + 2 * self.lost_after_s + BEAT_S
        while silent and time.monotonic() < lease and len(self.told) < 2:
            self._pump()

    def _pump(self) -> None:
        """Take in what has arrived, and let the agents hear that this process lives."""
        for key, _ in self._selector.select(TICK_S):
            key.data()
        if time.monotonic() - self._beaten > BEAT_S:
            self._beaten = time.monotonic()
            self._tell("beat")

    def _accept(self) -> None:
        channel = Channel(self._listener.accept()[0])
        self._selector.register(channel, selectors.EVENT_READ, partial(self._greet, channel))

    def _greet(self, channel: Channel) -> None:
        """The first message must name this job and one of its hosts; others are sent away."""
        self._selector.unregister(channel)
        try:
            hello, *_ = channel.receive() or [{}]
        except Closed:
            hello = {}
        host = hello.get("host")
        if hello.get("job") != self.job or host in self.channels or host not in {one.name for one in self.hosts}:
            channel.close()
            return
        self.channels[host] = channel
        self._selector.register(channel, selectors.EVENT_READ, partial(self._listen, host))

    def _listen(self, host: str) -> None:
        try:
            for message in self.channels[host].receive():
                self._take(host, message)
        except Closed as error:
            self._drop(host, f"its agent is gone ({error})")

    def _take(self, host: str, message: Message) -> None:
        kind = message.pop("kind")
        if kind == "said":
            print(message["text"], file=sys.stdout if message["stream"] == "out" else sys.stderr, flush=True)
        elif kind == "ended":
            self.ended.statuses[message["rank"]] = message["status"]
        elif kind != "beat":
            self._answers[host] = message

    def _send(self, host: str, kind: str, **fields: Any) -> None:
        if host not in self.channels:
            return
        try:
            self.channels[host].send(kind, **fields)
        except Closed as error:
            self._drop(host, f"its agent is gone ({error})")

    def _tell(self, kind: str) -> None:
        for host in list(self.channels):
            self._send(host, kind)

    def _drop(self, host: str, reason: str) -> None:
        channel = self.channels.pop(host, None)
        if channel is not None:
            self.gone[host] = reason
            self._selector.unregister(channel)
            channel.close()

    def _launcher_said(self, host: str) -> str:
        """What pdsh, mpirun or srun printed about a host, or at all."""
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        about = [line for line in lines if host in line] or lines
        return f": {about[-1]}" if about else ""

    def _end_launcher(self) -> None:
        """The agents have ended by themselves, or cannot be reached; neither need pdsh's ssh be waited for."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._launcher.wait(timeout=5)
                break
            except subprocess.TimeoutExpired:
                os.killpg(self._launcher.pid, number)
        self._launcher.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._launcher.pid, signal.SIGKILL)


def agent_command(controller: str, job: str, lost_after_s: float, grace_s: float) -> list[str]:
    """The command line of an agent that calls ``ADDRESS,...:PORT``, but for the name of its host."""
    return [sys.executable, "-m", "bst_dist.cluster.agent", "--controller", controller, "--job", job,
            "--lost-after", f"{lost_after_s:g}", "--grace", f"{grace_s:g}"]  # fmt: skip


def _own_addresses(hosts: Sequence[Host]) -> list[str]:
    """This machine's addresses, those on the way to the hosts first.

    A name of this machine itself may lead to a loopback address, which is of use only when there is no other.
    """
    found = dict.fromkeys(own for host in hosts if (own := route_to(host.name)))
    for addresses in psutil.net_if_addrs().values():
        found |= dict.fromkeys(one.address for one in addresses if one.family == socket.AF_INET)
    return [one for one in found if not one.startswith("127.")] or ["127.0.0.1"]
