"""How a recipe is spread over hosts, also when there are fewer than before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bst_dist.cluster.hosts import Host
from bst_dist.cluster.processes import Share
from bst_dist.config import Recipe, spread_of


@dataclass(frozen=True)
class Shape:
    """Ranks and the sequence-parallel degree; dp is what remains."""

    world: int
    sp: int
    unequal: str = ""
    """Which ranks compute masked sequences; empty when none does."""

    def __str__(self) -> str:
        return f"{self.world} ranks (dp {self.world // self.sp} x sp {self.sp})"


def usable(recipe: Recipe, most: int) -> int:
    """The most ranks, up to `most`, that have a part in the batch with the recipe's own sp; `most` when those are too
    few to share a sequence, for whoever explains why."""
    sp = recipe.parallel.sp
    return min(most // sp, recipe.train.fewest_sequences) * sp or most


def choose(recipe: Recipe, most: int) -> Shape:
    """The most ranks, up to `most`, that have a part in the recipe's batch: none has fewer than one sequence.

    The recipe's own sp is kept as long as there are that many ranks; only then one of its divisors is taken. The global
    batch stays what it is, so the run stays the same run.
    """
    sp = max(d for d in range(1, min(most, recipe.parallel.sp) + 1) if recipe.parallel.sp % d == 0)
    changed = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"sp": sp})})
    world = usable(changed, most)
    return Shape(world, sp, spread_of(changed, world).unequal(sp))


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
