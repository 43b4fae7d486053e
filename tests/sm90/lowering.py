"""Compile a layer for an H100 on a machine without a GPU: Inductor lowers its graphs, ptxas compiles its kernels.

Needs a torch built with CUDA, which includes Triton and ptxas, but neither GPU nor driver. A layer, or attention alone,
is traced as in a run, on a CPU with CUDA's code path forced. Its graphs are moved to fake CUDA tensors, and Inductor
writes the programs that would run. Properties that only a device knows (its model, which attention kernel torch
chooses) are set here.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bst_dist.model import compiled, loss
from bst_dist.model.attention import flex, sliding

CUDA = torch.device("cuda", 0)
CAPABILITY = 90
SHARED_MEMORY = 232_448
"""Most bytes of shared memory that a thread block may use on an H100."""


class H100:
    """torch's device properties of an H100."""

    major, minor, multi_processor_count, warp_size, name, gcnArchName = 9, 0, 132, 32, "NVIDIA H100", ""
    max_threads_per_multi_processor, regs_per_multiprocessor, max_threads_per_block = 2048, 65536, 1024
    total_memory, L2_cache_size = 80 << 30, 50 << 20
    shared_memory_per_block, shared_memory_per_block_optin = 49_152, SHARED_MEMORY
    shared_memory_per_multiprocessor = 233_472


@dataclass
class Graph:
    """The graph of one pass after the compiler's front end."""

    backward: bool
    inference: bool
    """Without gradients."""
    module: fx.GraphModule
    inputs: list[Any]


class _TracedError(Exception):
    """Raised to stop the call once all graphs exist, before any runs."""


def stopped(graph: Graph) -> Callable[..., Any]:
    """Return a function, to use instead of the compiled graph, that stops the call."""

    def run(*_: Any) -> None:
        raise _TracedError

    return run


def trace(
    call: Callable[[], object], compiled_as: Callable[[Graph], Callable[..., Any]] = stopped, bf16: bool = True
) -> list[Graph]:
    """Return the graphs that are compiled in a call: forward and backward, or only forward without gradients.

    Args:
        compiled_as: turns a graph into the function that runs it, called with a list of its inputs. By default nothing
            runs, and the call ends.
        bf16: whether the call is under autocast to bf16.
    """
    from torch._inductor.compile_fx import _recursive_joint_graph_passes

    graphs: list[Graph] = []

    def keep(backward: bool = False, inference: bool = False) -> Callable[..., Any]:
        def compiler(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            if inference:
                _recursive_joint_graph_passes(module)
            graphs.append(Graph(backward, inference, module, inputs))
            run = compiled_as(graphs[-1])
            run._boxed_call = True
            return run

        return compiler

    def partition(module: fx.GraphModule, joint: Any, **more: Any) -> Any:
        _recursive_joint_graph_passes(module)
        return min_cut_rematerialization_partition(module, joint, compiler="inductor", **more)

    backend = aot_autograd(
        fw_compiler=keep(),
        bw_compiler=keep(backward=True),
        inference_compiler=keep(inference=True),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    for module in (compiled, flex, loss):
        module._compiled.cache_clear()
    with ExitStack() as stack:
        stack.enter_context(patch.object(sliding, "attention_path", lambda device: "flex"))
        stack.enter_context(patch.object(torch_flex, "_validate_device", lambda *_: None))
        stack.enter_context(patch.object(flex, "BACKEND", backend))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _flash))
        stack.enter_context(patch("torch._functorch.config.force_non_lazy_backward_lowering", True))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=bf16))
        with suppress(_TracedError):
            call()
    return graphs


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Call the kernel that torch chooses on an H100 for half precision without a mask; torch would ask the device."""
    if attn_mask is not None:
        raise NotImplementedError("no call of a compiled layer has a mask")
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]


@contextmanager
def pretended_h100() -> Iterator[None]:
    """Context manager in which torch, Inductor and Triton see an H100."""
    import torch._inductor.scheduler as scheduler
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.utils._triton as has
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", CAPABILITY, 32))
        get_current_device = staticmethod(lambda: 0)
        get_active_torch_device = staticmethod(lambda: CUDA)
        get_device_interface = staticmethod(lambda: torch.cuda)

    driver.set_active(Driver())
    answers = {
        "is_available": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "_get_device_properties": H100,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_90"],
        "synchronize": None,
    }
    with ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, value=value, **__: value, create=True))
        properties, capability = staticmethod(lambda device=None: H100), staticmethod(lambda device=None: CAPABILITY)
        for interface in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(patch.object(interface, "get_device_properties", properties))
        stack.enter_context(patch.object(CudaInterface, "is_available", staticmethod(lambda: True)))
        stack.enter_context(patch.object(CudaInterface, "get_compute_capability", capability))
        for module in (has, scheduler):
            for name in ("has_triton", "has_triton_package"):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, lambda *_: True))
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        stack.enter_context(
            patch.multiple("torch._inductor.config", fx_graph_cache=False, compile_threads=1, **compiled.OPTIONS)
        )
        compiled.combine_alike()
        yield


@dataclass
class Program:
    """The program that Inductor writes for a pass."""

    code: str
    """Python source, with its Triton kernels."""
    bytes: int
    """Bytes that its kernels read and write; each buffer counts once per kernel."""


def lower(graph: Graph) -> Program:
    """Lower a pass with Inductor; return its program."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    module = graph.module
    sizes = next(x.fake_mode.shape_env for x in graph.inputs if isinstance(x, FakeTensor))  # of dynamic shapes
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes)
    for part in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:  # itself, then masks and scores
        for node in part.graph.nodes:
            node.args, node.kwargs = _on_cuda(node.args), _on_cuda(node.kwargs)
            if part is not module and isinstance(value := node.meta.get("val"), Tensor):
                node.meta["val"] = _fake(mode, value)  # the propagation below does not enter them
        part.recompile()
    inputs = [_fake(mode, one) if isinstance(one, Tensor) else one for one in graph.inputs]
    with mode:
        FakeTensorProp(module, mode=mode).propagate_dont_convert_inputs(*inputs)
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(module, is_inference=graph.inference)
            FakeTensorProp(module, mode=mode).propagate_dont_convert_inputs(*inputs)
    lowering = GraphLowering(
        module, example_inputs=inputs, shape_env=sizes, is_backward=graph.backward, is_inference=graph.inference
    )
    with mode, DebugContext(), V.set_graph_handler(lowering), V.set_fake_mode(mode):
        lowering.run(*inputs)
        code, _ = lowering.codegen()
        return Program(code.value, sum(_moved(node) for node in lowering.scheduler.nodes))


def _moved(node: Any) -> int:
    """Return the bytes that a kernel reads and writes: Inductor's count, corrected to the used part of each buffer.

    Inductor counts a whole buffer even if a kernel or operator reads only a slice of it. It also counts values that
    only pass from one part of a combined kernel to the next.
    """
    from torch._inductor.dependencies import MemoryDep
    from torch._inductor.ir import MultiOutputLayout, NoneLayout
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._inductor.virtualized import V

    if isinstance(node, ExternKernelSchedulerNode):  # views of buffers in, a new buffer out
        made = [] if isinstance(node.node.layout, MultiOutputLayout | NoneLayout) else [node.node]
        given = [] if type(node.node).__name__ == "MultiOutput" else node.node.inputs
        views = {(x.get_name(), str(x.get_layout())): x for x in pytree.tree_leaves([*given, *made])}
        return sum(_view_bytes(x.get_layout()) for x in views.values())
    parts: dict[str, int] = {}
    for dependency in node.read_writes.reads | node.read_writes.writes:
        numbers = dependency.get_numel() if isinstance(dependency, MemoryDep) else sys.maxsize
        size = V.graph.sizevars.optimization_hint(numbers) * V.graph.get_dtype(dependency.name).itemsize
        parts[dependency.name] = parts.get(dependency.name, 0) + size
    whole = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    return sum(min(size, parts[name]) for name, size in whole.items() if name not in V.graph.removed_buffers)


def _view_bytes(layout: Any) -> int:
    sizes = [int(size) for size, stride in zip(layout.size, layout.stride, strict=True) if stride != 0]
    return math.prod(sizes) * layout.dtype.itemsize


def _on_cuda(value: Any) -> Any:
    return pytree.tree_map(lambda one: CUDA if isinstance(one, torch.device) else one, value)


def _fake(mode: FakeTensorMode, x: Tensor) -> FakeTensor:
    return FakeTensor(mode, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), CUDA)


@dataclass(frozen=True)
class Launches:
    """Number of kernel calls in a program, by kind."""

    fused: int
    """Triton kernels written by Inductor."""
    products: int
    """cuBLAS matrix products, with or without ReLU."""
    flex: int
    """FlexAttention kernels."""
    flash: int
    """torch's flash attention."""
    fallbacks: tuple[str, ...]
    """Other torch operators that are called directly; views are not included, because they launch nothing."""

    @property
    def total(self) -> int:
        return self.fused + self.products + self.flex + self.flash + len(self.fallbacks)


def launches(code: str) -> Launches:
    """Count the kernel calls in a program."""
    called = re.findall(r"(?m)^\s+(triton_\w+)\.run\(", code)
    operators = re.findall(r"(?m)= (torch\.ops\.[\w.]+)\(", code)
    flash, relu = (sum(kind in name for name in operators) for kind in ("flash_attention", "addmm_activation"))
    own = [name for name in operators if not re.search("flash_attention|addmm_activation", name)]
    own = [name for name in own if not _operator(name).is_view]
    in_flex = sum("flex" in name for name in called)
    return Launches(
        fused=len(called) - in_flex,
        products=len(re.findall(r"extern_kernels\.\w+\(", code)) + relu,
        flex=in_flex,
        flash=flash,
        fallbacks=tuple(own),
    )


def _operator(name: str) -> Any:
    """Return the operator with a name such as `torch.ops.aten.add.Tensor`."""
    return reduce(getattr, name.split(".")[1:], torch)


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel compiled to machine code for sm_90."""

    name: str
    bytes: int
    shared: int
    """Bytes of shared memory per thread block."""


def compile_kernels(code: str) -> list[Kernel]:
    """Compile every Triton kernel of a program with Triton and ptxas; their errors are not caught."""
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    found = []
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S):
        kernel = getattr(PyCodeCache.load(source), name)
        config, meta = kernel.configs[0], kernel.triton_meta
        constants = {**meta.get("constants", {}), **config.kwargs}
        signature = {name: "constexpr" if name in constants else kind for name, kind in meta["signature"].items()}
        signature |= {name: "constexpr" for name in kernel.fn.arg_names if name in constants}
        source = ASTSource(fn=kernel.fn, signature=signature, constexprs=constants, attrs=meta["configs"][0])
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        binary = compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
        found.append(Kernel(name, len(binary.asm["cubin"]), binary.metadata.shared))
    return found


def precisions(code: str) -> tuple[int, int]:
    """Return the sines and cosines that a program computes in double precision, and its kernels of mixed precision.

    A combined kernel is mixed if some of its parts compute in double precision and some do not.
    """
    sines = mixed = 0
    for source in re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, re.S):
        pointers = re.findall(r"'(\w+)': '\*fp64'", source)
        in_double = re.compile("|".join([r"tl\.float64", *(rf"\b{name}\b" for name in pointers)]))
        parts = re.split(r"\bpid_offset = .*", source.partition("@triton.jit")[2].partition(":\n")[2])
        parts = [part for part in parts if "numel = " in part]
        double = [part for part in parts if in_double.search(part)]
        mixed += 0 < len(double) < len(parts)
        for part in double:
            elements = math.prod(int(size) for size in re.findall(r"\b(?:[xy]|r0_)numel = (\d+)", part))
            sines += elements * len(re.findall(r"libdevice\.(?:sin|cos)\(", part))
    return sines, mixed


PRODUCTS = re.compile(r"extern_kernels\.(?:mm|bmm|addmm|baddbmm)\((.*), out=")
VIEW = re.compile(r"reinterpret_tensor\(\w+, \(([^()]*)\), \(([^()]*)\), \d+\)")
MADE = re.compile(r"(?:(\w+) = empty_strided_cuda\(|assert_size_stride\((\w+), )\(([^()]*)\), \(([^()]*)\)")


def copied_operands(code: str) -> list[str]:
    """Return the operands of matrix products that torch copies first, because neither rows nor columns are contiguous.

    The program does not show these copies.
    """
    layouts = {one or other: (sizes, strides) for one, other, sizes, strides in MADE.findall(code)}
    found = []
    for operands in PRODUCTS.findall(code):
        views = VIEW.findall(operands) + [
            layouts[name] for name in re.findall(r"\w+", VIEW.sub("", operands)) if name in layouts
        ]
        found += [f"({sizes}), ({strides})" for sizes, strides in views if not _as_cublas_takes_it(sizes, strides)]
    return found


def _as_cublas_takes_it(sizes: str, strides: str) -> bool:
    matrix = list(zip(_numbers(sizes), _numbers(strides), strict=True))[-2:]
    return any(stride == 1 or size == 1 for size, stride in matrix)


def _numbers(listed: str) -> list[int]:
    return [int(one) for one in listed.split(",") if one.strip()]
