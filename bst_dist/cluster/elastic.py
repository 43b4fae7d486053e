"""Distributes a recipe's ranks over hosts, also when there are fewer hosts than before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bst_dist.cluster.hosts import Host
from bst_dist.cluster.processes import HostRanks
from bst_dist.config import Recipe, spread_of


@dataclass(frozen=True)
class Shape:
    """The number of ranks and the sequence-parallel degree; dp is world / sp."""

    world: int
    sp: int
    imbalance: str = ""
    """A message that names the ranks with masked sequences; empty if there are none."""

    def __str__(self) -> str:
        return f"{self.world} ranks (dp {self.world // self.sp} x sp {self.sp})"


def usable(recipe: Recipe, most: int) -> int:
    """Return the largest number of ranks, up to `most`, that the batch can use with the recipe's sp.

    If `most` is below sp, return `most`, so that the caller's checks report the problem.
    """
    sp = recipe.parallel.sp
    return min(most // sp, recipe.train.fewest_sequences) * sp or most


def choose(recipe: Recipe, most: int) -> Shape:
    """Return the shape with the most ranks, up to `most`, in which every rank has at least one sequence.

    The recipe's sp is kept if there are enough ranks, otherwise its largest possible divisor is used. The global batch
    does not change, so it stays the same run.
    """
    sp = max(d for d in range(1, min(most, recipe.parallel.sp) + 1) if recipe.parallel.sp % d == 0)
    changed = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"sp": sp})})
    world = usable(changed, most)
    return Shape(world, sp, spread_of(changed, world).imbalance_message(sp))


def shares(hosts: Sequence[Host], world: int, address: str, port: int) -> dict[str, HostRanks]:
    """Return host name -> its ranks. Hosts are filled one after the other, so the ranks of a sequence stay together."""
    found: dict[str, HostRanks] = {}
    first = 0
    for host in hosts:
        count = min(host.slots, world - first)
        if count:
            found[host.name] = HostRanks(first, count, world, address, port)
        first += count
    return found


def idle(hosts: Sequence[Host], placed: Mapping[str, HostRanks]) -> str:
    """Return as text the slots of each host that no rank is placed on; empty when there are none."""
    unused = {host.name: host.slots - (placed[host.name].count if host.name in placed else 0) for host in hosts}
    return ", ".join(f"{count} slot{'s' * (count > 1)} of {name}" for name, count in unused.items() if count)
