"""The agent, one process on each host of a job: answers the preflight, runs the host's ranks, reports how they ended.

The launching process starts the agent through pdsh, Open MPI, MPICH or Slurm, and the agent connects back to it over
TCP. Only the secret that authenticates the two goes through those launchers. Neither side outlives the other:

- The launching process ends: the ranks are asked to stop, and write their checkpoint within the grace period.
- It is silent for `--lost-after` seconds, because it was stopped or the network is cut: the ranks are asked to stop
  too. They are killed after `--lost-after` (or the grace period, if shorter), because new ranks may start after that
  (`verdict.lease_s`). The agent stays as long as its connection does. So a launching process that continues learns that
  the agent was left alone, and for each rank whether it ended by itself or was killed.
- The agent is killed: the kernel kills the ranks with it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from bst_base.host import free_port
from bst_dist.cluster.channel import Channel, Closed, Message, proof, proved
from bst_dist.cluster.liveness import look
from bst_dist.cluster.probe import probe, unmark
from bst_dist.cluster.processes import HostRanks, LocalRanks, catch_stop_signals

TICK_S = 0.1
BEAT_S = 1.0
WELCOME_S = 60.0
"""Maximum seconds until the launching process answers; all hosts connect to it at the same time."""
LAST_WORDS_S = 5.0
"""Maximum seconds to wait for remaining output: of a rank that has ended, and of this process to the launching one."""


class Agent:
    """Serves one launching process until that releases it."""

    def __init__(self, channel: Channel, lost_after_s: float, grace_s: float, first: Sequence[Message] = ()) -> None:
        """`first`: messages that arrived together with the welcome."""
        self._first = first
        self.channel, self.lost_after_s, self.grace_s = channel, lost_after_s, grace_s
        self.ranks: LocalRanks | None = None
        self._reported: set[int] = set()
        """Ranks whose end the launching process knows of."""
        self._released = False
        self._left_alone = False
        """Whether the ranks were stopped because the launching process was silent."""
        self._stop_reported = False
        """Whether the launching process knows that this one was told to stop."""
        self._last_beat = 0.0
        self._dropped_reported = 0
        """Number of dropped pieces of output that the launching process knows of."""
        self._question: int | None = None
        """Number of the question that is being answered."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ, self._listen)
        self._handlers: dict[str, Callable[[Message], None]] = {
            "beat": lambda _: None,  # receiving it has already updated `channel.heard`
            "clock": lambda _: self._answer("clock", seconds=time.time()),
            "probe": lambda wanted: self._answer("probe", **probe(**wanted)),
            "unmark": self._unmark,
            "port": lambda _: self._answer("port", number=free_port()),
            "start": self._start,
            "stop": lambda _: self._stop_ranks(self.grace_s, by_user=True),
            "kill": self._on_kill,
            "leave": self._leave,
        }

    def serve(self) -> None:
        """Handle messages until released, or until the connection and all ranks have ended."""
        with catch_stop_signals() as stop_signals:
            try:
                self._do(self._first)
                while not self._released:
                    looked, found = look(self._selector, TICK_S)
                    for key, _ in found:
                        key.data()
                    self.channel.flush()
                    if stop_signals.first is not None:
                        self._obey(stop_signals.first)
                    self._report_ended()
                    self._beat()
                    self._look_for_the_launching_process(looked)
                self._report_ended()
                self.channel.drain(LAST_WORDS_S)
            except Closed:
                self._finish_alone()
            finally:
                self._kill()

    def _obey(self, stop_signal: int) -> None:
        """Stop the ranks, and any that are started later, because this process was told to stop; report it once."""
        if not self._stop_reported:
            self._stop_reported = True
            self.channel.send("told", signal=stop_signal)
        self._stop_ranks(self.grace_s)

    def _look_for_the_launching_process(self, looked: float) -> None:
        """Stop the ranks when the launching process has been silent for too long, even if it returns later.

        `looked`: when this agent last checked for messages, so that time in which the agent itself was stopped does not
        count as silence.
        """
        silent = looked - self.channel.heard
        if silent > self.lost_after_s and not self._left_alone and self.ranks is not None and self.ranks.running:
            self._left_alone = True
            self.channel.send("alone", silent_s=silent, at=time.monotonic())
            self._stop_ranks(min(self.grace_s, self.lost_after_s))

    def _listen(self) -> None:
        self._do(self.channel.receive())

    def _do(self, messages: Sequence[Message]) -> None:
        for message in messages:
            kind, self._question = message.pop("kind"), message.pop("question", None)
            try:
                self._handlers[kind](message)
            except Closed:
                raise
            except Exception as error:  # report any error, or the user would only see "connection closed"
                self.channel.send("failed", duty=kind, why=f"{type(error).__name__}: {error}")

    def _answer(self, kind: str, **fields: Any) -> None:
        """Answer the message that is being handled, with the number of its question."""
        self.channel.send(kind, question=self._question, **fields)

    def _unmark(self, where: Message) -> None:
        unmark(**where)
        self._answer("unmarked")

    def _start(self, job: Message) -> None:
        share = HostRanks(**job["share"])
        environment = {**without_own_task(os.environ), **job["environment"]}
        self._reported.clear()
        self._left_alone = False
        self.ranks = LocalRanks(job["command"], share, environment, Path(job["directory"]), piped=True)
        for rank, process in self.ranks.processes.items():
            for name, pipe in (("out", process.stdout), ("err", process.stderr)):
                os.set_blocking(pipe.fileno(), False)
                self._selector.register(pipe, selectors.EVENT_READ, partial(self._relay, pipe, rank, name, [b""]))

    def _stop_ranks(self, grace_s: float, by_user: bool = False) -> None:
        """Ask the ranks to stop; `by_user`: a user's request, which is passed on as a signal if it is repeated."""
        if self.ranks is None:
            return
        if by_user and self.ranks.stopping:
            self.ranks.remind()
        else:
            self.ranks.terminate(grace_s)

    def _on_kill(self, _: Message) -> None:
        self._kill()
        self._answer("killed")

    def _leave(self, _: Message) -> None:
        self._released = True

    def _relay(self, pipe: IO[bytes], rank: int, name: str, pending: list[bytes]) -> None:
        """Send the whole lines in a rank's output, and at its end also an incomplete line.

        Ranks never wait for a slow launching process: output that it does not read is dropped and counted.
        """
        data = pipe.read(1 << 16)
        *lines, pending[0] = (pending[0] + (data or b"")).split(b"\n")
        if not data:
            self._selector.unregister(pipe)
            lines, pending[0] = [*lines, *filter(None, pending)], b""
        if lines:
            text = b"\n".join(lines).decode(errors="replace")
            self.channel.send("said", may_be_dropped=True, rank=rank, stream=name, text=text)

    def _report_ended(self) -> None:
        ended = self.ranks.poll() if self.ranks is not None else {}
        for rank in ended.keys() - self._reported:
            process = self.ranks.processes[rank]
            open_still = any(pipe in self._selector.get_map() for pipe in (process.stdout, process.stderr))
            if open_still and time.monotonic() - self.ranks.ended_at[rank] < LAST_WORDS_S:
                continue  # send its output first, unless it hangs in the kernel and never closes its pipes
            self._reported.add(rank)
            self.channel.send("ended", rank=rank, status=ended[rank], at=self.ranks.ended_at[rank])
        if self.ranks is not None and (killed := self.ranks.cut_short - self._reported):
            self._reported |= killed
            self.channel.send("cut short", ranks=sorted(killed))

    def _beat(self) -> None:
        if time.monotonic() - self._last_beat < BEAT_S:
            return
        self._last_beat = time.monotonic()
        self.channel.send("beat", at=self._last_beat)
        if (missed := self.channel.dropped - self._dropped_reported) and not self.channel.waiting:
            self._dropped_reported = self.channel.dropped
            text = f"[{missed} pieces of output of {socket.gethostname()} were lost: they were not read in time]"
            self.channel.send("said", rank=None, stream="err", text=text)

    def _finish_alone(self) -> None:
        """After the launching process has ended: let the ranks write their checkpoint and stop; drop their output."""
        if self.ranks is None:
            return
        self.ranks.terminate(self.grace_s)
        while self.ranks.running:
            self.ranks.poll()
            for process in self.ranks.processes.values():
                for pipe in (process.stdout, process.stderr):
                    while pipe.read(1 << 16):
                        continue
            time.sleep(TICK_S)

    def _kill(self) -> None:
        if self.ranks is not None:
            self.ranks.kill()


def without_own_task(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the launcher's variables about the agent's task.

    A library in a rank might otherwise take the rank for that task.
    """
    own = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDRA_", "SLURM_STEP_", "SLURM_TASK")
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NODEID", "SLURM_GTIDS")
    return {name: value for name, value in environment.items() if not name.startswith(own) and name not in names}


def main() -> int:
    """Connect to the launching process and serve it; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bst_dist.cluster.agent", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--controller", required=True, metavar="ADDRESS,...:PORT", help="the launching process, by any of its addresses"
    )
    parser.add_argument("--job", required=True, help="the launch that this is a part of")
    parser.add_argument("--key", default=os.environ.get("SLURMD_NODENAME", ""), help="which of its agents this is")
    parser.add_argument("--lost-after", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--grace", type=float, required=True, metavar="SECONDS")
    args = parser.parse_args()
    secret = secrets.token_hex(32)
    sys.stdout.write(f"bst-agent {args.key} {secret}\n")  # in one write, so that other agents' lines do not mix with it
    sys.stdout.flush()
    try:
        channel, first = call(args.controller, args.key, secret)
    except (OSError, Closed) as error:
        where = f"{socket.gethostname()} cannot reach the launching process at {args.controller}"
        print(
            f"bst-agent {args.key} failed: {where}: {error}; if a firewall is between them, give "
            "`bst launch` --address and --port that this host can reach",
            flush=True,
        )
        return 1
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the launcher's connection may break; only the channel matters
    Agent(channel, args.lost_after, args.grace, first).serve()
    return 0


def call(controller: str, key: str, secret: str) -> tuple[Channel, Sequence[Message]]:
    """Connect to the launching process; return the channel and messages that have already arrived.

    Each side proves to the other that it knows the agent's secret. Raises the OSError of the last address when none
    answers, and Closed when the process that answers cannot prove it.
    """
    channel = _connect(controller)
    salt = secrets.token_hex(16)
    channel.send("hello", key=key, salt=salt, proof=proof(secret, "hello", key, salt))
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        deadline, answers = time.monotonic() + WELCOME_S, []
        while not answers and time.monotonic() < deadline:
            if selector.select(TICK_S):
                answers = channel.receive()
    if not answers or not proved(answers[0].get("proof"), secret, "welcome", key, salt):
        raise Closed("what answers there is not the launching process")
    channel.trust()
    return channel, answers[1:]


def _connect(controller: str) -> Channel:
    """Connect to the first address that answers; raises the OSError of the last address if none does."""
    addresses, _, port = controller.rpartition(":")
    *others, last = addresses.split(",")
    for address in others:
        try:
            return Channel.connect(address, int(port))
        except OSError:
            continue
    return Channel.connect(last, int(port))


if __name__ == "__main__":
    sys.exit(main())
