"""DeepSpeed's JSON: read from `ds_configs/`, checked, and completed from the recipe so that no value is a default.

DeepSpeed ignores unknown top-level keys, and its defaults change between versions (`gradient_clipping` became 1.0). So
a file may only hold the keys of a ZeRO strategy, the installed version must know every key, and the completed JSON
sets every value.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bst_base.errors import UserError, nearest
from bst_dist.parallel.deepspeed_import import deepspeed

DeepSpeedZeroConfig = deepspeed.runtime.zero.config.DeepSpeedZeroConfig

# Keys that a file in ds_configs/ may have: section -> the class or keys that the installed DeepSpeed knows there.
STRATEGY: dict[str, Any] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "aio": deepspeed.runtime.swap_tensor.aio_config.get_aio_config({}),
    "comms_logger": deepspeed.comm.config.CommsLoggerConfig,
    "wall_clock_breakdown": None,
}
# DeepSpeed's keys that the recipe sets -> the recipe's field.
OWNED = {
    "train_batch_size": "train.sequences",
    "train_micro_batch_size_per_gpu": "train.micro_sequences",
    "gradient_accumulation_steps": "train.sequences and train.micro_sequences",
    "gradient_clipping": "train.gradient_clipping",
    "torch_autocast": "train.precision",
    "bf16": "train.precision (bf16 here is autocast: DeepSpeed's bf16 casts every parameter, SSM dynamics included)",
    "fp16": "train.precision (fp16 is not supported: SSM states overflow its range)",
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
    "activation_checkpointing": "activation_checkpointing",
    "tensorboard": "log.tensorboard",
    "steps_per_print": "log.every",
}

# Keys with one allowed value -> (value, reason).
FIXED: dict[str, tuple[Any, str]] = {
    "communication_data_type": ("fp32", "gradients are reduced in fp32 in every stage"),
    "timers": (
        {"throughput": {"enabled": False, "synchronized": False}},
        "DeepSpeed's timer would wait for the device twice in each micro-batch",
    ),
}


class DeepSpeedConfigError(UserError):
    """A DeepSpeed file that cannot be used, or an engine whose configuration differs from the completed JSON."""


@dataclass(frozen=True)
class Intent:
    """The engine settings that follow from the recipe and the number of ranks."""

    world: int
    micro_sequences: int
    accumulation: int
    gradient_clipping: float
    precision: str
    """bf16 or fp32"""
    optimizer: str = "adamw"
    """adamw or muon"""


def read(path: Path) -> dict[str, Any]:
    """Read the strategy in `path`; raises DeepSpeedConfigError for a bad file or a key that DeepSpeed does not know."""
    try:
        strategy = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise DeepSpeedConfigError(f"{path}: no such file; the recipe's `deepspeed` names one of ds_configs/") from None
    except ValueError as error:
        raise DeepSpeedConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(strategy, dict):
        raise DeepSpeedConfigError(f"{path}: expected an object, found {type(strategy).__name__}")
    problems = list(_unknown(strategy, {**STRATEGY, **dict.fromkeys((*OWNED, *FIXED))}, ""))
    if problems:
        raise DeepSpeedConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return strategy


def complete(strategy: dict[str, Any], intent: Intent, where: str) -> dict[str, Any]:
    """Return `strategy` with every value set that affects the run's numbers.

    Raises DeepSpeedConfigError, beginning with `where`, when the strategy contradicts the recipe or has bad values.
    """
    try:
        zero = DeepSpeedZeroConfig(**strategy.get("zero_optimization", {}))
    except ValidationError as error:
        found = (f"zero_optimization.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DeepSpeedConfigError("\n".join(f"{where}: {problem}" for problem in found)) from None
    owned = _owned(intent)
    for key, source in OWNED.items():
        if key in strategy and strategy[key] != owned.get(key):
            raise DeepSpeedConfigError(f"{where}: {key} is set by the recipe, in {source}: remove it here")
    for key, (value, reason) in FIXED.items():
        if strategy.get(key, value) != value:
            raise DeepSpeedConfigError(f"{where}: {key} can only be {value!r}: {reason}; remove it here")
    _require_supported(zero, where)
    offloads = [section for section in ("offload_optimizer", "offload_param") if _offloads(getattr(zero, section))]
    if offloads and intent.optimizer == "muon":
        raise DeepSpeedConfigError(
            f"{where}: zero_optimization.{offloads[0]}: optimizer.kind muon assembles matrices on the accelerator and "
            "cannot be offloaded; choose another strategy, or adamw"
        )
    rest = {key: value for key, value in strategy.items() if key != "zero_optimization"}
    # For an offloaded optimizer DeepSpeed would require its own CPU Adam, which it compiles at the start. torch's fused
    # AdamW, used in every other case, is vectorised on a CPU as well.
    client = {"zero_force_ds_cpu_optimizer": False} if zero.offload_optimizer is not None else {}
    return {"wall_clock_breakdown": False, **rest, **owned, **client, "zero_optimization": _every_key(zero)}


def _require_supported(zero: DeepSpeedZeroConfig, where: str) -> None:
    """Raise DeepSpeedConfigError for settings with which a run would fail in its first steps."""
    if not zero.compute_grad_norm:
        raise DeepSpeedConfigError(
            f"{where}: zero_optimization.compute_grad_norm can only be true: the guard and the metrics need the "
            "gradient norm; remove it here"
        )
    if _offloads(zero.offload_optimizer) and zero.offload_optimizer.ratio != 1:
        raise DeepSpeedConfigError(
            f"{where}: zero_optimization.offload_optimizer.ratio can only be 1: to offload a part of the optimizer "
            "DeepSpeed needs its own CPU Adam, and this program uses torch's AdamW; remove it here"
        )


def _offloads(section: Any) -> bool:
    return section is not None and section.device != "none"


def require_nvme(completed: dict[str, Any]) -> None:
    """Raise DeepSpeedConfigError, naming the host, when an offload directory is missing; each rank checks its host."""
    for section in ("offload_optimizer", "offload_param"):
        offload = completed["zero_optimization"].get(section) or {}
        if offload.get("device") == "nvme" and not Path(offload["nvme_path"] or "").is_dir():
            raise DeepSpeedConfigError(
                f"zero_optimization.{section}.nvme_path: {socket.gethostname()} has no directory "
                f"{offload['nvme_path']}: name one on every host's own NVMe drive, in a copy of the strategy's file"
            )


def differences(completed: dict[str, Any], parsed: Any) -> list[str]:
    """Return where the engine's parsed configuration differs from the completed JSON: one line per key."""
    values = {key: getattr(parsed, key) for key in completed if hasattr(parsed, key)}
    values["torch_autocast"] = {
        "enabled": parsed.torch_autocast_enabled,
        "dtype": str(parsed.torch_autocast_dtype).removeprefix("torch."),
        "lower_precision_safe_modules": parsed.torch_autocast_lower_precision_safe_modules,
    }
    values["bf16"] = {"enabled": parsed.bfloat16_config.enabled}
    values["fp16"] = {"enabled": parsed.float16_config.enabled}
    values["data_types"] = {"grad_accum_dtype": parsed.grad_accum_dtype}
    values["communication_data_type"] = str(parsed.communication_data_type).replace("torch.float32", "fp32")
    values["timers"] = {"throughput": parsed.timers_config.model_dump(include={"enabled", "synchronized"})}
    values["zero_optimization"] = _every_key(parsed.zero_config)
    return [
        f"{key}: asked for {wanted!r}, its engine has {got!r}"
        for key, wanted, got in _compare(completed, values, "")
        if key.partition(".")[0] not in ("aio", "comms_logger")
    ]


def _owned(intent: Intent) -> dict[str, Any]:
    """Return the keys that follow from the recipe.

    DeepSpeed treats each sequence-parallel rank as a data-parallel rank, so its global batch counts every slice of a
    sequence as one sequence.
    """
    return {
        "train_batch_size": intent.micro_sequences * intent.accumulation * intent.world,
        "train_micro_batch_size_per_gpu": intent.micro_sequences,
        "gradient_accumulation_steps": intent.accumulation,
        "gradient_clipping": intent.gradient_clipping,
        # Parameters stay fp32 and only matrix products run in bf16. DeepSpeed would also *reduce* the gradients of
        # listed modules in bf16 (Linear and Conv by default). The list is empty, so every stage reduces in fp32.
        "torch_autocast": {
            "enabled": intent.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        **{key: value for key, (value, _) in FIXED.items()},
        # The loss is already divided by the valid tokens of the whole step; nothing else may scale gradients.
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "steps_per_print": None,
    }


def _every_key(zero: DeepSpeedZeroConfig) -> dict[str, Any]:
    """Return every key of the ZeRO section that is not deprecated, with its value, under its name in the JSON."""
    dead = {
        name for name, field in type(zero).model_fields.items() if (field.json_schema_extra or {}).get("deprecated")
    }
    if "leaf_module" not in zero.model_fields_set:  # a list of other projects' mixture-of-experts classes
        dead.add("leaf_module")
    return zero.model_dump(mode="json", by_alias=True, exclude=dead, exclude_none=True)


def _unknown(given: dict[str, Any], known: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield a message for each key of `found` that DeepSpeed does not know, with the nearest known key."""
    for key, value in given.items():
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {prefix + near!r}?" if near else f"known there: {', '.join(sorted(known))}"
            yield f"unknown key {prefix + key!r}: {hint}"
        elif isinstance(value, dict) and (inner := _keys(known[key])):
            yield from _unknown(value, inner, f"{prefix}{key}.")


def _keys(section: Any) -> dict[str, Any]:
    """Return key -> nested section of a pydantic class (by a field's name and its alias) or of a plain dict."""
    if isinstance(section, dict):
        return section
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return {}
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        models = [kind for kind in _alternatives(field.annotation) if _is_model(kind)]
        nested = models[0] if models else None
        keys |= {key: nested for key in (name, field.alias) if key}
    return keys


def _alternatives(annotation: Any) -> Iterable[Any]:
    return getattr(annotation, "__args__", None) or (annotation,)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _compare(wanted: Any, got: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(wanted, dict) and isinstance(got, dict):
        for key, value in wanted.items():
            yield from _compare(value, got.get(key), f"{name}.{key}" if name else key)
    elif wanted != got:
        yield name, wanted, got


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"key {twice[0]!r} is given twice")
    return dict(pairs)
