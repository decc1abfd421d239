# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint takes, from the recipe alone."""

from pathlib import Path

import torch

from merit_ds.training.config import Config
from merit_ds.training.deepspeed_config import model_dtype, read_deepspeed_json


def parameter_count(config: Config, *, vocab_size: int) -> int:
    """Trainable parameters of the recipe's model, as `merit_ds.training.model` builds it."""
    model = config.model
    width, ffn = model.hidden_size, model.ffn_width
    rows = -(-vocab_size // model.vocab_multiple) * model.vocab_multiple
    head = width // model.num_attention_heads
    layer = 4 * width**2 + (3 if model.activation == "swiglu" else 2) * width * ffn + 2 * width
    layer += 2 * head if model.qk_norm else 0
    positions = model.seq_length * width if model.positions == "learned" else 0
    return rows * width * (1 if model.tied_embeddings else 2) + positions + model.num_layers * layer + width


def checkpoint_bytes(config: Config, *, vocab_size: int) -> int:
    """About what one checkpoint takes: the weights, and in float32 the master weights and both moments."""
    weight = model_dtype(read_deepspeed_json(Path(config.run.deepspeed))).itemsize
    return parameter_count(config, vocab_size=vocab_size) * (weight + 3 * torch.float32.itemsize)


def gigabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
