"""How a recipe is spread over hosts, also when there are fewer than before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bst_base.errors import UserError
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.processes import Share
from bst_dist.config import Recipe, accumulation


@dataclass(frozen=True)
class Spread:
    """Ranks and the sequence-parallel degree; dp is what remains."""

    world: int
    sp: int

    def __str__(self) -> str:
        return f"{self.world} ranks (dp {self.world // self.sp} x sp {self.sp})"


def usable(recipe: Recipe, most: int) -> int:
    """The most ranks, up to `most`, that the batch can be spread over with the recipe's own sp; `most` when none can,
    for whoever explains why."""
    sp = recipe.parallel.sp
    return next((world for world in range(most - most % sp, 0, -sp) if _legal(recipe, world)), most)


def choose(recipe: Recipe, most: int) -> Spread:
    """The most ranks, up to `most`, that the recipe's batch can be spread over.

    The recipe's own sp is kept as long as there are that many ranks; only then one of its divisors is taken. The global
    batch stays what it is, so the run stays the same run. Raises UserError when not even one rank will do.
    """
    for sp in [d for d in range(recipe.parallel.sp, 0, -1) if recipe.parallel.sp % d == 0]:
        changed = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"sp": sp})})
        if _legal(changed, world := usable(changed, most)):
            return Spread(world, sp)
    raise UserError(f"{recipe.name}: no number of ranks up to {most} can share train.sequences and micro-batches")


def _legal(recipe: Recipe, world: int) -> bool:
    try:
        accumulation(recipe, world)
    except UserError:
        return False
    return True


def shares(hosts: Sequence[Host], world: int, address: str, port: int) -> dict[str, Share]:
    """The ranks of each host, by its name: filled one after the other, so that a sequence's ranks stay together."""
    found: dict[str, Share] = {}
    first = 0
    for host in hosts:
        count = min(host.slots, world - first)
        if count:
            found[host.name] = Share(first, count, world, address, port)
        first += count
    return found


def idle(hosts: Sequence[Host], placed: Mapping[str, Share]) -> str:
    """The hosts, and slots of hosts, that no rank is placed on; empty when there are none."""
    unused = {host.name: host.slots - (placed[host.name].count if host.name in placed else 0) for host in hosts}
    return ", ".join(f"{count} slot{'s' * (count > 1)} of {name}" for name, count in unused.items() if count)
