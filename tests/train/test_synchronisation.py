"""The trainer and the models do not synchronise with the device between the data and the optimizer's step.

So the device computes while the host queues more work, unless DeepSpeed itself waits (docs/gpu.md). The step also has
no operation that is nondeterministic on CUDA, which `deterministic: true` would refuse. Tensors on the meta device
stand for those of a GPU: reading a value is an error, and copies between host and device are detected. The step under
DeepSpeed runs on the CPU, where reading values works and is counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bst_dist.faults.signals import Stop
from bst_dist.model.attention import sliding
from bst_dist.model.attention.flex_bias import Attention, bias_gradient
from bst_dist.model.attention.flex_mask import Band, visited_tiles
from bst_dist.model.attention.window import Window
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.model.masking import masking_problem
from bst_dist.parallel.phases import Phases
from bst_dist.plan.memory.fused import fused_attention, fused_share
from bst_dist.report.utilisation import Utilisation
from bst_dist.train import step
from bst_dist.train.config import ScheduleConfig, TrainConfig
from bst_dist.train.context import Context
from bst_dist.train.engine import Engine
from bst_dist.train.step import Trainer
from data_pipeline.serve.batch import Batch
from tests.data_pipeline.serve.memory import Memory, loader

BLOCK, LENGTH, ROWS, VOCABULARY = 16, 64, 2, 31

MODELS: dict[str, dict[str, Any]] = {
    "sliding": {"mixer": "sliding"},
    "RoPE": {"mixer": "sliding", "attention": {"position": "rope"}},
    "SH": {"mixer": "bst"},
    "SH previous": {"mixer": "bst", "context": {"attend": "previous"}},
    "MH": {"mixer": "bst", "context": {"variant": "MH"}},
    "MF": {"mixer": "bst", "context": {"variant": "MF", "states": 3}},
    "SH ssd": {"mixer": "bst", "ssm": {"kernel": "ssd", "head": 4}},
    "SH DPLR": {"mixer": "bst", "ssm": {"kernel": "s4-dplr"}},
    "SH hyena": {"mixer": "bst", "ssm": {"kernel": "hyena", "length": LENGTH}},
    "MF explicit": {
        "mixer": "bst",
        "context": {"variant": "MF", "states": 3},
        "ssm": {"kernel": "explicit", "length": LENGTH},
    },
    "without cross": {"mixer": "bst-no-cross"},
    "SH joint": {"mixer": "bst-joint"},
    "MF joint": {"mixer": "bst-joint", "context": {"variant": "MF", "states": 3}},
    "Transformer-XL": {"mixer": "transformer-xl", "transformer_xl": {"window": 32}},
    "Block-Recurrent": {"mixer": "block-recurrent", "block_recurrent": {"states": 8}},
    "GSS": {"mixer": "gss"},
    "pure SSM": {"mixer": "ssm"},
    "Mamba-2": {"mixer": "mamba2", "mamba2": {"head": 8}},
    "Gated DeltaNet": {"mixer": "gated-deltanet"},
}


class Waits(TorchDispatchMode):
    """Counts operations for which the host waits for the device, and those that sum in no fixed order."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal")
    CHECKED = ("_linalg_check_errors", "_linalg_eigh", "linalg_eig", "_linalg_eigvals", "_linalg_svd", "linalg_lstsq")
    """They read whether they succeeded. `_linalg_check_errors` does so for all that have a variant without the check,
    such as `linalg.solve_ex`."""
    UNORDERED = ("histc", "put_", "kthvalue", "median", "nll_loss_forward", "scatter_reduce", "bincount")
    """Operations in the list of `torch.use_deterministic_algorithms` that a model could use."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in (*self.READS, *self.CHECKED, *self.UNORDERED) or (name == "cumsum" and args[0].is_floating_point()):
            self.found[name] += 1
        indexed = name in ("index", "index_put", "index_put_")
        if indexed and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.found["indexed by a mask"] += 1  # reads how many elements it selects
        if indexed or name in ("_to_copy", "copy_"):
            devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            if len(devices) > 1:
                self.found[f"copy between {' and '.join(sorted(devices))}"] += 1
        return out


class FakeEngine:
    """Stub of an engine: runs the model itself; autograd accumulates the gradients."""

    stage = 2

    def __init__(self, model: LanguageModel, waits: Waits) -> None:
        self.module, self.waits, self.before_update = model, waits, Counter()

    def set_rates(self, factor: float) -> dict[str, float]:
        return {"matrices": factor}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def accumulate(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def update(self) -> float:
        self.before_update = self.waits.found.copy()
        raise StopIteration  # the code after it reads the step's sums


def batch(documents: str) -> Batch:
    ids = np.ones((ROWS, LENGTH), np.int64)
    starts = np.zeros((ROWS, LENGTH // (BLOCK if documents == "isolated" else 1)), bool)
    rows = {"rows": np.arange(ROWS), "epochs": np.zeros(ROWS, np.int64), "continues": np.zeros(ROWS, bool)}
    return Batch(
        ids,
        ids,
        ids > 0,
        starts=None if documents == "joined" else starts,
        corpora=rows["rows"],
        located=None,
        begin=0,
        **rows,
    )


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(array: np.ndarray, device: torch.device) -> Tensor:  # pinned memory needs a driver
        return torch.zeros(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # the meta device has no autocast
    monkeypatch.setattr(torch, "autocast", lambda *device, **settings: nullcontext())
    monkeypatch.setattr(sliding, "sliding_attention", fused_attention)
    monkeypatch.setattr(sliding, "sliding_share", fused_share)
    monkeypatch.setattr(step, "to_device", fresh)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("documents", ["joined", "isolated", "masked"])
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_step_does_not_synchronise_before_the_update(name: str, documents: str) -> None:
    if documents == "isolated" and ("hyena" in name or "explicit" in name):
        pytest.skip("filters refuse isolated documents")
    settings = {"width": 16, "heads": 2, "ffn": 16, "block": BLOCK, "depth": 1, "vocab_size": VOCABULARY}
    model = LanguageModel(ModelConfig(**settings | MODELS[name]))
    if documents == "masked" and masking_problem(model.config):
        pytest.skip("refuses masked documents")
    with torch.device("meta"), Waits() as waits:
        engine = FakeEngine(model.to("meta"), waits)
        ranks = SimpleNamespace(device=torch.device("meta"), world=1, phases=Phases(), all_reduce=lambda x: x)
        config = TrainConfig(steps=1, sequence_length=LENGTH, sequences=2 * ROWS, micro_sequences=ROWS)
        token_bytes = torch.ones(VOCABULARY, dtype=torch.long)
        context = Context(engine, ranks, token_bytes, Stop(ranks))
        trainer = Trainer(config, ScheduleConfig(), 1e-3, context, lambda _: Utilisation(1.0, 1.0))
        waits.found.clear()
        with pytest.raises(StopIteration):
            trainer.step(0, [batch(documents)] * 2, time.perf_counter())
        assert all(p.grad is not None for p in engine.module.parameters() if p.requires_grad) or "cross" in name
        assert engine.before_update == {}


def test_flex_attention_inputs_and_bias_gradient_do_not_synchronise() -> None:
    with torch.device("meta"), Waits() as waits:
        q = k = v = torch.zeros(2, 2, 256, 8)
        begin, bias, lse = torch.zeros(2, 256, dtype=torch.int32), torch.zeros(2, 129), torch.zeros(2, 2, 256)
        visited_tiles(Band(256, 256, Window(128)), torch.device("meta"), begin)
        bias_gradient(Attention(q, lse, bias, q, k, v, begin, Window(128, varying=128)), q)
        assert waits.found == {}


@pytest.mark.parametrize("documents", ["joined", "isolated", "masked"])
def test_a_batch_is_copied_to_a_gpu_from_contiguous_pinned_memory(
    documents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor))  # as torch
        return pinned[-1]

    def copied(tensor: Tensor, device: Any, non_blocking: bool) -> Tensor:
        assert tensor is pinned[-1] and non_blocking
        assert tensor.is_contiguous()  # torch copies any other through ordinary memory
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", copied)
    (two_rows,) = loader(Memory([40, 90, 17]), documents=documents, rows=2, micro_rows=2).batches(0)
    views = {name: getattr(two_rows, name)[:, ::2] for name in ("input_ids", "labels", "loss_mask")}
    columns = replace(two_rows, **views, starts=None)
    for found in (two_rows, columns):
        inputs = step.on_device(found, SimpleNamespace(type="cuda"))
        assert (inputs["input_ids"].numpy() == found.input_ids).all()
    assert len(pinned) == 3 + {"joined": 3, "isolated": 4, "masked": 5}[documents]


@pytest.mark.parametrize(
    ("device", "operation", "name"),
    [
        ("meta", lambda x: torch.ones(3, device="cpu").to(x.device), "copy between cpu and meta"),
        ("meta", lambda x: x[torch.tensor([0, 2], device="cpu")], "copy between cpu and meta"),
        ("meta", lambda x: torch.linalg.solve(x, x), "_linalg_check_errors"),
        ("meta", torch.linalg.inv, "_linalg_check_errors"),
        ("meta", torch.linalg.eigvalsh, "_linalg_eigh"),
        ("cpu", lambda x: float(x[0, 0]), "_local_scalar_dense"),
        ("cpu", lambda x: x[x > 0], "indexed by a mask"),
        ("cpu", lambda x: torch.equal(x, x), "equal"),
        ("meta", lambda x: torch.linalg.solve_ex(x, x), None),
        ("meta", lambda x: x[torch.tensor([0, 2], device="meta"), None, :2], None),
    ],
)
def test_only_synchronising_operations_are_detected(
    device: str, operation: Callable[[Tensor], Any], name: str | None
) -> None:
    x = torch.ones(3, 3, device=device)
    with Waits() as waits:
        operation(x)
    assert waits.found == ({name: 1} if name else {})


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_does_not_synchronise_before_its_own_step(
    stage: int, recipe_file: Callable[..., Any], on_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bst_dist.config import load_recipe
    from bst_dist.verify.step import distributed_step

    # A carried past makes it two steps. In the first, ZeRO-3 waits for other ranks to agree on what it will gather.
    changes = {"train": {"micro_sequences": 2, "carry": True}, "data": {"mode": "streaming"}}
    recipe = load_recipe(recipe_file(deepspeed=f"ds_configs/zero{stage}.json", **changes), ["model.vocab_size=320"])

    def one_step(ranks: Any) -> dict[str, int]:
        found: dict[str, int] = {}
        with Waits() as waits:
            begin, update = Trainer.step, Engine.update

            def counted(self: Trainer, *args: Any) -> Any:
                waits.found.clear()
                return begin(self, *args)

            def recorded(self: Engine) -> float:
                found.clear()
                found.update(waits.found)
                return update(self)

            monkeypatch.setattr(Trainer, "step", counted)
            monkeypatch.setattr(Engine, "update", recorded)
            monkeypatch.setattr("bst_dist.verify.step.Recorded.update", recorded)
            monkeypatch.setattr("bst_dist.verify.step.Recorded.gradients", {}, raising=False)
            distributed_step(recipe, ranks, None)
        return found

    assert on_ranks(1, one_step) == [{}]


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_timer_of_deepspeed_waits_for_the_device_in_a_step(
    stage: int, recipe_file: Callable[..., Any], on_ranks: Callable[..., list[Any]]
) -> None:
    from deepspeed.accelerator import get_accelerator

    from bst_dist.config import load_recipe
    from bst_dist.verify.step import distributed_step

    recipe = load_recipe(
        recipe_file(deepspeed=f"ds_configs/zero{stage}.json", train={"micro_sequences": 1}), ["model.vocab_size=320"]
    )
    steps = 5  # DeepSpeed's timer begins in the third

    def run(ranks: Any) -> list[int]:
        waits: list[int] = []  # one number for each step
        begin = Trainer.step

        def several(self: Trainer, step: int, batches: Any, start: float) -> Any:
            assert len(batches) > 1
            for _ in range(steps):
                waits.append(0)
                report = begin(self, step, batches, start)
            patch.undo()  # DeepSpeed waits when the engine is destroyed
            return report

        def synchronize(*_: Any) -> None:
            waits[-1:] = [count + 1 for count in waits[-1:]]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(get_accelerator(), "synchronize", synchronize)
            patch.setattr(Trainer, "step", several)
            distributed_step(recipe, ranks, None)
        return waits

    assert on_ranks(1, run) == [[0] * steps]
