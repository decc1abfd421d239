# SPDX-License-Identifier: Apache-2.0
"""The layers of the model: Megatron-core's specs, with what it lacks for machines without a GPU.

They are Transformer Engine's where it is installed and the model goes to a GPU, Megatron-core's local ones elsewhere.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import checkpoint

from merit_ds.training.attention import CausalAttention
from merit_ds.training.config import ModelConfig

NORMALIZATION = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
"""Megatron-core's names for `model.norm`."""


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm with the constructor of a Megatron-core norm.

    Megatron-core's own wrapper of it refuses sequence parallelism, because the gradients need a sum over ranks: the
    attribute says so, to `sum_partial_gradients`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        _mark_sequence_parallel(self, config)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMS norm in the same way."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        _mark_sequence_parallel(self, config)


class CpuRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Megatron-core's rotary embedding for machines without a GPU: its own moves its frequencies to CUDA."""

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles [max_seq_len, 1, 1, head width], float32; the second half of a head repeats the first."""
        angles = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class RecomputedLayer(TransformerLayer):  # type: ignore[misc]
    """A layer that keeps only its input and runs again in the backward pass.

    For machines without a GPU, where Megatron-core's recomputation fails: it saves CUDA's random state.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and results as `TransformerLayer.forward`."""
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


def block_spec(model: ModelConfig, *, device: torch.device) -> Any:
    """The layers of a model for a device, as `GPTModel` takes them."""
    if device.type == "cuda" and HAVE_TE:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm)
    layer = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization=NORMALIZATION[model.norm])
    # Megatron-core would take apex's or Transformer Engine's norms where installed, which need a GPU, and else one that
    # refuses sequence parallelism.
    norm = LayerNorm if model.norm == "layernorm" else RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    if device.type != "cuda" and model.activation_checkpointing:
        layer.module = RecomputedLayer
    return TransformerBlockSubmodules(layer_specs=[layer] * model.num_layers, layer_norm=norm)


def _mark_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
