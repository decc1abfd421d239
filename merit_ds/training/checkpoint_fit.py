# SPDX-License-Identifier: Apache-2.0
"""Whether a run can take a checkpoint: what its manifest says against the engine and the model."""

import json
from typing import Any

import torch.distributed as dist

from merit_ds.errors import InputError
from merit_ds.training.checkpoint_folder import Checkpoint
from merit_ds.training.manifest import Manifest

RESHARDED = ("ranks", "tensor_parallel")
"""Entries of a manifest's set-up in which a universal checkpoint may differ from the run."""
CONVERT = "convert it by python -m merit_ds.training.universal {folder}, or start as many as before"
ADVICE = {
    "ranks": CONVERT,
    "tensor_parallel": CONVERT,
    "precision": "set bf16 and fp16 in the DeepSpeed JSON as they were",
    "optimizer": "set optimizer.type in the DeepSpeed JSON as it was",
    "wrapper": "set zero_optimization.stage (1 and 2 may be exchanged) and grad_accum_dtype as they were",
    "scheduler": "keep scheduler in the DeepSpeed JSON, or out of it, as it was",
}
"""What to do where a run's set-up is not the checkpoint's."""


def setup_of(engine: Any) -> dict[str, Any]:
    """What decides the layout and content of an engine's checkpoints: `Manifest.setup`."""
    return {
        "ranks": dist.get_world_size(),
        "tensor_parallel": int(engine.mp_world_size),
        "precision": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        "optimizer": type(engine.basic_optimizer).__name__,
        "wrapper": type(engine.optimizer).__name__,
        "scheduler": engine.lr_scheduler is not None,
    }


def fits_ranks(saved: Manifest, setup: dict[str, Any]) -> bool:
    """Whether this number of ranks can load it as it is."""
    return saved.universal or saved.zero_stage == 0 or all(saved.setup[key] == setup[key] for key in RESHARDED)


def check_fit(checkpoint: Checkpoint, engine: Any, model: dict[str, Any]) -> None:
    """Compare what DeepSpeed would find out half-way through loading, or never.

    Raises:
        InputError: names both values and the key to change.
    """
    saved, setup = checkpoint.manifest, setup_of(engine)
    free = set(RESHARDED) if saved.universal else {"ranks"} if saved.zero_stage == 0 else set()
    # Through JSON and back, as the saved ones went: a tuple comes back as a list.
    for there, here in ((saved.model, model), (saved.setup, setup)):
        here = json.loads(json.dumps(here))
        for key in [*there, *(key for key in here if key not in there)]:
            if key not in free and there.get(key) != here.get(key):
                advice = ADVICE.get(key, "use the recipe that it was saved with").format(folder=checkpoint.path.parent)
                raise InputError(
                    f"{checkpoint.path}: saved with {key} {there.get(key)}, this run has {here.get(key)}; {advice}"
                )
