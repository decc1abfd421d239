# SPDX-License-Identifier: Apache-2.0
"""Core attention for Megatron-core's layer specs over `torch.nn.functional.scaled_dot_product_attention`.

Megatron-core's own `DotProductAttention` takes its dropout's random state from CUDA, so it cannot run on a CPU, and
it writes the full score matrix. This module runs on every device and leaves the choice of the kernel to torch.
"""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType

from merit_ds.errors import UnsupportedError


class CausalAttention(torch.nn.Module):
    """Causal self-attention with the constructor and the forward of a Megatron-core `core_attention`.

    Args:
        config: Megatron-core's `TransformerConfig`.
        layer_number: not used; each layer is alike.
        attn_mask_type: must be causal.
        attention_type: must be "self".
        attention_dropout: must be zero; None takes the config's.
        softmax_scale: what the scores are multiplied by; None means 1 / sqrt(head width).
        cp_comm_type, pg_collection: not used; heads are split by the projections before and after.

    Raises:
        UnsupportedError: the config asks for something that this module would silently leave out.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        refused = {
            f"attn_mask_type {attn_mask_type}": attn_mask_type != AttnMaskType.causal,
            f"attention_type {attention_type!r}": attention_type != "self",
            f"attention_dropout {dropout}": dropout != 0,
            f"context_parallel_size {config.context_parallel_size}": config.context_parallel_size > 1,
            f"window_size {config.window_size}": config.window_size is not None,
            f"softmax_type {config.softmax_type!r}": config.softmax_type != "vanilla",
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        }
        _refuse(refused)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend each position to itself and to those before it.

        Args:
            query: [s, b, np, hn]: sequence, batch, heads of this rank, head width.
            key, value: [s, b, ng, hn] with ng query groups of this rank; ng divides np.
            attention_mask, attention_bias, packed_seq_params: must be None.
            attn_mask_type: causal, or None for the constructor's.

        Returns:
            [s, b, np * hn] in the dtype of `query`.

        Raises:
            UnsupportedError: a mask, a bias, packed sequences, or keys of another length than the queries.
        """
        refused = {
            "attention_mask": attention_mask is not None,
            "attention_bias": attention_bias is not None,
            "packed_seq_params": packed_seq_params is not None,
            f"attn_mask_type {attn_mask_type}": attn_mask_type not in (None, AttnMaskType.causal),
            # torch aligns its causal mask with the first key; a cache of earlier keys would be masked wrongly.
            f"{key.size(0)} keys for {query.size(0)} queries": key.size(0) != query.size(0),
        }
        _refuse(refused)
        grouped = key.size(2) != query.size(2)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, np, s, hn]
        if query.device.type == "cpu":
            # torch's CPU kernel takes a fifth longer on Megatron-core's strides: measured with 4 heads of 32, s 256.
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def _refuse(refused: dict[str, bool]) -> None:
    for what, present in refused.items():
        if present:
            raise UnsupportedError(f"CausalAttention does not support {what}: it is plain causal self-attention")
