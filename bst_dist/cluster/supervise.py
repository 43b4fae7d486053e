"""One run on a list of hosts, from the preflight to its end, over restarts."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from bst_dist.cluster import preflight
from bst_dist.cluster.collective import ANY_SPEED
from bst_dist.cluster.controller import Controller, Means
from bst_dist.cluster.elastic import Shape, choose, idle, shares
from bst_dist.cluster.hosts import Host, HostError
from bst_dist.cluster.launchers import OVER_SSH
from bst_dist.cluster.local import program
from bst_dist.cluster.preflight import Needs, PreflightError
from bst_dist.cluster.processes import Share
from bst_dist.cluster.restarts import Restarts
from bst_dist.cluster.verdict import Ended
from bst_dist.config import Recipe
from bst_dist.train.start.request import Request

COLLECTIVE = (sys.executable, "-m", "bst_dist.cluster.collective")


@dataclass(frozen=True)
class Job:
    """What is to be run, and what for."""

    asked: Request
    recipe: Recipe
    environment: Mapping[str, str]
    """What the ranks find in their environment besides what their host gives them."""
    needs: Needs
    accepted: Collection[str] = ()
    """Checks of the preflight whose findings do not matter."""


class Supervisor:
    """Takes a run to its end."""

    def __init__(self, job: Job, hosts: Sequence[Host], means: Means, restarts: Restarts, told: Sequence[int]) -> None:
        self.job, self.hosts, self.means, self.restarts, self.told = job, hosts, means, restarts, told

    def check(self) -> None:
        """Look at all hosts; raises PreflightError when one is unfit."""
        with self._all_fit():
            pass

    def run(self) -> Ended:
        """Train until the run has ended, or gets no further; raises PreflightError before it begins."""
        with self._all_fit() as controller:
            ended, started = self._train(controller, self.job.asked), True
        while (refusal := self.restarts.refuse(ended, started)) is None:
            say(f"restart {self.restarts.used} of {self.restarts.most}")
            self._wait(self.restarts.wait_s)
            try:
                again = self._again(ended)
            except HostError as error:  # lost after it was examined
                say(str(error))
                again = None
            ended, started = again or ended, again is not None
        if refusal:
            say(f"not started again: {refusal}")
        return ended

    @contextmanager
    def _all_fit(self) -> Iterator[Controller]:
        """Agents on all hosts, every one of them examined and shown."""
        if self.means.launcher in OVER_SSH:
            preflight.require_reachable(self.hosts, self.means, self.job.accepted)
        with Controller(self.hosts, self.means, self.told) as controller:
            checked = preflight.examine(controller, self.job.needs, self.job.accepted)
            preflight.show(checked)
            preflight.require(checked)
            self._rehearse(controller)
            yield controller

    def _rehearse(self, controller: Controller) -> None:
        """Let all ranks multiply and add before a model is built; raises PreflightError when one cannot, or is slow."""
        placed = self._shares(controller, sum(host.slots for host in self.hosts))
        speed = [ANY_SPEED] if "speed" in self.job.accepted else []
        ended = controller.run([*COLLECTIVE, *speed], self.job.environment, placed)
        if ended.status and not ("sum" in self.job.accepted and not self.told):
            raise PreflightError(f"the check of all ranks together failed: {ended.explain(_host_of(placed))}")

    def _train(self, controller: Controller, asked: Request) -> Ended:
        shape = choose(self.job.recipe, sum(host.slots for host in controller.hosts))
        placed = self._shares(controller, shape.world)
        say(f"{shape} on {', '.join(placed)}")
        if shape.unequal:
            say(shape.unequal)
        if unused := idle(controller.hosts, placed):
            say(f"idle, as spares: {unused}")
        command = program(_laid_out(asked, self.job.recipe, shape))
        ended = controller.run(command, self.job.environment, placed)
        if why := ended.explain(_host_of(placed)):
            say(why)
        return ended

    def _again(self, ended: Ended) -> Ended | None:
        """Continue from the newest checkpoint on the hosts that are fit, if any. `ended`: how it ended before."""
        fit = self._left(ended)
        while fit and not self.told:
            with Controller(fit, self.means, self.told) as controller:
                checked = preflight.examine(controller, self.job.needs, self.job.accepted)
                unfit = {one.host.name: "; ".join(one.problems) for one in checked if one.problems}
                if not unfit:
                    return self._train(controller, replace(self.job.asked, resume=True))
            fit = self._without(fit, unfit)
        if self.told:
            return replace(ended, told=self.told[0])
        say("no host left to restart on")
        return None

    def _left(self, ended: Ended) -> list[Host]:
        """The hosts to try again: only over ssh can it be told whether one that was lost has come back."""
        if self.means.launcher in OVER_SSH:
            return self._without(self.hosts, preflight.unreachable(self.hosts, self.means))
        self.hosts = self._without(self.hosts, ended.lost)
        return self.hosts

    def _without(self, hosts: Sequence[Host], reasons: Mapping[str, str]) -> list[Host]:
        for name, reason in reasons.items():
            say(f"without {name}: {reason}")
        return [host for host in hosts if host.name not in reasons]

    def _wait(self, seconds: float) -> None:
        """Before the next start, unless told to stop meanwhile."""
        if seconds:
            say(f"in {seconds:.0f} s")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.told:
            time.sleep(0.1)

    def _shares(self, controller: Controller, world: int) -> dict[str, Share]:
        first = controller.hosts[0].name
        port = controller.free_port(first)
        return shares(controller.hosts, world, controller.address(first), port)


def say(text: str) -> None:
    """To the user, apart from what the ranks print."""
    print(f"bst launch: {text}", file=sys.stderr, flush=True)


def _laid_out(asked: Request, recipe: Recipe, shape: Shape) -> Request:
    """The request with the sequence-parallel degree that there are ranks for."""
    if shape.sp == recipe.parallel.sp:
        return asked
    return replace(asked, overrides=[*asked.overrides, f"parallel.sp={shape.sp}"])


def _host_of(placed: Mapping[str, Share]) -> dict[int, str]:
    return {rank: name for name, share in placed.items() for rank in range(share.first, share.first + share.count)}
