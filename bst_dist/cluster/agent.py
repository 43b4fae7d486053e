"""One process on each host of a job: answers the preflight, runs the host's ranks, and says how each of them ended.

The launching process starts it through pdsh, Open MPI, MPICH or Slurm and is called back; nothing else goes through
those launchers, so what they make of signals, statuses and output does not matter. Neither side outlives the other:

- the launching process has ended: the ranks are asked to stop, and write their checkpoint within the grace;
- it has not been heard of for `--lost-after` seconds: the network is cut, the ranks are killed at once, so that they do
  not write where their successors already do;
- this process is killed: the kernel kills the ranks with it.
"""

from __future__ import annotations

import argparse
import os
import selectors
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import IO

from bst_dist.cluster.channel import Channel, Closed, Message
from bst_dist.cluster.probe import free_port, probe, unmark
from bst_dist.cluster.processes import LocalRanks, Share, told_to_stop

TICK_S = 0.1
BEAT_S = 1.0


class Agent:
    """Serves one launching process until that lets it go."""

    def __init__(self, channel: Channel, lost_after_s: float, grace_s: float) -> None:
        self.channel, self.lost_after_s, self.grace_s = channel, lost_after_s, grace_s
        self.ranks: LocalRanks | None = None
        self.reported: set[int] = set()
        self.released = False
        self.beaten = 0.0
        self.selector = selectors.DefaultSelector()
        self.selector.register(channel, selectors.EVENT_READ, self._listen)

    def serve(self) -> None:
        """Do what is asked; returns when let go, or when all is ended that must not go on alone."""
        with told_to_stop() as told:
            try:
                while not self.released:
                    for key, _ in self.selector.select(TICK_S):
                        key.data()
                    self._report_ended()
                    self._beat()
                    if told and self.ranks is not None:
                        self.ranks.terminate(self.grace_s)
                    if time.monotonic() - self.channel.heard > self.lost_after_s:
                        return
            except Closed:
                self._finish_alone()
            finally:
                self._kill()

    def _listen(self) -> None:
        for message in self.channel.receive():
            getattr(self, f"_on_{message.pop('kind')}")(message)

    def _on_beat(self, _: Message) -> None:
        """Having been heard is all there is to it."""

    def _on_clock(self, _: Message) -> None:
        self.channel.send("clock", seconds=time.time())

    def _on_probe(self, wanted: Message) -> None:
        self.channel.send("probe", **probe(**wanted))

    def _on_unmark(self, where: Message) -> None:
        unmark(**where)
        self.channel.send("unmarked")

    def _on_port(self, _: Message) -> None:
        self.channel.send("port", number=free_port())

    def _on_start(self, job: Message) -> None:
        share = Share(**job["share"])
        environment = {**os.environ, **job["environment"]}
        self.reported.clear()
        self.ranks = LocalRanks(job["command"], share, environment, Path(job["directory"]), piped=True)
        for rank, process in self.ranks.processes.items():
            for name, pipe in (("out", process.stdout), ("err", process.stderr)):
                os.set_blocking(pipe.fileno(), False)
                self.selector.register(pipe, selectors.EVENT_READ, partial(self._relay, pipe, rank, name, [b""]))

    def _on_stop(self, _: Message) -> None:
        if self.ranks is not None:
            self.ranks.terminate(self.grace_s)

    def _on_kill(self, _: Message) -> None:
        self._kill()
        self.channel.send("killed")

    def _on_leave(self, _: Message) -> None:
        self.released = True

    def _relay(self, pipe: IO[bytes], rank: int, name: str, pending: list[bytes]) -> None:
        """Pass on whole lines; at the end also what has none."""
        data = pipe.read(1 << 16)
        *lines, pending[0] = (pending[0] + (data or b"")).split(b"\n")
        if not data:
            self.selector.unregister(pipe)
            lines, pending[0] = [*lines, *filter(None, pending)], b""
        if lines:
            text = b"\n".join(lines).decode(errors="replace")
            self.channel.send("said", rank=rank, stream=name, text=text)

    def _report_ended(self) -> None:
        ended = self.ranks.poll() if self.ranks is not None else {}
        for rank in ended.keys() - self.reported:
            process = self.ranks.processes[rank]
            if any(pipe in self.selector.get_map() for pipe in (process.stdout, process.stderr)):
                continue  # what it said comes first
            self.reported.add(rank)
            self.channel.send("ended", rank=rank, status=ended[rank])

    def _beat(self) -> None:
        if time.monotonic() - self.beaten > BEAT_S:
            self.beaten = time.monotonic()
            self.channel.send("beat")

    def _finish_alone(self) -> None:
        """Without a launching process: let the ranks stop in order, and drop what they still say."""
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


def main() -> int:
    """Entry point: call the launching process, and serve it."""
    parser = argparse.ArgumentParser(prog="bst_dist.cluster.agent", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--controller", required=True, metavar="ADDRESS,...:PORT",
                        help="the launching process, by any of its addresses")  # fmt: skip
    parser.add_argument("--job", required=True, help="the launch that this is a part of")
    parser.add_argument("--host", default=os.environ.get("SLURMD_NODENAME"), help="this host's name in the job")
    parser.add_argument("--lost-after", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--grace", type=float, required=True, metavar="SECONDS")
    args = parser.parse_args()
    try:
        channel = _call(args.controller)
        channel.send("hello", job=args.job, host=args.host)
    except (OSError, Closed) as error:
        print(f"{args.host}: cannot reach the launching process at {args.controller}: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the launcher's connection may break; the channel is what counts
    Agent(channel, args.lost_after, args.grace).serve()
    return 0


def _call(controller: str) -> Channel:
    """A connection to the first address that answers; raises the last one's OSError."""
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
