# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint takes, from the recipe alone."""

from pathlib import Path
from typing import Any

import torch

from merit_ds.errors import InputError
from merit_ds.plan.optimizers import optimizer_of
from merit_ds.training.config import Config, padded_vocab
from merit_ds.training.deepspeed_config import model_dtype, read_deepspeed_json


def parameter_count(config: Config, *, vocab_size: int) -> int:
    """Trainable parameters of the recipe's model, as `merit_ds.training.model` builds it."""
    model = config.model
    width, ffn = model.hidden_size, model.ffn_width
    rows = padded_vocab(vocab_size, multiple=model.vocab_multiple)
    head = width // model.num_attention_heads
    layer = 4 * width**2 + (3 if model.activation == "swiglu" else 2) * width * ffn + 2 * width
    layer += 2 * head if model.qk_norm else 0
    positions = model.seq_length * width if model.positions == "learned" else 0
    return rows * width * (1 if model.tied_embeddings else 2) + positions + model.num_layers * layer + width


def checkpoint_bytes(config: Config, *, vocab_size: int) -> int:
    """About what one checkpoint takes: the weights, and in float32 the master weights and the optimizer's moments."""
    ds_config = read_deepspeed_json(Path(config.run.deepspeed))
    states = 1 + _moments(ds_config)
    return parameter_count(config, vocab_size=vocab_size) * (
        model_dtype(ds_config).itemsize + states * torch.float32.itemsize
    )


def _moments(ds_config: dict[str, Any]) -> int:
    """Of the JSON's optimizer; Adam's two for one that the plan does not know."""
    try:
        return optimizer_of(ds_config).moments
    except InputError:
        return 2


def gigabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
