"""One run on a list of hosts, from the preflight to its end, over restarts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bst_dist.cluster import preflight
from bst_dist.cluster.controller import Controller
from bst_dist.cluster.elastic import Spread, choose, shares
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.launchers import OVER_SSH
from bst_dist.cluster.local import program
from bst_dist.cluster.preflight import Needs, PreflightError
from bst_dist.cluster.processes import Share
from bst_dist.cluster.verdict import Ended
from bst_dist.config import Recipe
from bst_dist.train.start import Request

COLLECTIVE = (sys.executable, "-m", "bst_dist.cluster.collective")


@dataclass(frozen=True)
class Means:
    """By what means the hosts are driven."""

    launcher: str
    directory: Path
    """Where the ranks are started, on every host."""
    environment: Mapping[str, str]
    """What the ranks find in their environment besides what their host gives them."""
    lost_after_s: float
    grace_s: float
    max_restarts: int


class Supervisor:
    """Takes a run to its end."""

    def __init__(self, asked: Request, recipe: Recipe, hosts: Sequence[Host], means: Means, needs: Needs,
                 told: Sequence[int]) -> None:  # fmt: skip
        self.asked, self.recipe, self.hosts, self.means, self.needs, self.told = (
            asked,
            recipe,
            hosts,
            means,
            needs,
            told,
        )
        self.restarts = 0

    def check(self) -> None:
        """Look at all hosts; raises PreflightError when one is unfit."""
        with self._all_fit():
            pass

    def run(self) -> Ended:
        """Train until the run has ended, or failed more often than it may; raises PreflightError before it begins."""
        with self._all_fit() as controller:
            ended = self._train(controller, self.asked)
        while ended.worth_a_restart and self.restarts < self.means.max_restarts:
            self.restarts += 1
            say(f"restart {self.restarts} of {self.means.max_restarts}")
            ended = self._again(ended)
        return ended

    @contextmanager
    def _all_fit(self) -> Iterator[Controller]:
        """Agents on all hosts, every one of them examined and shown."""
        if self.means.launcher in OVER_SSH:
            preflight.require_reachable(self.hosts)
        with self._controller(self.hosts) as controller:
            checked = preflight.examine(controller, self.needs)
            preflight.show(checked)
            preflight.require(checked)
            self._rehearse(controller)
            yield controller

    def _rehearse(self, controller: Controller) -> None:
        """Sum over all ranks before a model is built; raises PreflightError when some cannot talk."""
        placed = self._shares(controller, sum(host.slots for host in self.hosts))
        ended = controller.run(COLLECTIVE, self.means.environment, placed)
        if ended.status:
            raise PreflightError(f"a sum over all ranks failed: {ended.explain(_host_of(placed))}")

    def _train(self, controller: Controller, asked: Request) -> Ended:
        spread = choose(self.recipe, sum(host.slots for host in controller.hosts))
        placed = self._shares(controller, spread.world)
        say(f"{spread} on {', '.join(placed)}")
        ended = controller.run(program(_spread(asked, self.recipe, spread)), self.means.environment, placed)
        if why := ended.explain(_host_of(placed)):
            say(why)
        return ended

    def _again(self, ended: Ended) -> Ended:
        """Go on from the newest checkpoint on the hosts that are fit; `ended` says how it ended before."""
        fit = self._left(ended)
        while fit and not self.told:
            with self._controller(fit) as controller:
                checked = preflight.examine(controller, self.needs)
                unfit = {one.host.name: "; ".join(one.problems) for one in checked if one.problems}
                if not unfit:
                    return self._train(controller, replace(self.asked, resume=True))
            fit = self._without(fit, unfit)
        say("no host is left to go on with")
        return ended

    def _left(self, ended: Ended) -> list[Host]:
        """The hosts to try again: only over ssh can it be told whether one that was lost has come back."""
        if self.means.launcher in OVER_SSH:
            return self._without(self.hosts, preflight.unreachable(self.hosts))
        self.hosts = self._without(self.hosts, ended.lost)
        return self.hosts

    def _without(self, hosts: Sequence[Host], reasons: Mapping[str, str]) -> list[Host]:
        for name, reason in reasons.items():
            say(f"without {name}: {reason}")
        return [host for host in hosts if host.name not in reasons]

    def _controller(self, hosts: Sequence[Host]) -> Controller:
        means = self.means
        return Controller(hosts, means.launcher, means.directory, means.lost_after_s, means.grace_s, self.told)

    def _shares(self, controller: Controller, world: int) -> dict[str, Share]:
        first = controller.hosts[0].name
        port = controller.free_port(first)
        return shares(controller.hosts, world, controller.address(first), port)


def say(text: str) -> None:
    """To the user, apart from what the ranks print."""
    print(f"bst launch: {text}", file=sys.stderr, flush=True)


def _spread(asked: Request, recipe: Recipe, spread: Spread) -> Request:
    """The request with the sequence-parallel degree that there are ranks for."""
    if spread.sp == recipe.parallel.sp:
        return asked
    return replace(asked, overrides=[*asked.overrides, f"parallel.sp={spread.sp}"])


def _host_of(placed: Mapping[str, Share]) -> dict[int, str]:
    return {rank: name for name, share in placed.items() for rank in range(share.first, share.first + share.count)}
