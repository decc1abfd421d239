# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed 0.19 makes of a JSON: the wrapper around the optimizer, its buffers' dtypes and sizes.

Read from DeepSpeed's sources and held against its engines by `tests/test_plan_run.py`. A key that changes memory or
traffic in a way that is not known here is refused.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from merit_ds.errors import InputError
from merit_ds.training.deepspeed_config import model_dtype, optimizer_type, section

Kind = Literal["none", "float32 copies", "BF16_Optimizer", "DeepSpeedZeroOptimizer"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, and the engine's own bucket where it reduces itself."""

_KNOWN_ZERO = {
    "stage",
    "reduce_bucket_size",
    "allgather_bucket_size",  # not used where torch has all_gather_into_tensor
    "allgather_partitions",
    "reduce_scatter",
    "use_multi_rank_bucket_allreduce",
    "overlap_comm",
    "compute_grad_norm",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "elastic_checkpoint",
    "load_from_fp32_weights",
}
_UNKNOWN = (
    "amp",
    "compression_training",
    "hybrid_engine",
    "sequence_parallel_size",
    "sparse_gradients",
    "torch_autocast",
)
_UNKNOWN_IN = {
    "bf16": ("immediate_grad_update", "bf16_master_weights_and_grads", "bf16_optimizer_states"),
    "fp16": ("fp16_master_weights_and_grads",),
}
"""By section."""


@dataclass(frozen=True)
class Wrapper:
    """One DeepSpeed set-up.

    Attributes:
        kind: "none" (stage 0, float32), "float32 copies" (stage 0 in 16 bits: FP16_UnfusedOptimizer, or FP16_Optimizer
            for DeepSpeed's fused Adam), or the class that shards.
        stage: of ZeRO, 0 to 2.
        dtype: of the model's parameters and of their `grad`.
        accumulation: the dtype in which micro-batches are summed.
        communication: the dtype of the gradients on the wire.
        bucket: elements of a reduction's bucket.
        buffers: how many buckets are held: 2 with `overlap_comm`.
        copies_bucket: a bucket is copied to be reduced, as it is with `reduce_scatter`.
        to_owner: each slice is reduced to its owner, where the default is an all-reduce of the whole bucket.
        checks_overflow: a flag is exchanged before the step.
        norms: the gradient norm is exchanged.
        clips: gradients are clipped.
    """

    kind: Kind
    stage: int
    dtype: torch.dtype
    accumulation: torch.dtype
    communication: torch.dtype
    bucket: int
    buffers: int
    copies_bucket: bool
    to_owner: bool
    checks_overflow: bool
    norms: bool
    clips: bool

    @property
    def shards(self) -> bool:
        """Whether ranks hold slices of the optimizer's state."""
        return self.stage > 0

    @property
    def has_compact_sums(self) -> bool:
        """ZeRO's own float32 slice for the sums of 16-bit gradients."""
        return self.kind == "DeepSpeedZeroOptimizer" and self.accumulation != self.dtype

    def reductions(self, accumulation: int) -> int:
        """How often a step's gradients are reduced: ZeRO-2 does it in every micro-batch."""
        return accumulation if self.stage == 2 else 1


def wrapper_of(ds_config: dict[str, Any]) -> Wrapper:
    """Raises: InputError: DeepSpeed refuses the combination, or a key's effect is not known here."""
    _refuse_unknown(ds_config)
    zero = section(ds_config, "zero_optimization")
    stage, dtype = zero.get("stage", 0), model_dtype(ds_config)
    accumulation = _dtype(section(ds_config, "data_types"), "grad_accum_dtype", dtype)
    if stage == 0 and accumulation != dtype:
        raise InputError("data_types.grad_accum_dtype is not the model's: DeepSpeed refuses that at stage 0")
    kind: Kind = "DeepSpeedZeroOptimizer"
    if stage == 0:
        kind = "none" if dtype == torch.float32 else "float32 copies"
    elif stage == 1 and dtype == torch.bfloat16 and accumulation == torch.float32:
        kind = "BF16_Optimizer"
    is_zero = kind == "DeepSpeedZeroOptimizer"
    if is_zero and optimizer_type(ds_config) == "muon":
        raise InputError("the plan knows Muon at stage 0, and in bf16 at stage 1 with data_types.grad_accum_dtype fp32")
    checked = {torch.float16: True, torch.bfloat16: section(ds_config, "bf16").get("check_grad_overflow", True)}
    return Wrapper(
        kind=kind,
        stage=stage,
        dtype=dtype,
        accumulation=accumulation,
        communication=_dtype(ds_config, "communication_data_type", dtype),
        bucket=int(zero.get("reduce_bucket_size", _BUCKET_ELEMENTS)) if is_zero else _BUCKET_ELEMENTS,
        buffers=2 if is_zero and zero.get("overlap_comm") else 1,
        copies_bucket=zero.get("reduce_scatter", True),
        to_owner=is_zero and zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True),
        checks_overflow=is_zero and bool(checked.get(dtype, False)),
        norms=not is_zero or zero.get("compute_grad_norm", True),
        clips=ds_config.get("gradient_clipping", 1.0) > 0,
    )


def with_stage(ds_config: dict[str, Any], stage: int) -> dict[str, Any]:
    """The same JSON at another ZeRO stage; at stage 0 without a `grad_accum_dtype` that DeepSpeed would refuse."""
    changed = ds_config | {"zero_optimization": section(ds_config, "zero_optimization") | {"stage": stage}}
    if stage == 0:
        changed["data_types"] = {
            key: value for key, value in section(ds_config, "data_types").items() if key != "grad_accum_dtype"
        }
    return changed


def dtype_name(dtype: torch.dtype) -> str:
    """As a JSON has it."""
    return next(name for name, known in _DTYPES.items() if known == dtype)


def _dtype(values: dict[str, Any], key: str, default: torch.dtype) -> torch.dtype:
    name = values.get(key)
    if name is None:
        return default
    if name not in _DTYPES:
        raise InputError(f"{key} is {name!r}; the plan knows {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _refuse_unknown(ds_config: dict[str, Any]) -> None:
    zero = section(ds_config, "zero_optimization")
    found = [key for key in _UNKNOWN if ds_config.get(key)]
    found += [f"zero_optimization.{key}" for key, value in zero.items() if key not in _KNOWN_ZERO and value]
    if zero.get("contiguous_gradients") is False:
        found.append("zero_optimization.contiguous_gradients false")
    found += [
        f"{name}.{key}" for name, keys in _UNKNOWN_IN.items() for key in keys if section(ds_config, name).get(key)
    ]
    if found:
        raise InputError(f"{found[0]}: the plan does not know what it does to memory and traffic; leave it out")
