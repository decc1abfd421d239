# SPDX-License-Identifier: Apache-2.0
"""GPT-2 in plain PyTorch: what the trainer's Megatron-core model is compared with.

The same shapes: pre-norm, no bias, no dropout, erf GELU, learned positions, embeddings tied to the output.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from merit_ds.training.config import ModelConfig


class Attention(nn.Module):
    """Causal self-attention, with queries, keys and values from one projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, width] to [b, s, width]."""
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [b, heads, s, head width]
        return self.out(context.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """Attention and a four times wider MLP, each on the normalised stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, width] to [b, s, width]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class PlainGPT(nn.Module):
    """GPT-2 that returns its loss.

    Args:
        shape: layers, width, heads, context and initial standard deviation.
        rows: of the embedding, the padded vocabulary.
    """

    def __init__(self, shape: ModelConfig, *, rows: int) -> None:
        super().__init__()
        width = shape.hidden_size
        self.tokens = nn.Embedding(rows, width)
        self.positions = nn.Embedding(shape.seq_length, width)
        self.layers = nn.ModuleList(Layer(width, shape.num_attention_heads) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=shape.init_std / (math.sqrt(2 * shape.num_layers) if residual else 1))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean cross entropy, a scalar, of int64 tokens and labels, each [b, s]."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
