# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of the trainer as a float32 model in this process alone, without DeepSpeed's engine."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from merit_ds.errors import InputError
from merit_ds.training.checkpoint_folder import Checkpoint
from merit_ds.training.config import Config
from merit_ds.training.model import build_model
from merit_ds.training.safe_load import read
from merit_ds.training.universal import newest_complete

CONVERT = "convert it by python -m merit_ds.training.universal {folder}"


@dataclass(frozen=True)
class SavedRun:
    """A run's recipe, and one of its complete checkpoints.

    Attributes:
        config: as run.json has it, for one process: layers are not split, activations kept.
        optimizer: the type in the run's DeepSpeed JSON.
        provenance: how the run was made: its time, git revision and versions.
    """

    folder: Path
    config: Config
    optimizer: str
    provenance: dict[str, Any]
    checkpoint: Checkpoint


def open_run(folder: Path, *, step: int | None = None, data: str | None = None) -> SavedRun:
    """Read run.json, and find the newest complete checkpoint, or that of `step`.

    Args:
        folder: the run's (`run.save`).
        data: prefix of prepared data in place of the recipe's.

    Raises:
        InputError: this is no run's folder, there is no such checkpoint, or its weights are split over files: by
            tensor parallelism, unless it is universal, or by ZeRO-3.
    """
    path = folder / "run.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        config = Config.model_validate(description["config"])
        optimizer = str(description["deepspeed"].get("optimizer", {}).get("type", "no optimizer"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name the folder that the run saved to (run.save)") from None
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a run's description as this version writes it") from None
    checkpoint = newest_complete(folder, step=step)
    manifest = checkpoint.manifest
    if manifest.zero_stage == 3:
        raise InputError(f"{checkpoint.path}: saved under ZeRO-3, which cuts the weights; take stage 0, 1 or 2")
    if not manifest.universal and manifest.setup["tensor_parallel"] > 1:
        advice = CONVERT.format(folder=folder)
        raise InputError(
            f"{checkpoint.path}: its layers are split over {manifest.setup['tensor_parallel']} ranks; {advice}"
        )
    whole = {"tensor_parallel": 1, "sequence_parallel": False, "activation_checkpointing": False}
    changed: dict[str, Any] = {"model": config.model.model_copy(update=whole)}
    if data is not None:
        changed["data"] = config.data.model_copy(update={"prefix": data})
    config = config.model_copy(update=changed)
    _check_model(config, checkpoint)
    provenance = {key: description.get(key) for key in ("time", "git", "versions")}
    return SavedRun(folder, config, optimizer, provenance, checkpoint)


def load_model(run: SavedRun, *, device: torch.device) -> torch.nn.Module:
    """The model with the checkpoint's weights, in float32; Megatron-core's groups must be there.

    The layers are Megatron-core's local ones on every device: Transformer Engine's have no second derivative. A run
    in bfloat16 or float16 gives the rounded weights that it computes with; its universal checkpoint has the float32
    master weights.

    Raises:
        InputError: the checkpoint lacks a weight of the model, or has one of another shape.
    """
    manifest = run.checkpoint.manifest
    model: torch.nn.Module = build_model(
        run.config.model, vocab_size=manifest.model["vocab_size"], dtype=torch.float32, device="cpu", seed=0
    )
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    pairs = _read_universal if manifest.universal else _read_shared
    for name, (saved, target) in pairs(run.checkpoint.path, wanted).items():
        if saved is None or saved.numel() != target.numel():
            raise InputError(f"{run.checkpoint.path}: does not hold {name} of shape {list(target.shape)}")
        target.copy_(saved.reshape(target.shape))
    return model.to(device)


Pairs = dict[str, tuple[torch.Tensor | None, torch.Tensor]]
"""By name: the saved tensor, None where there is none, and the model's, whose memory it goes to."""


def _read_shared(checkpoint: Path, wanted: dict[str, torch.Tensor]) -> Pairs:
    """From the file that every ZeRO stage below 3 writes: the weights that the forward pass uses."""
    path = checkpoint / "mp_rank_00_model_states.pt"
    saved = read(path, mmap=True)["module"]
    return {name: (saved.get(name, saved.get(_fused_name(name))), target) for name, target in wanted.items()}


def _read_universal(checkpoint: Path, wanted: dict[str, torch.Tensor]) -> Pairs:
    """From a file for each weight."""
    pairs: Pairs = {}
    for name, target in wanted.items():
        paths = [checkpoint / "zero" / other / "fp32.pt" for other in (name, _fused_name(name))]
        saved = next((read(path)["param"] for path in paths if path.exists()), None)
        pairs[name] = saved, target
    return pairs


def _fused_name(name: str) -> str:
    """What Transformer Engine's layers call it, which hold a norm in the linear layer behind it."""
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def _check_model(config: Config, checkpoint: Checkpoint) -> None:
    """run.json is the last start's; the checkpoint may be an older run's in the same folder."""
    here = json.loads(config.model.model_dump_json())
    for key, saved in checkpoint.manifest.model.items():
        if key != "vocab_size" and here.get(key) != saved:
            raise InputError(f"{checkpoint.path}: saved with {key} {saved}, but run.json says {here.get(key)}")
