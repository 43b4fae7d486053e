"""The controller in the launching process: queries the agents on all hosts, makes them run a job, and watches them.

The state of a job is what its agents report. A host is lost when its connection ends while its ranks run, or when
nothing has arrived from it for a while, not even a heartbeat. Then, as when a rank fails, the ranks of all hosts are
ended. The controller reads all pending messages before it decides, and its timeouts count only time spent listening
(`liveness`). So a launching process that was stopped and continued still learns correctly what happened meanwhile.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bst_dist.cluster import launchers
from bst_dist.cluster.agent import BEAT_S
from bst_dist.cluster.channel import Channel, Closed, Message
from bst_dist.cluster.gateway import AgentGateway, own_addresses
from bst_dist.cluster.hosts import Host, HostError
from bst_dist.cluster.liveness import ListeningClock
from bst_dist.cluster.processes import HostRanks, StopSignals
from bst_dist.cluster.verdict import SETTLE_S, STOP, Ended, LeftAlone, lease_s

TICK_S = 0.1
CALL_S = 60.0
"""Maximum seconds until a host connects, or answers a question."""


@dataclass(frozen=True)
class LaunchOptions:
    """How hosts are reached and processes started on them: the launcher and its settings."""

    launcher: str
    directory: Path
    """Working directory of agents and ranks, on every host."""
    lost_after_s: float = 30.0
    grace_s: float = math.inf
    port: int = 0
    """Port on this machine that the agents connect to; 0: any free port."""
    address: str | None = None
    """Address of this machine that the agents connect to; None: the first of its addresses that answers."""
    ssh_port: int | None = None
    master_port: int = 0
    """Rendezvous port of the ranks on rank 0's host; 0: any free port there."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    """Environment of the launcher, which some launchers pass to the agents."""


class Controller:
    """Controls the agents on `hosts`; a context manager that releases all agents at its end."""

    def __init__(
        self,
        hosts: Sequence[Host],
        options: LaunchOptions,
        stop_signals: StopSignals | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stop_signals`: those that this process receives; None if it does not stop at signals."""
        self.hosts, self.options = list(hosts), options
        self.stop_signals = StopSignals() if stop_signals is None else stop_signals
        self.liveness = ListeningClock(clock)
        self.channels: dict[str, Channel] = {}
        self.gone: dict[str, str] = {}
        """Hosts whose connection has ended -> the reason."""
        self.told: dict[str, int] = {}
        """Hosts whose agent was told to stop, by a scheduler for example -> the signal. `ended` sees later entries."""
        self.ended = Ended(0)
        self._passed_on = 0
        self._question = 0
        self._answers: dict[str, Message] = {}
        self._beaten = -math.inf
        self._selector = selectors.DefaultSelector()
        keys = launchers.keys(options.launcher, hosts)
        self._gateway = AgentGateway(self._selector, keys, self._welcome, options.port)
        called = options.address or ",".join(own_addresses([host.address for host in hosts]))
        agent = agent_command(f"{called}:{self._gateway.port}", self.job, options)
        self.command = launchers.command(options.launcher, hosts, options.directory, agent)

    @property
    def job(self) -> str:
        """The name of this launch."""
        return self._gateway.job

    def __enter__(self) -> Controller:
        launcher, ssh_port = self.options.launcher, self.options.ssh_port
        environment = launchers.environment(launcher, ssh_port, self.options.environment)
        self._gateway.start(self.command, environment, launchers.death_signal(launcher))
        return self

    def __exit__(self, *_: object) -> None:
        self._tell("leave")
        for channel in self.channels.values():
            channel.close()
        self._gateway.close()
        self._selector.close()

    def call(self) -> dict[str, str]:
        """Wait until the agents connect; return the hosts whose agent did not, with the reason if it is known.

        Then the launcher's last lines are printed too.
        """
        until = self.liveness.listened_s + CALL_S
        while len(self.channels) + len(self._gateway.refused) < len(self.hosts) and self.liveness.listened_s < until:
            self._pump()
            if self.stop_signals.first is not None or self._gateway.launcher_ended:
                self._pump()  # read its last output
                break
        missing = [host.name for host in self.hosts if host.name not in self.channels]
        if missing and (lines := self._gateway.last_lines):
            print(f"bst launch: the last lines of {self.options.launcher}:", *lines, sep="\n  ", file=sys.stderr)
        return {name: f"its agent did not connect to this machine{self._launcher_said(name)}" for name in missing}

    def ask(self, kind: str, fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Message]:
        """Send a question to each host in `fields` in parallel; return the answers that arrived in time, by host.

        An answer carries the number of its question, so a late one is not taken for the answer to another question.
        After a stop signal it only waits for answers to "kill".
        """
        self._question += 1
        self._answers.clear()
        for host, details in fields.items():
            self.send(host, kind, question=self._question, **details)
        until = self.liveness.listened_s + CALL_S
        while self.liveness.listened_s < until and not fields.keys() - self.gone.keys() <= self._answers.keys():
            if kind != "kill" and self.stop_signals.first is not None:
                break
            self._pump()
        return dict(self._answers)

    def clock_offsets_s(self, hosts: Collection[str]) -> dict[str, float]:
        """Return, for each of the hosts that answer, the seconds by which its clock is ahead of this one.

        Measured with the fastest of three round trips, so the error is at most half of its duration.
        """
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(3):
            asked = time.time()
            for host, answer in self.ask("clock", {host: {} for host in hosts}).items():
                waited = answer["arrived"] - asked
                found.setdefault(host, []).append((waited, float(answer["seconds"]) - asked - waited / 2))
        return {host: min(offsets)[1] for host, offsets in found.items()}

    def free_port(self, host: str) -> int:
        """Return a free port on the host, or `master_port` if set; raises HostError when the host does not answer."""
        if self.options.master_port:
            return self.options.master_port
        answer = self.ask("port", {host: {}})
        if host not in answer:
            raise HostError(f"{host} was lost before its ranks could be started")
        return int(answer[host]["number"])

    def address(self, host: str) -> str:
        """Return the host's address, as seen in its connection to this machine; raises HostError if it is lost."""
        if host not in self.channels:
            raise HostError(f"{host} was lost before its ranks could be started")
        return self.channels[host].remote_address

    def listen(self, seconds: float) -> None:
        """Handle the messages of the next seconds."""
        until = self.liveness.listened_s + seconds
        while self.liveness.listened_s < until:
            self._pump()

    def run(
        self,
        program: Sequence[str],
        environment: Mapping[str, str],
        shares: Mapping[str, HostRanks],
        notice: str = STOP,
    ) -> Ended:
        """Run `program` on all ranks until they end or a signal stops them; return how it ended.

        `notice`: the message printed at a signal, with a placeholder for its name.
        """
        self.ended = Ended(next(iter(shares.values())).world, told=self.told)
        for host in self.channels:
            self.liveness.hear(host)
        devices = {host.name: {"CUDA_VISIBLE_DEVICES": host.devices} for host in self.hosts if host.devices}
        for host, share in shares.items():
            self.send(
                host,
                "start",
                command=list(program),
                directory=str(self.options.directory),
                environment={**environment, **devices.get(host, {})},
                share=vars(share),
            )
        self._watch(shares, notice)
        if not self.ended.over:
            self._end_ranks(shares)
        return self.ended

    def _watch(self, shares: Mapping[str, HostRanks], notice: str) -> None:
        """Watch until all ranks have ended, until the grace period after a stop signal is over, or until a failure.

        After a failure, reports of the other ranks are waited for shortly: they cannot go on without the one that is
        gone, and whether they were told to stop makes no difference.
        """
        give_up = math.inf
        while not self.ended.over and self.liveness.listened_s < give_up:
            self._pump()
            self._look_for_the_lost(shares)
            if self.stop_signals.first is not None and self.ended.stop_signal is None:
                self.ended.stop_signal = self.stop_signals.first
                name = signal.Signals(self.ended.stop_signal).name
                print(f"bst launch: {notice.format(name)}", file=sys.stderr, flush=True)
                self._tell("stop")
                give_up = min(give_up, self.liveness.listened_s + self.options.grace_s + SETTLE_S)
            elif self.stop_signals.at_once:
                self.ended.at_once = True
                return
            elif self.stop_signals.repeats > self._passed_on:
                self._passed_on = self.stop_signals.repeats
                self._tell("stop")
            if self.ended.failed:
                give_up = min(give_up, self.liveness.listened_s + self.ended.settle_s)

    def _look_for_the_lost(self, shares: Mapping[str, HostRanks]) -> None:
        """Record and print the hosts that are lost while their ranks run."""
        for host in shares.keys() - self.ended.lost.keys():
            silent = self.liveness.silent_s(host) if host in self.channels else 0.0
            if self._has_ended(shares[host]):
                continue
            if host not in self.gone and silent <= self.options.lost_after_s:
                continue
            self.ended.lost[host] = self.gone.get(host, f"silent for {silent:.0f} s")
            print(f"bst launch: lost {host}: {self.ended.lost[host]}", file=sys.stderr, flush=True)

    def _has_ended(self, share: HostRanks) -> bool:
        """Whether all ranks of a host have ended, so that its loss does not matter."""
        return self.ended.gone >= set(range(share.first, share.first + share.count))

    def _end_ranks(self, shares: Mapping[str, HostRanks]) -> None:
        """End all remaining ranks; return only when no rank of the job can still write.

        A host that was cut off ends its ranks by itself, so this waits as long as that can take. After a second signal
        it does not wait, because no new ranks will be started.
        """
        silent = [self.liveness.last(host) for host in self.ended.lost if host in self.channels]
        reachable = shares.keys() - self.ended.lost.keys()
        self.ask("kill", {host: {} for host in reachable})
        for host in self.ended.lost:
            self.send(host, "kill")  # if only the agent was stopped, it reads this when it continues
            self._drop(host, "given up")
        free = max(silent, default=0.0) + lease_s(self.options.lost_after_s, self.options.grace_s) + BEAT_S
        while silent and self.liveness.clock() < free and not self.stop_signals.at_once:
            self._pump()

    def _pump(self) -> None:
        """Handle the messages that have arrived, and send heartbeats to the agents."""
        for key, _ in self.liveness.turn(self._selector, TICK_S):
            key.data()
        for host, channel in list(self.channels.items()):
            if channel.waiting:
                self._attempt(host, channel.flush)
        self._gateway.dismiss_strangers()
        if self.liveness.clock() - self._beaten > BEAT_S:
            self._beaten = self.liveness.clock()
            self._tell("beat")

    def _welcome(self, host: str, channel: Channel) -> None:
        self.channels[host] = channel
        self.liveness.hear(host)
        self._selector.register(channel, selectors.EVENT_READ, partial(self._listen, host))

    def _listen(self, host: str) -> None:
        try:
            messages = self.channels[host].receive()
        except Closed as error:
            self._drop(host, f"its agent is gone ({error})")
            return
        self.liveness.hear(host)
        self._take_all(host, messages)

    def _take_all(self, host: str, messages: Sequence[Message]) -> None:
        for message in messages:
            try:
                self._take(host, message.pop("kind"), message)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self._drop(host, f"its agent sent an invalid message ({error!r})")
                return

    def _take(self, host: str, kind: str, message: Message) -> None:
        if kind == "said":
            print(message["text"], file=sys.stdout if message["stream"] == "out" else sys.stderr, flush=True)
        elif kind == "ended":
            self.ended.end(int(message["rank"]), int(message["status"]), self._when(host, message))
        elif kind == "alone":
            self.ended.left_alone[host] = LeftAlone(float(message["silent_s"]), self._when(host, message))
        elif kind == "cut short":
            self.ended.cut_short |= {int(rank) for rank in message["ranks"]}
        elif kind == "told":
            self.told[host] = int(message["signal"])
        elif kind == "failed":
            self._drop(host, f"its agent failed while it ran '{message['duty']}': {message['why']}")
        elif kind == "beat":
            self.liveness.beat(host, float(message["at"]))
        elif message["question"] == self._question:
            self._answers[host] = {**message, "arrived": time.time()}

    def _when(self, host: str, message: Message) -> float:
        return self.liveness.when(host, float(message["at"]))

    def send(self, host: str, kind: str, **fields: Any) -> None:
        """Send a message whose answer, if there is one, is not waited for; a host that is gone is skipped."""
        if host in self.channels:
            self._attempt(host, partial(self.channels[host].send, kind, **fields))

    def _attempt(self, host: str, act: Any) -> None:
        try:
            act()
        except Closed as error:
            self._take_all(host, self.channels[host].last_words())
            self._drop(host, f"its agent is gone ({error})")

    def _tell(self, kind: str) -> None:
        for host in list(self.channels):
            self.send(host, kind)

    def _drop(self, host: str, reason: str) -> None:
        channel = self.channels.pop(host, None)
        if channel is not None:
            self.gone[host] = reason
            self._selector.unregister(channel)
            channel.close()

    def _launcher_said(self, host: str) -> str:
        said = self._gateway.said(host)
        return f": {said}" if said else ""


def agent_command(controller: str, job: str, options: LaunchOptions) -> list[str]:
    """Return the command line of an agent, without its key; `controller`: ``ADDRESS,...:PORT`` to connect to."""
    return [
        sys.executable,
        "-m",
        "bst_dist.cluster.agent",
        "--controller",
        controller,
        "--job",
        job,
        "--lost-after",
        f"{options.lost_after_s:g}",
        "--grace",
        f"{options.grace_s:g}",
    ]
