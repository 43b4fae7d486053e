"""Recording the exchanges between ranks: which one is running, how long it takes, how many bytes are sent.

During training a rank communicates in two ways: by DeepSpeed's communication backend, for gradients and weights, and by
the sequence-parallel group. Each is wrapped in an object with the same interface. The bytes that a rank *sends* are
counted as in a ring of ranks: an all-reduce passes every byte on twice, a gather and a reduce-scatter once, without the
rank's own share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch import distributed as dist

from bst_dist.parallel.phases import Phases
from bst_dist.parallel.sequence.group import SequenceGroup


class RecordedGroup(SequenceGroup):
    """A sequence-parallel group whose exchanges are recorded."""

    def __init__(self, process_group: dist.ProcessGroup, phases: Phases) -> None:
        super().__init__(process_group)
        self.phases = phases

    def gather(self, x: Tensor, kind: str) -> Callable[[], list[Tensor]]:
        with self.phases.exchanging(kind):
            return self._recorded(kind, super().gather(x, kind))

    def shift(self, x: Tensor, kind: str, to_left: bool = False, around: bool = False) -> Callable[[], Tensor | None]:
        with self.phases.exchanging(kind):
            return self._recorded(kind, super().shift(x, kind, to_left, around))

    def exchange(self, parts: Tensor, kind: str) -> Tensor:
        with self.phases.exchanging(kind):
            return super().exchange(parts, kind)

    def _recorded(self, kind: str, finish: Callable[[], Any]) -> Callable[[], Any]:
        def wait() -> Any:
            with self.phases.exchanging(kind):
                return finish()

        return wait


class RecordedBackend:
    """DeepSpeed's communication backend with its collectives recorded. All other attributes are the backend's own."""

    def __init__(self, backend: Any, phases: Phases) -> None:
        self._backend, self._phases = backend, phases

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._backend, name)
        if name not in SENT:
            return own
        kind, sent = SENT[name]

        def recorded(*args: Any, **named: Any) -> Any:
            with self._phases.exchanging(kind, sent(args, named)):
                work = own(*args, **named)
            return None if work is None else _Work(work, kind, self._phases)

        self.__dict__[name] = recorded  # the next access finds it there
        return recorded


class _Work:
    """A running collective; the time spent in its `wait` is recorded."""

    def __init__(self, work: Any, kind: str, phases: Phases) -> None:
        self._work, self._kind, self._phases = work, kind, phases

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any) -> Any:
        with self._phases.exchanging(self._kind):
            return self._work.wait(*args)


def record_deepspeed(phases: Phases) -> None:
    """Record all that DeepSpeed sends from now on in `phases`. Call it after the process group is initialised."""
    from deepspeed.comm import comm

    comm.cdb = RecordedBackend(getattr(comm.cdb, "_backend", comm.cdb), phases)


def _counted(name: str, position: int, rounds: float) -> Callable[..., float]:
    """Return a function for the bytes sent by a collective. Its tensor or tensors are the argument `name`, or the one
    at `position`."""

    def sent(args: Sequence[Any], named: dict[str, Any]) -> float:
        tensors = named[name] if name in named else args[position]
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        third = args[2] if len(args) > 2 else None
        ranks = dist.get_world_size(named.get("group", third))
        return rounds * whole * (ranks - 1) / ranks

    return sent


def _given(args: Sequence[Any], named: dict[str, Any]) -> float:
    """Return the bytes sent by an all-to-all, whose parts may be unequal: all but the part that stays."""
    tensor = named["input"]
    sizes = named.get("input_split_sizes")
    group = named.get("group")
    ranks = dist.get_world_size(group)
    kept = tensor.numel() // ranks if sizes is None else sizes[dist.get_rank(group)]
    return (tensor.numel() - kept) * tensor.element_size()


SENT: dict[str, tuple[str, Callable[..., float]]] = {
    "all_reduce": ("all-reduce", _counted("tensor", 0, 2)),
    "all_reduce_coalesced": ("all-reduce", _counted("tensors", 0, 2)),
    "reduce": ("reduce", _counted("tensor", 0, 1)),
    "broadcast": ("broadcast", _counted("tensor", 0, 1)),
    "all_gather": ("all-gather", _counted("tensor_list", 0, 1)),
    "all_gather_into_tensor": ("all-gather", _counted("output_tensor", 0, 1)),
    "all_gather_coalesced": ("all-gather", _counted("output_tensors", 0, 1)),
    "reduce_scatter": ("reduce-scatter", _counted("input_list", 1, 1)),
    "reduce_scatter_tensor": ("reduce-scatter", _counted("input_tensor", 1, 1)),
    "all_to_all_single": ("all-to-all", _given),
}
"""For each collective of the backend: its name in reports, and the bytes that one rank sends."""
