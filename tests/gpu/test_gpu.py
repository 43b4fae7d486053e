"""Tests for a machine with a GPU (`make test-gpu`). The reference is the CPU, whose results the other tests check.

1. Every model: losses and all gradients on CUDA in fp32 equal those on the CPU in fp64; in bf16 they are close.
2. The fused attention path equals the tiles, forward and backward, with bias, past and documents.
3. With `deterministic: true` gradients are bitwise reproducible, a pass never waits for the device, and compiled layers
   compute the same as uncompiled ones.

docs/gpu.md says which of these have passed on which GPU. BST_REHEARSE_GPU=1 runs the tests on a CPU through CUDA's code
path (tests/cuda_path), which shows that the tests themselves run.
"""

import copy
import os

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from bst_dist.model.attention import flex, sliding
from bst_dist.model.attention.documents import documents_of
from bst_dist.model.attention.flex import flex_sliding_attention
from bst_dist.model.attention.sliding import sliding_attention
from bst_dist.model.attention.window import Window
from bst_dist.model.config import ModelConfig
from bst_dist.model.document_mask import Borders
from bst_dist.model.lm import LanguageModel
from bst_dist.train.start.deterministic import make_deterministic

REHEARSAL = os.environ.get("BST_REHEARSE_GPU") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="no CUDA device"),
]

BLOCK, LENGTH, VOCABULARY = 128, 512, 64
MODELS = {
    "sliding T5": {"mixer": "sliding"},
    "sliding RoPE": {"mixer": "sliding", "attention": {"position": "rope"}},
    "SH": {"mixer": "bst", "context": {"variant": "SH"}},
    "MH": {"mixer": "bst", "context": {"variant": "MH"}},
    "MF": {"mixer": "bst", "context": {"variant": "MF"}},
    "SH hyena": {"mixer": "bst", "ssm": {"kernel": "hyena", "length": LENGTH}},
    "MF explicit": {"mixer": "bst", "context": {"variant": "MF"}, "ssm": {"kernel": "explicit", "length": LENGTH}},
    "SH DPLR": {"mixer": "bst", "ssm": {"kernel": "s4-dplr"}},
    "selective": {"mixer": "bst", "ssm": {"kernel": "ssd"}},
    "joint": {"mixer": "bst-joint"},
    "Transformer-XL": {"mixer": "transformer-xl", "transformer_xl": {"window": 256}},
    "Block-Recurrent": {"mixer": "block-recurrent", "block_recurrent": {"states": 32}},
    "GSS": {"mixer": "gss"},
    "pure SSM": {"mixer": "ssm"},
    "Mamba-2": {"mixer": "mamba2"},
    "Gated DeltaNet": {"mixer": "gated-deltanet"},
    "full attention": {"mixer": "full"},
}


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if REHEARSAL:
        monkeypatch.setattr(sliding, "attention_path", lambda device: "flex")
        monkeypatch.setattr(torch_flex, "_validate_device", lambda *inputs: None)  # it refuses gradients on a CPU
        monkeypatch.setattr(flex, "BACKEND", "aot_eager")
        torch._dynamo.reset()
        flex._compiled.cache_clear()


@pytest.fixture
def _deterministic():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def build(name: str) -> tuple[LanguageModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = LanguageModel(
        ModelConfig(width=128, heads=2, ffn=256, block=BLOCK, depth=2, vocab_size=VOCABULARY, **MODELS[name])
    )
    drawn = torch.randint(0, VOCABULARY, (2, LENGTH + 1))
    return model, drawn[:, :-1], drawn[:, 1:]


def gradients(
    model: LanguageModel, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | Borders | None = None
) -> list[torch.Tensor]:
    """Return the loss and every gradient, as double-precision tensors on the CPU."""
    losses = model(ids, labels, starts=starts)
    losses.total.backward()
    return [losses.total.detach().double().cpu(), *(p.grad.double().cpu() for p in model.parameters())]


def relative_errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_fp32_on_the_gpu_equals_fp64_on_the_cpu(name):
    model, ids, labels = build(name)
    exact = gradients(copy.deepcopy(model).double(), ids, labels)
    found = gradients(model.to(DEVICE), ids.to(DEVICE), labels.to(DEVICE))
    assert max(relative_errors(found, exact)) < 5e-3  # on a CPU: 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_bf16_on_the_gpu_is_close_to_fp64_on_the_cpu(name):
    model, ids, labels = build(name)
    exact = gradients(copy.deepcopy(model).double(), ids, labels)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(model.to(DEVICE), ids.to(DEVICE), labels.to(DEVICE))
    errors = relative_errors(found, exact)
    assert errors[0] < 0.01
    assert sorted(errors)[len(errors) // 2] < 0.05


@pytest.mark.parametrize("before", [0, BLOCK])
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_fused_path_equals_the_tiles(before, with_documents, monkeypatch):
    torch.manual_seed(0)
    starts = torch.tensor([[False, True, False, True], [True, False, False, False]], device=DEVICE)
    documents = documents_of(starts, LENGTH, before + LENGTH, BLOCK) if with_documents else None
    shapes = (LENGTH, before + LENGTH, before + LENGTH)
    inputs = [torch.randn(2, n, 2, 64, device=DEVICE, requires_grad=True) for n in shapes]
    bias = torch.randn(2, BLOCK + 1, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, LENGTH, 2, 64, device=DEVICE)
    begin = None if documents is None else documents.begin
    fused = flex_sliding_attention(*inputs, Window(BLOCK), bias, begin)[0]
    monkeypatch.setattr(sliding, "attention_path", lambda device: "tiles")
    tiled = sliding_attention(*inputs, Window(BLOCK), bias, documents)
    torch.testing.assert_close(fused, tiled, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad((fused * weight).sum(), (*inputs, bias))
    exact = torch.autograd.grad((tiled * weight).sum(), (*inputs, bias))
    assert max(relative_errors([g.cpu().double() for g in found], [g.cpu().double() for g in exact])) < 1e-3


def starting(kind: str, device: str) -> torch.Tensor | Borders:
    """Return where documents begin: at blocks ("isolated"), or at any token."""
    begins = torch.zeros(2, LENGTH, dtype=torch.bool)
    begins[0, [128, 384]] = begins[1, 256] = True
    if kind == "isolated":
        return begins[:, ::BLOCK].to(device)
    begins[0, 200] = begins[1, 261] = True
    found = Borders.of(begins)
    return Borders(found.begins.to(device), found.places.to(device))


@pytest.mark.parametrize("kind", ["isolated", "masked"])
@pytest.mark.parametrize("name", ["sliding T5", "SH", "MF", "joint", "full attention", "Transformer-XL"])
def test_documents_on_the_gpu_equal_fp64_on_the_cpu(name, kind):
    model, ids, labels = build(name)
    exact = gradients(copy.deepcopy(model).double(), ids, labels, starting(kind, "cpu"))
    model.to(DEVICE)
    for layer in model.layers:
        layer.compiled = True
    found = gradients(model, ids.to(DEVICE), labels.to(DEVICE), starting(kind, DEVICE))
    assert max(relative_errors(found, exact)) < 5e-3


@pytest.mark.parametrize("name", MODELS)
def test_losses_without_gradients_are_exact_whole_and_in_slices(name):
    model, ids, labels = build(name)
    with torch.no_grad():
        exact = model.double()(ids, labels).total
        model, ids, labels = model.float().to(DEVICE), ids.to(DEVICE), labels.to(DEVICE)
        whole = model(ids, labels).total
        state, total, position = None, 0.0, 0
        for end in (256, 320, 321, 384, LENGTH):  # slices that are whole FlexAttention tiles, and slices that are not
            past = model.carry(state, position)
            total += model(ids[:, position:end], labels[:, position:end], past=past).total
            state, position = past.after, end
    assert abs(float(whole.cpu() / exact) - 1) < 1e-4
    assert abs(float(total.cpu() / exact) - 1) < 1e-4


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bit_for_bit_in_deterministic_mode(name):
    model, ids, labels = build(name)
    model, ids, labels = model.to(DEVICE), ids.to(DEVICE), labels.to(DEVICE)
    found = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            found.append(gradients(model, ids, labels))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(REHEARSAL, reason="asks CUDA")
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_does_not_synchronise_with_the_cpu(name):
    model, ids, labels = build(name)
    model, ids, labels = model.cuda(), ids.cuda(), labels.cuda()
    model(ids, labels).total.backward()  # the first pass compiles and initialises libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, labels).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["sliding RoPE", "SH", "MF", "Block-Recurrent"])
def test_compiled_layers_and_loss_equal_uncompiled_ones(name):
    model, ids, labels = build(name)
    model, ids, labels = model.to(DEVICE), ids.to(DEVICE), labels.to(DEVICE)
    exact = gradients(copy.deepcopy(model), ids, labels)
    for layer in model.layers:
        layer.compiled = True
    model.fused_loss = True
    assert max(relative_errors(gradients(model, ids, labels), exact)) < 1e-3
