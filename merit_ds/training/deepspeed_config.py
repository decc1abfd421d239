# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed JSON, checked for what would otherwise fail late, or not at all."""

import difflib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from merit_ds import OPTIMIZERS
from merit_ds.errors import InputError
from merit_ds.registration import spellings

MONITORS = ("tensorboard", "csv_monitor")
"""DeepSpeed's monitors that write files."""


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON.

    Raises:
        InputError: unreadable, not UTF-8, not JSON (with its line), a key given twice, a ZeRO stage that the
            trainer does not support, two precisions at once, or an option that Merit does not have.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        if not isinstance(values, dict):
            raise InputError("a DeepSpeed config is a JSON object; see configs/ for examples")
        check_deepspeed(values)
    except OSError as error:
        raise InputError(f"{path}: cannot read the DeepSpeed JSON: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return values


def check_deepspeed(values: dict[str, Any]) -> None:
    """Check a DeepSpeed JSON's content.

    Raises:
        InputError: as `read_deepspeed_json` says.
    """
    model_dtype(values)
    _check_sections(values)
    _check_zero_stage(values)
    _check_optimizer(values)


def section(ds_config: dict[str, Any], *names: str) -> dict[str, Any]:
    """The object under `names`, one inside the other; an empty one where it is absent.

    Raises:
        InputError: something else than a JSON object lies there.
    """
    for depth, name in enumerate(names, start=1):
        ds_config = ds_config.get(name, {})
        if not isinstance(ds_config, dict):
            raise InputError(f"{'.'.join(names[:depth])} must be a JSON object, but is {ds_config!r}")
    return ds_config


def model_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The parameters' dtype that DeepSpeed trains in: `bf16.enabled`, `fp16.enabled`, else float32.

    Raises:
        InputError: both are enabled, or a value is not a boolean.
    """
    enabled = {}
    for name in ("bf16", "fp16"):
        enabled[name] = section(ds_config, name).get("enabled", False)
        if not isinstance(enabled[name], bool):
            raise InputError(f"{name}.enabled must be true or false, but is {enabled[name]!r}")
    if all(enabled.values()):
        raise InputError("bf16.enabled and fp16.enabled are both true; keep one")
    return torch.bfloat16 if enabled["bf16"] else torch.float16 if enabled["fp16"] else torch.float32


def optimizer_type(ds_config: dict[str, Any]) -> str:
    """`optimizer.type` in lower case: DeepSpeed knows its own in any case."""
    return str(section(ds_config, "optimizer").get("type")).lower()


def parameter_groups(ds_config: dict[str, Any], parameters: Iterable[torch.Tensor]) -> list[dict[str, Any]]:
    """One group for our optimizers, which leave vectors undecayed by themselves; for others vectors are a group."""
    parameters = list(parameters)
    if optimizer_type(ds_config).startswith("merit"):
        return [{"params": parameters}]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def place_monitors(ds_config: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """The JSON with its file-writing monitors under the run's folder, unless it says where they go.

    DeepSpeed's own default is a folder `DeepSpeedJobName` in the working directory.

    Args:
        folder: of the run; None where the run saves nothing, and such a monitor writes nothing either.
    """
    placed = dict(ds_config)
    for name in MONITORS:
        monitor = section(ds_config, name)
        if monitor.get("enabled") and "output_path" not in monitor:
            placed[name] = {"enabled": False} if folder is None else {"output_path": folder, "job_name": name} | monitor
    return placed


def quiet_timer(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The JSON without DeepSpeed's throughput timer, unless it says something of it or of `steps_per_print`.

    On a GPU the timer waits for the device twice in every micro-batch, by default, for a number that is not printed:
    the log has the trainer's own.
    """
    if "steps_per_print" in ds_config or "throughput" in section(ds_config, "timers"):
        return ds_config
    return ds_config | {"timers": section(ds_config, "timers") | {"throughput": {"enabled": False}}}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise InputError(f"key {key!r} is given twice in one object")
        values[key] = value
    return values


def _check_sections(ds_config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed knows, but not in this trainer."""
    if "bfloat16" in ds_config:
        raise InputError("bfloat16: write bf16")
    if ds_config.get("sequence_parallel_size", 1) != 1:
        raise InputError(
            "sequence_parallel_size: DeepSpeed would divide the ranks by it, and this trainer would not; remove it "
            "(model.sequence_parallel in the recipe splits the sequence among tensor-parallel ranks)"
        )
    if ds_config.get("managed_gradient_accumulation", True) is not True:
        raise InputError(
            "managed_gradient_accumulation: without it DeepSpeed would make a step of every micro-batch; remove it"
        )
    if ds_config.get("gradient_allreduce_op", "avg") != "avg":
        raise InputError(
            "gradient_allreduce_op: gradients, clipping and so the steps would depend on the number of ranks; remove it"
        )
    if "datastates_ckpt" in ds_config or "writer" in section(ds_config, "checkpoint"):
        name = "datastates_ckpt" if "datastates_ckpt" in ds_config else "checkpoint.writer"
        raise InputError(f"{name}: DeepSpeed would still be writing when the checkpoint is called complete; remove it")
    if "activation_checkpointing" in ds_config:
        raise InputError(
            "activation_checkpointing is for models that call DeepSpeed's own, and this one does not: remove it, and "
            "set model.activation_checkpointing in the recipe"
        )
    if section(ds_config, "data_efficiency").get("enabled"):
        raise InputError("data_efficiency.enabled: this trainer reads its data by itself; remove data_efficiency")
    if section(ds_config, "torch_autocast").get("enabled") and model_dtype(ds_config) == torch.float32:
        raise InputError(
            "torch_autocast.enabled with weights in float32: Megatron-core's backward pass fails in it; "
            "set bf16.enabled in its place"
        )


def _check_zero_stage(ds_config: dict[str, Any]) -> None:
    stage = section(ds_config, "zero_optimization").get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2):
        raise InputError(f"zero_optimization.stage is {stage!r}; this trainer supports 0, 1 and 2")


def _check_optimizer(ds_config: dict[str, Any]) -> None:
    """DeepSpeed hands the JSON's options to the constructor; a wrong one would fail after the model is built."""
    kind = section(ds_config, "optimizer").get("type")
    if not isinstance(kind, str):
        raise InputError('optimizer.type is missing: "Merit", "AdamW" or another that DeepSpeed knows')
    ours = {name: found for found in OPTIMIZERS for name in spellings(found)}
    if kind not in ours:
        near = difflib.get_close_matches(kind, ours, n=1, cutoff=0.8)
        if near:
            raise InputError(f"optimizer.type: there is no {kind!r}; did you mean {near[0]!r}?")
        return
    optimizer, options = ours[kind], section(ds_config, "optimizer", "params")
    known = [name for name in inspect.signature(optimizer).parameters if name != "params"]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise InputError(f"optimizer.params: {optimizer.__name__} has no option {name!r}; {hint}")
    if "lr" not in options:
        raise InputError(f"optimizer.params.lr is missing; {optimizer.__name__} has no default learning rate")
    try:
        optimizer([torch.zeros(1)], **options)
    except ValueError as error:
        raise InputError(f"optimizer.params: {error}") from None
