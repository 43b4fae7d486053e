"""Runs a job on a list of hosts, from the preflight to its end, with restarts."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bst_base.stopping import Stopped
from bst_dist.cluster import preflight
from bst_dist.cluster.collective import ANY_SPEED
from bst_dist.cluster.controller import Controller, LaunchOptions
from bst_dist.cluster.elastic import Shape, choose, idle, shares
from bst_dist.cluster.hosts import Host, HostError
from bst_dist.cluster.launchers import OVER_SSH
from bst_dist.cluster.local import program
from bst_dist.cluster.preflight import Needs, PreflightError
from bst_dist.cluster.processes import HostRanks, StopSignals
from bst_dist.cluster.restarts import Restarts
from bst_dist.cluster.space import space_for_checkpoints
from bst_dist.cluster.verdict import SETTLE_KILLED_S, STOP, Ended
from bst_dist.config import Recipe
from bst_dist.train.rundir import read_starts
from bst_dist.train.start.request import Request

COLLECTIVE = (sys.executable, "-m", "bst_dist.cluster.collective")
STOP_CHECK = "told to stop ({}): the check of all ranks ends"
"""The message at a signal during that check."""


@dataclass(frozen=True)
class Job:
    """The job to run and its requirements."""

    asked: Request
    recipe: Recipe
    environment: Mapping[str, str]
    """Environment variables of the ranks, besides those of their host."""
    needs: Needs
    accepted: Collection[str] = ()
    """Checks of the preflight whose problems are only warnings."""


class Supervisor:
    """Runs a job to its end, with restarts."""

    def __init__(
        self, job: Job, hosts: Sequence[Host], options: LaunchOptions, restarts: Restarts, stop_signals: StopSignals
    ) -> None:
        self.job, self.hosts, self.options, self.restarts = job, hosts, options, restarts
        self.stop_signals = stop_signals
        self._starts_before = _starts(job.asked.run_dir) if job.asked and job.asked.from_zero else 0

    def check(self) -> None:
        """Check all hosts; raises PreflightError when one fails, and Stopped after a stop signal."""
        with self._all_fit():
            pass

    def run(self) -> Ended:
        """Train until the run has ended or is not restarted any more; return how the last start ended.

        Raises PreflightError before the first start when a host fails a check, and Stopped when a stop signal arrives
        before or between starts.
        """
        with self._all_fit() as controller:
            ended, started = self._train(controller, self.job.asked), True
        while (refusal := self.restarts.refuse(ended, started)) is None:
            say(f"restart {self.restarts.used} of {self.restarts.most}")
            self._wait(self.restarts.wait_s)
            try:
                again = self._again(ended)
            except HostError as error:  # lost after it was examined
                self._heed()
                say(str(error))
                again = None
            ended, started = again or ended, again is not None
        if refusal:
            say(f"not started again: {refusal}")
        return ended

    @contextmanager
    def _all_fit(self) -> Iterator[Controller]:
        """Yield a controller of all hosts after the preflight; raises PreflightError when a host fails a check.

        After a stop signal it raises Stopped in place of errors about hosts, which may be consequences of it.
        """
        try:
            if self.options.launcher in OVER_SSH:
                preflight.require_reachable(self.hosts, self.options, self.job.accepted, self.stop_signals)
                self._heed()
            with Controller(self.hosts, self.options, self.stop_signals) as controller:
                checked = preflight.examine(controller, self.job.needs, self.job.accepted)
                self._heed(controller)
                preflight.show(checked)
                preflight.require(checked)
                self._rehearse(controller)
                yield controller
        except (PreflightError, HostError):
            self._heed()
            raise

    def _heed(self, controller: Controller | None = None) -> None:
        """Raise Stopped if this process or an agent was told to stop; called while no rank of the run is running."""
        told = [("", self.stop_signals.first)] if self.stop_signals.first is not None else []
        told += [(f"{host} was ", number) for host, number in controller.told.items()] if controller else []
        if told:
            who, number = told[0]
            raise Stopped(
                f"{who}told to stop ({signal.Signals(number).name}) while no rank of the run was running: "
                "nothing had to be saved"
            )

    def _rehearse(self, controller: Controller) -> None:
        """Run the collective check on all ranks; raises PreflightError when a rank fails or is slow."""
        placed = self._shares(controller, sum(host.slots for host in self.hosts))
        speed = [ANY_SPEED] if "speed" in self.job.accepted else []
        ended = self._run_ranks(controller, [*COLLECTIVE, *speed], placed, STOP_CHECK)
        self._heed(controller)
        if ended.status and "sum" not in self.job.accepted:
            raise PreflightError(
                f"the check of all ranks together failed: {ended.explain(_host_of(placed))}; see the lines above; "
                "--accept sum starts anyway, and --accept speed if ranks are only slow"
            )

    def _train(self, controller: Controller, asked: Request) -> Ended:
        shape = choose(self.job.recipe, sum(host.slots for host in controller.hosts))
        placed = self._shares(controller, shape.world)
        say(f"{shape} on {', '.join(placed)}")
        if shape.imbalance:
            say(shape.imbalance)
        if unused := idle(controller.hosts, placed):
            say(f"idle, as spares: {unused}")
        command = program(_laid_out(asked, self.job.recipe, shape))
        ended = self._run_ranks(controller, command, placed, STOP)
        if not ended.lost and (why := ended.explain(_host_of(placed))):  # the controller has named lost hosts
            say(why)
        return ended

    def _run_ranks(
        self, controller: Controller, command: Sequence[str], placed: Mapping[str, HostRanks], notice: str
    ) -> Ended:
        """Run a command on all ranks; return how it ended. `notice`: as in `Controller.run`.

        Slurm signals the processes of a step: the agents, and the ranks, which it kills unless they handle the signal
        already. So after a rank was killed, the agents' reports about a signal are waited for.
        """
        ended = controller.run(command, self.job.environment, placed, notice)
        if any(status < 0 for status in ended.statuses.values()) and not controller.told:
            controller.listen(SETTLE_KILLED_S)
        return ended

    def _again(self, ended: Ended) -> Ended | None:
        """Resume on the hosts that pass the preflight; return how it ended, or None when no host is left.

        `ended`: how the previous start ended.
        """
        fit = self._left(ended)
        while fit:
            self._heed()
            needs = self._needs_of_restart()
            with Controller(fit, self.options, self.stop_signals) as controller:
                checked = preflight.examine(controller, needs, self.job.accepted)
                self._heed(controller)
                unfit = {one.host.name: "; ".join(one.problems) for one in checked if one.problems}
                if not unfit:
                    return self._train(controller, self._request_of_restart())
            fit = self._without(fit, unfit)
        self._heed()
        say("no host left to restart on")
        return None

    def _needs_of_restart(self) -> Needs:
        """Return the requirements of a restart: the run's checkpoints are already on the disk."""
        needs = self.job.needs
        return replace(needs, space=space_for_checkpoints(needs.run_dir, needs.parameters))

    def _request_of_restart(self) -> Request:
        """Return the request to resume the run.

        --from-zero is left out once a start has begun the run anew. Otherwise a restart that does not see the new
        checkpoints, because a mount has failed, would begin at step 0 again.
        """
        asked = self.job.asked
        return replace(asked, resume=True, from_zero=asked.from_zero and _starts(asked.run_dir) <= self._starts_before)

    def _left(self, ended: Ended) -> list[Host]:
        """Return the hosts to try again. Lost hosts are tried again only over ssh, which can tell if they are back."""
        if self.options.launcher in OVER_SSH:
            return self._without(self.hosts, preflight.unreachable(self.hosts, self.options, self.stop_signals))
        self.hosts = self._without(self.hosts, ended.lost)
        return self.hosts

    def _without(self, hosts: Sequence[Host], reasons: Mapping[str, str]) -> list[Host]:
        for name, reason in reasons.items():
            say(f"without {name}: {reason}")
        return [host for host in hosts if host.name not in reasons]

    def _wait(self, seconds: float) -> None:
        """Wait before the next start; a stop signal ends the wait."""
        if seconds:
            say(f"in {seconds:.0f} s")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.stop_signals.first is None:
            time.sleep(0.1)

    def _shares(self, controller: Controller, world: int) -> dict[str, HostRanks]:
        first = controller.hosts[0].name
        port = controller.free_port(first)
        return shares(controller.hosts, world, controller.address(first), port)


def say(text: str) -> None:
    """Print a message of `bst launch` to standard error, separate from the output of the ranks."""
    print(f"bst launch: {text}", file=sys.stderr, flush=True)


def _starts(run_dir: Path) -> float:
    """Return how often the run was started, by its environment.json; infinity if this host cannot read that."""
    try:
        return len(read_starts(run_dir))
    except (OSError, ValueError, KeyError):
        return math.inf


def _laid_out(asked: Request, recipe: Recipe, shape: Shape) -> Request:
    """Return the request with the sequence-parallel degree of the shape."""
    if shape.sp == recipe.parallel.sp:
        return asked
    return replace(asked, overrides=[*asked.overrides, f"parallel.sp={shape.sp}"])


def _host_of(placed: Mapping[str, HostRanks]) -> dict[int, str]:
    return {rank: name for name, share in placed.items() for rank in range(share.first, share.first + share.count)}
