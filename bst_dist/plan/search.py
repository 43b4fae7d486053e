"""Search for the best layout of a recipe on a cluster: ZeRO stage, sp, micro-batch and activation checkpointing.

The best layout is the one with the shortest step among those that fit. Checkpointing policies are tried in order of
increasing recomputation. A larger sp is used only if a smaller one does not fit, and ZeRO-3 only if no lower stage
fits: both add many small messages, whose cost the time model underestimates.

If the batch changes during the run, layouts are for its largest batch. They serve smaller ones too, with at most as
many micro-batches of at most as many sequences, so no other batch needs more memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from torch._subclasses.fake_tensor import FakeTensorMode

from bst_base.errors import UserError
from bst_base.places import written
from bst_dist.config import Recipe, deepspeed_file
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.neighbour import SequenceParallelError
from bst_dist.plan.compilation import compile_refusal
from bst_dist.plan.flops import forward_flops
from bst_dist.plan.kernel_launches import host_seconds
from bst_dist.plan.memory.activations import activations_of
from bst_dist.plan.memory.parts import Slice
from bst_dist.plan.memory.peak import Memory, Work, memory
from bst_dist.plan.memory.zero import Sizes, Strategy, muon_load
from bst_dist.plan.speed import Cluster, Moved, StepTime, share_rerun, speed
from bst_dist.plan.traffic import sequence_traffic, zero_traffic
from data_pipeline.serve.spread import Spread

RESERVED_BYTES = 3e9
"""Device memory for the driver's context, the communication library and the matrix library's workspace."""
FRAGMENTATION = 0.08
"""Share of activations and buffers that the caching allocator loses to fragmentation."""
HEADROOM = 0.05
"""Share of a device's memory left free, because the plan may be inexact."""
POLICIES = ("none", "selective", "every-kth-layer", "every-layer", "offload")
MOST_ROWS = 16
"""Largest micro-batch that is tried, in sequences: larger ones gain nothing."""
STAGES = (0, 1, 2, 3)
GATHERED_ONCE = "zero3_gathered_once"
"""A ZeRO-3 strategy that keeps weights gathered from one update to the next. It helps with slices, because otherwise
every slice gathers them again."""


class PlanError(UserError):
    """The recipe cannot run on this number of ranks, or the options of the command do not fit together."""


@dataclass(frozen=True)
class Choice:
    """What a layout is chosen by. None: as in the recipe."""

    stage: int | str
    """ZeRO stage, or GATHERED_ONCE."""
    sp: int
    rows: int
    """Sequences per micro-batch."""
    policy: str
    """Of activation checkpointing."""
    slices: int | None = None
    """Slices per sequence."""
    edges: str | None = None
    """Place of the slices' edges: device, host or disk."""
    edges_every: int | None = None
    """One in this many edges is kept."""
    sequences: int | None = None
    """Sequences per step; None: those of the run's largest batch."""


@dataclass(frozen=True)
class Candidate:
    """One layout, with its memory, traffic and time."""

    choice: Choice
    work: Work
    memory: Memory
    traffic: dict[str, float]
    """Bytes of gradients and weights that a rank sends per step, by kind."""
    between: dict[str, int]
    """Bytes that a rank sends per step to the ranks that share its sequence, by kind."""
    speed: StepTime
    limit: float
    """Bytes of a device's memory."""
    spread: Spread
    """The sequences of a step over the data-parallel ranks."""

    @property
    def needed(self) -> float:
        """Bytes needed on a device, including fragmentation and libraries."""
        moving = self.memory.activations + self.memory.loss + self.memory.buffers
        return self.memory.total + FRAGMENTATION * moving + RESERVED_BYTES

    @property
    def fits(self) -> bool:
        """Whether it fits in a device's memory with HEADROOM to spare."""
        return self.needed <= (1 - HEADROOM) * self.limit

    @property
    def excess(self) -> float:
        """Bytes by which it does not fit; negative if it fits."""
        return self.needed - (1 - HEADROOM) * self.limit


@dataclass(frozen=True)
class Phase:
    """The steps of a run with one batch."""

    from_step: int
    steps: int
    sequences: int
    """Sequences per step."""
    step_s: float
    """Seconds per step."""


class Planner:
    """Evaluates layouts of one recipe on one cluster."""

    def __init__(self, recipe: Recipe, cluster: Cluster) -> None:
        self.recipe, self.cluster, self.model = recipe, cluster, recipe.model
        self.bf16 = recipe.train.precision == "bf16"
        self.activations = activations_of(
            self.model, self.bf16, recipe.data.documents, fused_loss=recipe.compile is not False
        )
        self.strategies = _strategies(recipe)

    @cached_property
    def flops(self) -> dict[str, float]:
        """FLOPs of one token's forward pass, by term."""
        return forward_flops(self.model, self.recipe.train.sequence_length)

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of the model's parameters."""
        if self.recipe.optimizer.kind != "muon":
            return self.activations.sizes
        with FakeTensorMode():
            return Sizes.of(LanguageModel(self.model), self.bf16, muon=True)

    def degrees(self) -> list[int]:
        """Return every possible sp: it divides the ranks and a sequence's blocks, and no rank is without a sequence.

        If for some of these dp divides the largest batch, so that nothing of it is masked, return only those. Raise
        PlanError if there is none.
        """
        train, world, block = self.recipe.train, self.cluster.world, self.model.block
        fewest, most = train.fewest_sequences, train.most_sequences
        possible = [
            sp
            for sp in range(1, world + 1)
            if world % sp == 0
            and (train.slice_tokens or train.sequence_length) % (block * sp) == 0
            and fewest >= world // sp
        ]
        if possible:
            return [sp for sp in possible if most % (world // sp) == 0] or possible
        blocks = fewest * train.sequence_length // block
        field = "train.sequences" if fewest == train.sequences else "train.sequence_changes"
        if blocks < world:
            raise PlanError(
                f"{world} ranks, but a step has only {blocks} blocks of {block} tokens ({field} "
                f"{fewest} x train.sequence_length {train.sequence_length}): each rank needs at least one. "
                f"Use at most {blocks} ranks, or {-(-world * block // train.sequence_length)} sequences or more"
            )
        raise PlanError(
            f"no sp divides {world} ranks and {train.sequence_length // block} blocks of a sequence and leaves at most "
            f"{fewest} data-parallel ranks, one for each sequence of a step ({field}): a power of two for each always "
            "works"
        )

    def micro_batches(self, sp: int) -> list[int]:
        """Return the possible micro-batch sizes in sequences, largest first."""
        rows = -(-self.recipe.train.most_sequences * sp // self.cluster.world)
        return [rows_at_once for rows_at_once in range(min(rows, MOST_ROWS), 0, -1) if rows % rows_at_once == 0]

    def candidate(self, choice: Choice) -> Candidate:
        """Evaluate one layout. Raise SequenceParallelError if a layer cannot be computed with its sp."""
        train, cluster = self.recipe.train, self.cluster
        sp, rows = choice.sp, choice.rows
        slices = choice.slices or train.slices
        edges = choice.edges or train.edges
        strategy = self.strategies[choice.stage]
        checkpointing = self.recipe.activation_checkpointing.model_copy(update={"policy": choice.policy})
        spread = Spread(choice.sequences or train.most_sequences, cluster.world // sp, rows)
        part = Slice(rows, train.sequence_length // (sp * slices), sp, stream=slices > 1)
        compiled = not compile_refusal(self.recipe, strategy.stage, checkpointing, sp, slices)
        work = Work(
            strategy=strategy,
            world=cluster.world,
            slice=part,
            accumulation=spread.micro_batches * slices,
            checkpointing=checkpointing,
            depth=self.model.depth,
            slices=slices,
            edges=edges,
            edges_every=choice.edges_every or train.edges_every,
            compiled=compiled,
            averaged=train.average is not None,
        )
        sizes = self.sizes.by_layer if compiled else self.sizes
        between = sequence_traffic(self.model, work, self.messages(sp, slices))
        traffic = zero_traffic(sizes, work)
        needs = memory(sizes, self.model.mixers(), self.activations, work)
        compiled_unless_gathered = not compile_refusal(self.recipe, 0, checkpointing, sp, slices)
        touched = self.activations.whole(part, compiled_unless_gathered)
        updated = self.sizes.total / (cluster.world if choice.stage else 1)
        host = host_seconds(self.activations, self.model.mixers(), work)
        edges_bytes = work.spacing.waiting * self.activations.edge(rows) if slices > 1 and edges == "host" else 0
        orthogonalising = muon_load(self.sizes, work.strategy.stage, cluster.world).flops if self.sizes.muon else 0.0
        around = self.activations.head(part).moved
        moved = Moved(touched, around, needs.host - edges_bytes + edges_bytes // slices, updated, host, orthogonalising)
        seconds = speed(self.flops, work, moved, traffic, between, cluster, self.bf16)
        return Candidate(choice, work, needs, traffic, between, seconds, 1e9 * cluster.accelerator.memory_gb, spread)

    def as_written(self) -> Candidate:
        """Return the recipe's own ZeRO stage, sp, micro-batch and activation checkpointing, for its first batch."""
        train, sp = self.recipe.train, self.recipe.parallel.sp
        stage = Strategy.read(deepspeed_file(self.recipe), written(self.recipe.deepspeed)).stage
        rows = Spread(train.sequences, self.cluster.world // sp, train.micro_sequences).micro_rows
        policy = self.recipe.activation_checkpointing.policy
        return self.candidate(Choice(stage, sp, rows, policy, sequences=train.sequences))

    def phases(self, way: Candidate) -> list[Phase]:
        """Return the parts of the run with one batch each, all with this layout. A run whose batch never changes has
        one."""
        batches = self.recipe.train.batch_phases
        seconds = {count: self._of_batch(way, count).speed.total for count in {count for _, _, count in batches}}
        return [Phase(first, steps, count, seconds[count]) for first, steps, count in batches]

    def _of_batch(self, way: Candidate, sequences: int) -> Candidate:
        """Return the layout with another number of sequences per step, at most as many in a micro-batch as before."""
        rows = Spread(sequences, way.spread.dp, way.spread.max_micro_rows).micro_rows
        return self.candidate(replace(way.choice, rows=rows, sequences=sequences))

    def best(self) -> Candidate:
        """Return the fastest layout that fits; if none fits, the one that needs least memory."""
        best: Candidate | None = None
        for policy in POLICIES:
            if best is not None and self._settled(best, policy):
                break
            sp = self._fewest(policy)
            fitting = [way for way in self._with(sp, policy) if way.fits] if sp else []
            best = min([*fitting, *([best] if best else [])], key=_preference, default=None)
        return best or self.closest()

    def closest(self) -> Candidate:
        """Return the layout that needs least memory."""
        sp = self.supported()[-1]
        stages = STAGES if self.cluster.world > 1 else STAGES[:1]
        return min(
            (self.candidate(Choice(stage, sp, 1, policy)) for policy in POLICIES for stage in stages),
            key=lambda way: way.needed,
        )

    def supported(self) -> list[int]:
        """Return the values of sp that the layers support. Raise SequenceParallelError if there is none."""
        degrees = self.degrees()
        while True:
            try:
                self.messages(degrees[-1])
                return degrees
            except SequenceParallelError:  # the slices are too short for a layer's reach
                if len(degrees) == 1:
                    raise
                degrees = degrees[:-1]

    def _fewest(self, policy: str) -> int | None:
        """Return the smallest sp with a layout that fits, or None. Uses bisection: memory falls as sp grows."""
        degrees = self.degrees()[:1]
        if any(way.fits for way in self._with(degrees[0], policy)):
            return degrees[0]
        degrees = self.supported()
        at = bisect_left(degrees, True, key=lambda sp: any(way.fits for way in self._with(sp, policy)))
        return degrees[at] if at < len(degrees) else None

    def _with(self, sp: int, policy: str) -> Iterator[Candidate]:
        """Yield the layouts of every micro-batch and stage; ZeRO-3 only if nothing else fits.

        Once a micro-batch fits with every stage, smaller ones are left out: their steps are not shorter, and they need
        more messages and launches.
        """
        fits = False
        for rows in self.micro_batches(sp):
            ways = [self.candidate(Choice(stage, sp, rows, policy)) for stage in STAGES[:3]]
            fits |= any(way.fits for way in ways)
            yield from ways
            if all(way.fits for way in ways):
                break
        if not fits and self.cluster.world > 1:
            yield from (self.candidate(Choice(3, sp, rows, policy)) for rows in self.micro_batches(sp))

    def _settled(self, best: Candidate, policy: str) -> bool:
        """Whether no layout with `policy`, or with a policy that recomputes more, can be faster than `best`."""
        if best.work.strategy.stage < 3 and best.work.slice.sp == self.degrees()[0]:
            return True
        checkpointing = best.work.checkpointing.model_copy(update={"policy": policy})
        again = share_rerun(checkpointing, self.model.depth) * best.speed.compute / 3
        return best.speed.compute + 0.9 * again >= best.speed.total  # the head is at most a ninth of the forward pass

    def messages(self, sp: int, slices: int | None = None) -> dict[str, dict[str, int]]:
        """Return, by mixer and kind, the bytes that one layer sends per row to the ranks that share its sequence."""
        slices = slices or self.recipe.train.slices
        share = self.recipe.train.sequence_length // (sp * slices)
        return self.activations.messages(Slice(1, share, sp, stream=slices > 1 or self.recipe.train.carry))


def _preference(way: Candidate) -> tuple[float, int, int]:
    """Sort key: time to two significant digits, then the larger micro-batch (larger kernels), then the lower stage."""
    return (float(f"{way.speed.total:.2g}"), -way.work.slice.rows, way.work.strategy.stage)


def _strategies(recipe: Recipe) -> dict[int | str, Strategy]:
    """Return the strategy of each stage, and GATHERED_ONCE.

    The recipe's DeepSpeed file is used for its own stage, the shipped files for the others. Raise PlanError if the
    recipe's file offloads parameters or the optimizer, or partitions parameters inside nodes too.
    """
    strategies: dict[int | str, Strategy] = {}
    for key, name in {**{stage: f"zero{stage}" for stage in STAGES}, GATHERED_ONCE: GATHERED_ONCE}.items():
        path = deepspeed_file(recipe.model_copy(update={"deepspeed": name}))
        strategies[key] = Strategy.read(path, name)
    given = Strategy.read(deepspeed_file(recipe), written(recipe.deepspeed))
    if given.offloads:
        raise PlanError(f"{given.name}: bst plan does not cover offloading of parameters or of the optimizer")
    if given.hierarchical:
        raise PlanError(
            f"{given.name}: bst plan does not cover a second partition of the parameters inside each node "
            "(zero_hpz_partition_size): plan zero3, which needs less memory and sends more between nodes"
        )
    return strategies | {given.stage: given}
