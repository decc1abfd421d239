# SPDX-License-Identifier: Apache-2.0
"""The core attention against the formula, and its refusals."""

from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from merit_ds.errors import UnsupportedError
from merit_ds.training.attention import CausalAttention

SEQUENCE, BATCH, HEADS, WIDTH = 7, 2, 4, 8


def config(**settings: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=HEADS, attention_dropout=0.0, **settings)


def attention(*, mask: AttnMaskType = AttnMaskType.causal, scale: float | None = None, **settings: Any):
    return CausalAttention(config(**settings), 1, mask, "self", softmax_scale=scale)


def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float) -> torch.Tensor:
    """softmax(q k^T) v, one position at a time over the positions up to it."""
    repeats = query.size(2) // key.size(2)
    key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    rows = []
    for position in range(query.size(0)):
        scores = torch.einsum("bnh,tbnh->bnt", query[position], key[: position + 1]) * scale
        rows.append(torch.einsum("bnt,tbnh->bnh", scores.softmax(-1), value[: position + 1]).flatten(1))
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_is_causal_attention(groups: int, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(SEQUENCE, BATCH, heads, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, groups, groups)
    )
    context = attention(scale=scale)(query, key, value, None)
    assert context.shape == (SEQUENCE, BATCH, HEADS * WIDTH)
    expected = formula(query, key, value, scale=WIDTH**-0.5 if scale is None else scale)
    torch.testing.assert_close(context, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": AttnMaskType.padding}, "attn_mask_type"),
        ({"window_size": (4, 0)}, "window_size"),
        ({"softmax_type": "learnable"}, "softmax_type"),
        ({"apply_query_key_layer_scaling": True}, "apply_query_key_layer_scaling"),
        ({"context_parallel_size": 2}, "context_parallel_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_would_leave_out_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        attention(**settings)


def test_dropout_and_cross_attention_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"attention_dropout 0\.1"):
        CausalAttention(config(), 1, AttnMaskType.causal, "self", attention_dropout=0.1)
    with pytest.raises(UnsupportedError, match="attention_type 'cross'"):
        CausalAttention(config(), 1, AttnMaskType.causal, "cross")


def test_masks_and_earlier_keys_are_refused() -> None:
    """torch's causal mask starts at the first key: with a cache of 6 keys, query 1 of 1 would see only key 1."""
    module, tensor = attention(), torch.zeros(SEQUENCE, BATCH, HEADS, WIDTH)
    with pytest.raises(UnsupportedError, match="attention_mask"):
        module(tensor, tensor, tensor, torch.ones(1, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="attn_mask_type"):
        module(tensor, tensor, tensor, None, attn_mask_type=AttnMaskType.no_mask)
    with pytest.raises(UnsupportedError, match="7 keys for 1 queries"):
        module(tensor[:1], tensor, tensor, None)
