# SPDX-License-Identifier: Apache-2.0
"""GPT-2 and Llama in plain PyTorch, by formulas alone, over the weights of a Megatron-core model."""

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from merit_ds.training.config import ModelConfig

EPS = 1e-5


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def rotate(x: Tensor) -> Tensor:
    """Turn element i of a head against element i + half by position * 10000^(-2i / width); x is [b, n, s, width]."""
    half = x.size(-1) // 2
    speeds = 10000.0 ** (torch.arange(half, dtype=torch.float64) * -2 / x.size(-1))
    angles = torch.arange(x.size(-2), dtype=torch.float64).unsqueeze(1) * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def plain_logits(shape: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [b, s, rows].

    Args:
        shape: of the model.
        weights: by Megatron-core's names, whole.
        tokens: [b, s] int64.
    """
    norm = layer_norm if shape.norm == "layernorm" else rms_norm
    heads, width = shape.num_attention_heads, shape.hidden_size // shape.num_attention_heads
    embedding = weights["embedding.word_embeddings.weight"]
    x = embedding[tokens]
    if shape.positions == "learned":
        x = x + weights["embedding.position_embeddings.weight"][: tokens.size(1)]
    hidden_future = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool).triu(1)
    for number in range(shape.num_layers):
        layer = {
            name.removeprefix(f"decoder.layers.{number}.").removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"decoder.layers.{number}.") and name.endswith(".weight")
        }
        qkv = norm(x, layer["input_layernorm"]) @ layer["self_attention.linear_qkv"].T
        # Megatron-core's rows are head by head [q, k, v].
        q, k, v = qkv.unflatten(-1, (heads, 3, width)).permute(3, 0, 2, 1, 4)
        if shape.qk_norm:
            q, k = norm(q, layer["self_attention.q_layernorm"]), norm(k, layer["self_attention.k_layernorm"])
        if shape.positions == "rotary":
            q, k = rotate(q), rotate(k)
        scores = (q @ k.mT / width**0.5).masked_fill(hidden_future, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ layer["self_attention.linear_proj"].T
        inner = norm(x, layer["pre_mlp_layernorm"]) @ layer["mlp.linear_fc1"].T
        if shape.activation == "swiglu":
            gate, value = inner.chunk(2, dim=-1)
            inner = silu(gate) * value
        else:
            inner = gelu(inner)
        x = x + inner @ layer["mlp.linear_fc2"].T
    output = embedding if shape.tied_embeddings else weights["output_layer.weight"]
    return norm(x, weights["decoder.final_layernorm.weight"]) @ output.T
