"""Full single-precision weights out of an engine of any ZeRO stage, as one safetensors file.

The file is written front to back, one tensor at a time, so no rank ever holds more than the largest tensor of a
ZeRO-3 model on top of its shard. Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON
header, the tensors' bytes).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn


def write(module: nn.Module, file: Any, metadata: dict[str, str]) -> None:
    """Write parameters and persistent buffers of `module`. All ranks must call it; `file` is None on all but one."""
    tensors = dict(_tensors(module))
    if file is not None:
        _write_header(file, tensors, metadata)
    for tensor in tensors.values():
        with _whole(tensor):
            if file is not None:
                file.write(tensor.detach().to("cpu", torch.float32).contiguous().flatten().view(torch.uint8).numpy())


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()  # a tied weight once, under its first name
    kept = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _write_header(file: Any, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, tensor in tensors.items():
        shape = list(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves an empty tensor in a parameter's place
        end = position + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)


def _whole(tensor: Tensor) -> Any:
    """While open, `tensor` holds all of its values on every rank."""
    return deepspeed.zero.GatheredParameters([tensor]) if hasattr(tensor, "ds_id") else nullcontext()
