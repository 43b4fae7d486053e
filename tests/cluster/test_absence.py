"""A launching process that was suspended for long finds out what happened meanwhile, in any order of events.

Sockets are real. Time and the wait for sockets are simulated, so that a suspension can be placed between any two steps.
"""

from __future__ import annotations

import itertools
import math
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bst_dist.cluster import launchers
from bst_dist.cluster.agent import Agent
from bst_dist.cluster.channel import Channel, Closed
from bst_dist.cluster.controller import Controller, LaunchOptions
from bst_dist.cluster.elastic import shares
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.liveness import MOST_S, ListeningClock
from bst_dist.cluster.processes import HostRanks, StopSignals
from bst_dist.cluster.verdict import Ended
from bst_dist.faults.status import DONE, FAILED, RESUBMIT

HOSTS = [Host("a", 1), Host("b", 2)]
RANKS = {"a": [0], "b": [1, 2]}
LOST_S = 5.0
AWAY_S = 100.0
OPTIONS = LaunchOptions("here", Path.cwd(), LOST_S, 5.0, address="127.0.0.1")
LAST_TURN = 20_000
"""Half an hour of simulated time."""
STOPS = ("in the wait", "before the look", "after the look", "before judging")


class Stage:
    """A launching process with two agents, which send the messages that the test wants."""

    def __init__(self, stop: str = "") -> None:
        self.now, self.turns, self.stop, self.agents = 1000.0, 0, stop, {}
        self.stop_at, self.beating = 20, 20
        """The turn of the suspension, and the first turn without heartbeats."""
        self.ahead = {"a": 0.0, "b": 5e6}
        """Offsets of the hosts' own clocks, which are independent."""
        self.meanwhile, self.deaf = lambda: None, False
        self.events: dict[int, Callable[[], object]] = {}
        """What happens at a turn, without a suspension."""
        self.controller = Controller(HOSTS, OPTIONS, clock=lambda: self.now)
        self.real, self.controller._selector = self.controller._selector, self
        look = self.controller._look_for_the_lost
        self.controller._look_for_the_lost = lambda shares: (self._at("before judging"), look(shares))
        for host in ("a", "b"):
            with socket.create_server(("127.0.0.1", 0)) as server:
                self.agents[host] = Channel(socket.create_connection(server.getsockname()))
                self.controller._welcome(host, Channel(server.accept()[0]))

    def __getattr__(self, name: str):
        return getattr(self.real, name)

    def select(self, seconds: float):
        """Replacement for a selector's `select`. A suspension ends the wait with no events, like EINTR."""
        if not seconds:
            self._at("before the look")
            found = [] if self.deaf else self.real.select(0)
            self._at("after the look")
            return found
        self.turns += 1
        assert self.turns < LAST_TURN, "waits without end"
        self.now += seconds
        self.events.get(self.turns, lambda: None)()
        if self.turns < self.beating or not self.stop:
            for host in self.agents:
                self.say(host, "beat")
        elif self.turns == self.stop_at:
            self.say("a", "beat")  # one message is ready, more will follow
        return [] if self._at("in the wait") or self.deaf else self.real.select(0)

    def _at(self, place: str) -> bool:
        if self.turns != self.stop_at or place != self.stop:
            return False
        self.stop, since = "done", self.now
        self.meanwhile()
        self.now = since + AWAY_S
        return True

    def say(self, host: str, kind: str, **fields) -> None:
        if host in self.agents:
            self.agents[host].send(kind, at=self.now + self.ahead[host], **fields)

    def gone(self, host: str) -> None:
        """End the host's agent."""
        self.agents.pop(host).close()

    def run(self) -> Ended:
        try:
            return self.controller.run(["program"], {}, shares(HOSTS, 3, "127.0.0.1", 1))
        finally:
            self.controller.__exit__()
            for agent in self.agents.values():
                agent.close()


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.setitem(launchers.LAUNCHERS, "here", lambda *_: ["true"])


def happenings(stage: Stage, order: tuple[str, ...], seconds: float, status: int = RESUBMIT) -> None:
    """Let both hosts lose the launcher, end their ranks and close their connections; each host keeps this order."""
    steps = {host: iter(("alone", "ended", "gone")) for host in ("a", "b")}
    for host in order:
        stage.now += seconds
        step = next(steps[host])
        if step == "alone":
            stage.say(host, "alone", silent_s=LOST_S)
        elif step == "gone":
            stage.gone(host)
        else:
            for rank in RANKS[host]:
                stage.say(host, "ended", rank=rank, status=status)


ORDERS = sorted(set(itertools.permutations("aaabbb")))


@pytest.mark.parametrize("stop", STOPS)
def test_events_while_the_launcher_is_stopped_are_handled_in_any_order(stop):
    for order in ORDERS:
        stage = Stage(stop)
        stage.meanwhile = lambda stage=stage, order=order: happenings(stage, order, 0.5)
        ended = stage.run()
        assert (ended.status, ended.lost, ended.worth_a_restart) == (RESUBMIT, {}, True), order
        assert "got no sign of life from this process for 5 s" in ended.explain({}), order


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("away_s", [1.0, 4.9, 5.0, 5.1, 6.0, 1e6])
def test_hosts_that_kept_sending_are_not_lost_after_a_launcher_stop(stop, away_s, monkeypatch):
    monkeypatch.setattr(f"{__name__}.AWAY_S", away_s)
    stage = Stage(stop)

    def meanwhile() -> None:
        for _ in range(min(int(away_s), 500)):
            stage.now += 1
            for host in ("a", "b"):
                stage.say(host, "beat")
        for host in ("a", "b"):
            for rank in RANKS[host]:
                stage.say(host, "ended", rank=rank, status=DONE)

    stage.meanwhile = meanwhile
    ended = stage.run()
    assert (ended.status, ended.lost, ended.left_alone) == (DONE, {}, {})


@pytest.mark.parametrize("stop", STOPS)
def test_pending_messages_are_read_before_a_host_is_declared_lost(stop):
    stage = Stage(stop)
    stage.stop_at = stage.beating + int(10 * LOST_S) - 2  # silent for 4.8 s
    stage.meanwhile = lambda: happenings(stage, ("a", "b", "a", "b"), 0.5)
    ended = stage.run()
    assert (ended.status, ended.lost) == (RESUBMIT, {})


def test_messages_received_before_a_failed_send_still_count(monkeypatch):
    stage = Stage("before judging")

    def meanwhile() -> None:
        happenings(stage, ("a", "a", "b", "b"), 0.5)
        for channel in stage.controller.channels.values():
            monkeypatch.setattr(channel, "flush", lambda: (_ for _ in ()).throw(Closed("Broken pipe")))

    stage.meanwhile = meanwhile
    stage.deaf = True
    ended = stage.run()
    assert (ended.status, ended.lost) == (RESUBMIT, {})


@pytest.mark.parametrize("first", ["failure", "alone"])
def test_the_earliest_event_is_the_cause_although_clocks_differ(first):
    """Either rank 1 fails and rank 0 aborts because of it, or both fail because of a kill."""
    stage = Stage("in the wait")

    def meanwhile() -> None:
        if first == "failure":
            stage.now += 1
            stage.say("b", "ended", rank=1, status=3)
            stage.now += 4
        for host in ("b", "a"):
            stage.say(host, "alone", silent_s=LOST_S)
        stage.now += 5
        if first == "alone":
            stage.say("b", "ended", rank=1, status=3)
        stage.say("a", "ended", rank=0, status=1)
        stage.say("b", "cut short", ranks=[2])

    stage.meanwhile = meanwhile
    ended = stage.run()
    assert ended.over
    assert not ended.lost
    assert ended.worth_a_restart
    if first == "failure":
        assert (ended.status, ended.explain({1: "b"})) == (3, "rank 1 on b ended with status 3")
    else:
        assert ended.status == FAILED
        assert ended.explain({}).startswith("b got no sign of life from this process for 5 s (was it stopped?)")
        assert "not all ranks stopped with a checkpoint in time" in ended.explain({})


def test_a_silent_host_is_lost_after_the_timeout():
    stage = Stage()
    say = stage.say
    stage.say = lambda host, kind, **fields: say(host, kind, **fields) if host == "a" or stage.turns < 20 else None
    ended = stage.run()
    assert list(ended.lost) == ["b"]
    assert ended.lost["b"] == f"silent for {LOST_S:.0f} s"


@pytest.mark.parametrize(("failure", "status"), [("rank", 137), ("host", FAILED)])
def test_a_failure_after_a_stop_signal_ends_the_wait_although_there_is_no_grace_period(failure, status, capsys):
    """The other ranks cannot write their checkpoint without the one that is gone: waiting for it would never end."""
    stage, stop_signals = Stage(), StopSignals()
    stage.controller.options, stage.controller.stop_signals = replace(OPTIONS, grace_s=math.inf), stop_signals
    fail = {"rank": lambda: stage.say("b", "ended", rank=1, status=-9), "host": lambda: stage.gone("b")}[failure]
    stage.events = {10: lambda: setattr(stop_signals, "first", 15), 30: fail}
    said: list[str] = []
    stage.events[60] = lambda: said.append(capsys.readouterr().err)  # while reports of other ranks are waited for
    ended = stage.run()
    assert (ended.status, ended.stop_signal) == (status, 15)
    if failure == "host":
        assert list(ended.lost) == ["b"]
        assert "bst launch: lost b: its agent is gone" in said[0]
    else:
        assert ended.explain({1: "b"}) == "rank 1 on b was killed by SIGKILL (out of memory?)"


@pytest.mark.parametrize("late", ["probe", "clock"])
def test_a_late_answer_is_not_taken_for_the_answer_to_another_question(late):
    """A host whose file system hung may answer after the wait for its answer has ended."""
    stage = Stage()
    assert stage.controller.ask(late, {"a": {}}) == {}
    (asked,) = [message for message in stage.agents["a"].receive() if message["kind"] == late]
    stage.events[stage.turns + 1] = lambda: stage.say("a", late, question=asked["question"], seconds=1.0)
    assert stage.controller.ask("clock", {"a": {}}) == {}
    stage.controller.__exit__()


def test_time_of_suspension_does_not_count_as_silence_of_a_host():
    """For example after the whole machine was suspended, network included."""
    now = 100.0
    liveness = ListeningClock(lambda: now)
    liveness.hear("a")
    with selectors.DefaultSelector() as selector:
        now += 1e6
        assert liveness.turn(selector, 0) == []
    assert liveness.silent_s("a") == MOST_S


def test_a_drifting_host_clock_is_followed():
    now = 100.0
    liveness = ListeningClock(lambda: now)
    assert liveness.when("a", 7.0) == now  # its clock is not known yet
    for beats in range(100_000):
        now = 100.0 + beats
        liveness.beat("a", 5.0 + beats * (1 - 5e-5))  # 50 parts in a million slower: 5 s in these 28 hours
    now += 60.0  # read late
    assert liveness.when("a", 5.0 + beats * (1 - 5e-5)) == pytest.approx(now - 60.0, abs=0.01)


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_agent_without_launcher_stops_its_ranks_and_keeps_running(stubborn):
    """Tests the agent, with a process as rank: one that stops on SIGTERM, and one that does not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = Channel(socket.create_connection(server.getsockname()))
        agent = Agent(Channel(server.accept()[0]), lost_after_s=0.5, grace_s=60)
    on_term = "signal.SIG_IGN" if stubborn else "lambda *_: os._exit(75)"
    rank = f"import os, signal, time; signal.signal(signal.SIGTERM, {on_term}); print('ready', flush=True); "
    rank += "time.sleep(600)"
    said: list[dict] = []

    def launching_process() -> None:
        """Wait for the rank to be ready, send nothing until the agent has stopped it, then read all messages."""
        share = HostRanks(0, 1, 1, "127.0.0.1", 1)
        own.send("start", command=[sys.executable, "-c", rank], directory="/", environment={}, share=vars(share))
        hear("said", beats=True)
        hear("cut short" if stubborn else "ended", beats=False)
        hear("beat", beats=False)  # the agent still runs
        own.send("leave")

    def hear(kind: str, beats: bool) -> None:
        kinds = len(said)
        while not any(one["kind"] == kind for one in said[kinds:]):
            said.extend(own.receive())
            if beats:
                own.send("beat")
            pause.wait(0.02)

    pause = threading.Event()
    other = threading.Thread(target=launching_process, daemon=True)
    other.start()
    agent.serve()
    other.join(60)
    kinds = [one["kind"] for one in said if one["kind"] != "beat"]
    assert kinds == ["said", "alone", "cut short" if stubborn else "ended"]
    assert said[-1]["kind"] == "beat"
    ended = next(one for one in said if one["kind"] in ("cut short", "ended"))
    assert ended.get("ranks") == [0] if stubborn else (ended["rank"], ended["status"]) == (0, 75)
