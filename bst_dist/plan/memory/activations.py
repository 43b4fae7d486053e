"""Bytes of activations, layer by layer, measured on the real layers.

One layer of each kind runs forward and backward on fake tensors while the bytes of live tensors are counted. It runs as
in training: with activation checkpointing, autocast and exchanges with a neighbour. A model is the sum of its layers,
so a few layers give the figures of any depth and length, and no formula can differ from the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.activation.policy import policy
from bst_dist.model import loss
from bst_dist.model.attention import sliding
from bst_dist.model.attention.window import Window
from bst_dist.model.baselines import full, joint
from bst_dist.model.config import FilterConfig, ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.model.loss import GPU_TILE_LOGITS, TILE_LOGITS
from bst_dist.parallel.ranks import choose_accelerator
from bst_dist.parallel.sequence.neighbour import LeftNeighbour
from bst_dist.parallel.sequence.past import EarlierCall, Past
from bst_dist.parallel.sequence.rehearsal import Rehearsal
from bst_dist.parallel.sequence.slices import Edge
from bst_dist.plan.memory.fused import fused_attention, fused_share, fused_tile
from bst_dist.plan.memory.live import LiveBytes
from bst_dist.plan.memory.memory_traffic import MovedBytes
from bst_dist.plan.memory.parts import Part, Slice
from bst_dist.plan.memory.rows import rows_to_trace
from bst_dist.plan.memory.zero import WORD, Sizes
from bst_dist.plan.rehearse import MOST_BLOCKS, no_borders, rehearse

if TYPE_CHECKING:
    from bst_dist.plan.memory.graphs import Joint

T = TypeVar("T")
_RUN_AGAIN = ActivationCheckpointingConfig(policy="every-layer")
_ON_A_GPU = SimpleNamespace(attention_path=lambda _: "flex")
"""Stand-in for the module that full attention asks which kernel to call: always the one for a GPU."""
REHEARSED_TILES = 64
"""Largest number of tiles of logits that are really run; figures for more tiles are extrapolated."""


class Activations:
    """Activation bytes of the parts of one model. Each part is run once, and its figures are cached.

    Args:
        model: settings of the model, vocabulary included.
        documents: as `data.documents`.
        fused: sliding attention uses a fused kernel, as on a GPU; otherwise as on this machine.
        fused_loss: so does the loss, as on a GPU unless the recipe has `compile: false`.
    """

    def __init__(
        self, model: ModelConfig, bf16: bool, documents: str = "joined", fused: bool = True, fused_loss: bool = True
    ) -> None:
        self.model, self.bf16, self.documents, self.fused = model, bf16, documents, fused
        self.fused_loss = fused and fused_loss
        self._known: dict[Any, Any] = {}

    def layer(
        self,
        mixer: str,
        checkpointing: ActivationCheckpointingConfig,
        slice_: Slice,
        zero3: bool,
        compiled: bool = False,
    ) -> Part:
        """Return the figures of one layer.

        Policies that recompute a layer in the same way share one run. Memory is affine in the rows (its peak nearly so:
        with few rows it may be at another moment), so figures for more than two rows are extrapolated from one and two.
        Two ranks stand for any sp > 1, because each further rank only adds one state.

        `compiled`: the layer is one graph for a GPU, over a whole sequence. A graph too large for the partitioner is
        counted as uncompiled.
        """
        alike = checkpointing.policy.replace("every-kth-layer", "every-layer")
        if compiled and (part := self._compiled(mixer, alike, slice_)):
            return part
        if slice_.rows > 2:
            one, two = (self.layer(mixer, checkpointing, replace(slice_, rows=rows), zero3) for rows in (1, 2))
            return two.scaled(slice_.rows - 1) + one.scaled(-(slice_.rows - 2))
        slice_ = replace(slice_, sp=min(slice_.sp, 2))
        if alike == "offload":
            return self._offloaded(self.layer(mixer, _RUN_AGAIN, slice_, zero3), slice_)
        return self._once((mixer, alike, slice_, zero3), lambda: self._layer(mixer, checkpointing, slice_, zero3))

    def _offloaded(self, again: Part, slice_: Slice) -> Part:
        """Return the figures of a recomputed layer (`again`) with its input offloaded to host memory.

        It adds the copy of the input, and one operation.
        """
        host = WORD * slice_.rows * slice_.length * self.model.width
        return replace(again, forward=again.forward + host, host=host, launches=again.launches + 1)

    def whole(self, slice_: Slice, compiled: bool = False) -> int:
        """Return the bytes that all layers keep for the backward pass of one micro-batch without recomputation."""
        nothing = ActivationCheckpointingConfig()
        return sum(self.layer(mixer, nothing, slice_, False, compiled).kept for mixer in self.model.mixers())

    def edge(self, rows: int) -> int:
        """Return the bytes of an edge: what all layers of a slice with that many rows leave to the next slice."""
        return rows * sum(self._once(("edge", mixer), lambda m=mixer: self._edge(m)) for mixer in self.model.mixers())

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of the model's parameters."""
        with FakeTensorMode():
            return Sizes.of(LanguageModel(self.model), self.bf16)

    def messages(self, slice_: Slice) -> dict[str, dict[str, int]]:
        """Return the bytes, by mixer and kind, that one layer sends to the ranks that share its sequence.

        Both passes are counted. Raise SequenceParallelError if a layer cannot be computed in such slices.
        """
        if slice_.sp == 1:
            return {}
        if not isinstance(self.model.ssm, FilterConfig) and "transformer-xl" not in self.model.mixers():
            # Neither the bytes sent nor possible errors depend on the length.
            slice_ = replace(slice_, length=min(slice_.length, MOST_BLOCKS * self.model.block))
        found = {}
        for mixer in dict.fromkeys(self.model.mixers()):
            found[mixer] = self._once(("messages", mixer, slice_), lambda mixer=mixer: self._messages(mixer, slice_))
        return found

    def head(self, slice_: Slice) -> Part:
        """Return the figures of everything but the layers: final norm, head and loss.

        Tiles of logits have one size, so figures for many tokens are extrapolated from fewer. With too few tokens the
        embedding's gradient would decide the peak.
        """
        logits = GPU_TILE_LOGITS if self.fused else TILE_LOGITS
        tile = max(1, logits // self.model.vocab_size)
        tokens = slice_.rows * slice_.length
        if tokens <= REHEARSED_TILES * tile:
            return self._once(("head", tokens), lambda: self._head(tokens))
        few, many = (tile * REHEARSED_TILES // part for part in (2, 1))
        less, more = (self._once(("head", count), lambda count=count: self._head(count)) for count in (few, many))
        return less._with(more, lambda a, b: a + (b - a) * (tokens - few) // (many - few))

    def _once(self, key: Any, find: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    def _compiled(self, mixer: str, policy: str, slice_: Slice) -> Part | None:
        apart = slice_.rows == 1 or self.documents == "masked"  # a table of borders is not linear in the rows
        traced = slice_ if apart else replace(slice_, rows=self._rows_to_trace(mixer, slice_.length))
        joint = self._once(("graph", mixer, traced), lambda: self._graph(mixer, traced))
        if joint is None:
            return None
        return self._once(("graph", mixer, policy, slice_), lambda: joint.part(policy, slice_.rows))

    def _rows_to_trace(self, mixer: str, length: int) -> int:
        def find() -> int:
            with FakeTensorMode():
                return rows_to_trace(self._alone(mixer), self.model, length)

        return self._once(("rows", mixer, length), find)

    def _graph(self, mixer: str, slice_: Slice) -> Joint | None:
        # Imported here because it loads torch's compiler, which takes a second.
        from bst_dist.plan.memory.graphs import joint_graph

        with self._fused(), FakeTensorMode():
            layer = self._alone(mixer)
            starts = no_borders(self.documents, slice_.rows, slice_.length, self.model.block)
            x = torch.empty(slice_.rows, slice_.length, self.model.width, requires_grad=True)
            return joint_graph(layer, x, starts, self._autocast())

    def _alone(self, mixer: str) -> nn.Module:
        one = {"depth": 1, "mixer": mixer, "placement": "all", "vocab_size": 1}
        return LanguageModel(self.model.model_copy(update=one)).layers[0]

    def _layer(self, mixer: str, checkpointing: ActivationCheckpointingConfig, slice_: Slice, zero3: bool) -> Part:
        with self._stage(zero3) as live:
            layer = self._alone(mixer)
            starts = no_borders(self.documents, slice_.rows, slice_.length, self.model.block)
            inputs = (self._past(layer, slice_), starts)
            checkpoint = policy(checkpointing, [layer])
            call = (lambda x: layer(x, *inputs)) if checkpoint is None else (lambda x: checkpoint(layer, x, *inputs))
            host = getattr(checkpoint, "host", None)
            shape = (slice_.rows, slice_.length, self.model.width)
            part = _run(live, layer, shape, call, lambda: host.bytes if host else 0, self._autocast)
            if checkpoint is None:
                return part
            # A recomputed layer keeps no tables: all layers share one set, which is small beside one layer's
            # activations.
            shared = sum(x.nbytes for x in tree_iter(inputs[0].shared) if isinstance(x, Tensor))
            return replace(part, kept=part.kept - shared)

    def _past(self, layer: nn.Module, slice_: Slice) -> Past:
        """Return the past of a slice: of two neighbours if sp > 1, of an earlier equal slice if it is in a stream."""
        if slice_.sp > 1:
            edge = Edge({}, 0) if slice_.stream else None
            return LeftNeighbour(Rehearsal(slice_.sp // 2, slice_.sp), slice_.length, edge)
        if not slice_.stream:
            return Past()
        left = EarlierCall()
        with torch.no_grad(), self._autocast():
            layer(torch.zeros(slice_.rows, slice_.length, self.model.width), left, None)
        return Edge(left.after, slice_.length)

    def _edge(self, mixer: str) -> int:
        """Return the bytes of one row's edge, from a slice that is at least as long as the layer's reach."""
        reach = max(2 * self.model.block, getattr(self.model.ssm, "length", 0))
        if mixer == "transformer-xl":
            reach = max(reach, self.model.transformer_xl.window)
        length = -(-reach // self.model.block) * self.model.block
        with self._stage(zero3=False), torch.no_grad(), self._autocast():
            layer = self._alone(mixer)
            left = EarlierCall()
            layer(torch.zeros(1, length, self.model.width), left, None)
            return sum(x.nbytes for x in left.after.values())

    def _messages(self, mixer: str, slice_: Slice) -> dict[str, int]:
        one = self.model.model_copy(update={"depth": 1, "mixer": mixer, "placement": "all"})
        with self._fused():
            return rehearse(one, slice_.sp, slice_.rows, slice_.length, self.bf16, self.documents, stream=slice_.stream)

    def _head(self, tokens: int) -> Part:
        with self._stage(zero3=False) as live:
            # Any number of tokens is whole blocks of one token.
            one = {"depth": 1, "mixer": "sliding", "placement": "all", "block": 1}
            model = LanguageModel(self.model.model_copy(update=one))
            model.layers[0] = stand_in = _StandIn()
            model.fused_loss = self.fused_loss
            ids = torch.zeros(1, tokens, dtype=torch.long)
            shape = (1, tokens, self.model.width)

            def call(x: Tensor) -> Tensor:
                stand_in.output = x
                return model(ids, ids).total

            with MovedBytes() as moved:
                part = _run(live, model, shape, call, lambda: 0, self._autocast)
            return replace(part, moved=moved.total)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def _fused(self) -> AbstractContextManager:
        stack = ExitStack()
        if self.fused:
            stack.enter_context(patch.object(sliding, "sliding_attention", fused_attention))
            stack.enter_context(patch.object(sliding, "sliding_share", fused_share))
            stack.enter_context(patch.object(full, "sliding", _ON_A_GPU))
            stack.enter_context(patch.object(full, "sliding_attention", fused_attention))
            stack.enter_context(
                patch.object(joint, "within_blocks", lambda q, k, v, block, _: fused_share(q, k, v, Window(block)))
            )
            stack.enter_context(patch.object(loss, "TILE_LOGITS", GPU_TILE_LOGITS))
            stack.enter_context(patch.object(loss, "fused_tile", fused_tile))
        return stack

    @contextmanager
    def _stage(self, zero3: bool) -> Iterator[LiveBytes]:
        live = LiveBytes()
        with ExitStack() as stack:
            stack.enter_context(self._fused())
            if zero3:  # DeepSpeed replaces torch's linear for the whole process
                choose_accelerator()
                from bst_dist.parallel.deepspeed_import import deepspeed

                wrap = deepspeed.runtime.zero.linear.zero3_linear_wrap
                stack.enter_context(patch.object(nn.functional, "linear", wrap))
            stack.enter_context(FakeTensorMode())
            stack.enter_context(live)
            yield live


def activations_of(model: ModelConfig, bf16: bool, documents: str, fused_loss: bool = True) -> Activations:
    """Return the Activations of a model. They are cached, so a process that plans it again runs no part twice."""
    return _known(model.model_dump_json(), bf16, documents, fused_loss)


@lru_cache(maxsize=4)
def _known(model: str, bf16: bool, documents: str, fused_loss: bool) -> Activations:
    return Activations(ModelConfig.model_validate_json(model), bf16, documents, fused_loss=fused_loss)


def _run(
    live: LiveBytes,
    module: nn.Module,
    shape: tuple[int, ...],
    call: Callable[[Tensor], Tensor],
    host: Callable[[], int],
    autocast: Callable[[], Any],
) -> Part:
    """Run `call` forward and backward, and return its figures.

    Only autograd holds references to its input, its output and their gradients.
    """
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    anchor = torch.zeros(1, requires_grad=True)
    before = live.mark()
    launched = live.launched
    with autocast():
        end = _Sink.apply(call(_Source.apply(anchor, shape)))
        inside = live.now - end.nbytes
    forward = live.peak
    kept = live.now - end.nbytes
    away = host()
    live.mark()
    end.backward()
    return Part(
        kept=kept - before,
        casts=inside - kept,
        forward=forward - before,
        backward=live.peak - kept,
        host=away,
        launches=live.launched - launched,
    )


class _Source(torch.autograd.Function):
    """Creates a layer's input, so that only autograd refers to it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return anchor.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return gradient.new_zeros(1), None


class _Sink(torch.autograd.Function):
    """Consumes a layer's output, and creates its gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.of = (x.shape, x.dtype)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        shape, dtype = ctx.of
        return gradient.new_empty(shape, dtype=dtype)


class _StandIn(nn.Module):
    """Replaces all layers: returns `output`, once."""

    output: Tensor

    def forward(self, *_: Any) -> Tensor:
        output, self.output = self.output, None
        return output
