# SPDX-License-Identifier: Apache-2.0
"""The attention's logits and entropy, from the queries and keys of one forward pass.

Source: figures 2, 11 and 14 of arXiv 2508.20577 show the largest logit by layer and step; why it matters, and the
entropy beside it: arXiv 2309.14322, arXiv 2303.06296.
"""

import torch
from torch import Tensor, nn

from merit_ds.errors import UnsupportedError
from merit_ds.telemetry.reduction import Reduction, Result

_SCORES = 2**22
"""Logits held at a time, 16 MiB."""
_QUERIES = 128
"""Queries of a block: a smaller one computes fewer logits behind the causal mask, in more operations."""


class AttentionWatch:
    """Looks at the core attention of every layer in the next forward pass.

    Its hooks go with the end of that pass, so the recomputation of activations in the backward pass meets none.

    Args:
        model: with modules `...self_attention.core_attention`, in the order of the layers, that are called with the
            query [s, b, np, hn] and the key [s, b, ng, hn] first, as Megatron-core's are.

    Raises:
        UnsupportedError: it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: list[Tensor] = []
        named = model.named_modules()
        layers = [module for name, module in named if name.endswith("self_attention.core_attention")]
        if not layers:
            raise UnsupportedError("no module self_attention.core_attention: leave attention out of telemetry.values")
        self._hooks = [layer.register_forward_pre_hook(self._look) for layer in layers]
        self._hooks.append(model.register_forward_hook(lambda *_: self._remove(), always_call=True))

    def add_to(self, reduction: Reduction) -> None:
        """Have what the forward pass showed reduced over the ranks."""
        found = torch.stack(self._found)
        self._largest: Result = reduction.maximum(found[:, 0])
        self._entropy: Result = reduction.sum(found[:, 1:])

    def values(self) -> dict[str, list[float]]:
        """`max_attention_logit` and `attention_entropy` by layer, once the reduction has run."""
        total, queries = self._entropy().unbind(1)
        return {"max_attention_logit": self._largest().tolist(), "attention_entropy": (total / queries).tolist()}

    def _look(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        query, key, *_ = arguments
        self._found.append(logits_and_entropy(query, key, scale=_scale(module, query.size(-1))))

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


@torch.no_grad()
def logits_and_entropy(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """The largest logit of causal attention, and the entropy of its weights.

    A query's entropy is -sum_j p_j ln p_j over p = softmax of its logits: 0 where it attends to one key alone,
    ln(i + 1) where it attends to all keys of position i alike.

    Args:
        query: [s, b, np, hn].
        key: [s, b, ng, hn]; ng divides np, and neighbouring heads share a key.
        scale: of the logits.

    Returns:
        [3] float64: the largest logit, the sum of the entropies of all queries and heads, and their number.
    """
    length, width = query.size(0), query.size(-1)
    repeats = query.size(2) // key.size(2)
    queries = query.permute(1, 2, 0, 3).reshape(-1, repeats, length, width)  # [b * ng, repeats, s, hn]
    keys = key.permute(1, 2, 0, 3).reshape(-1, 1, length, width)
    largest = torch.full((), -torch.inf, dtype=torch.float64, device=query.device)
    entropy = torch.zeros((), dtype=torch.float64, device=query.device)
    future = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool, device=query.device).triu(1)
    for start in range(0, length, _QUERIES):
        stop = min(start + _QUERIES, length)
        together = max(1, _SCORES // (repeats * (stop - start) * stop))
        for part in range(0, queries.size(0), together):
            q = queries[part : part + together, :, start:stop].float() * scale
            logits = q @ keys[part : part + together, :, :stop].float().mT  # [together, repeats, stop - start, stop]
            logits[..., start:].masked_fill_(future[: stop - start, : stop - start], -torch.inf)
            largest = torch.maximum(largest, logits.amax().double())
            entropy += torch.special.entr(logits.softmax(-1)).sum(dtype=torch.float64)
    return torch.stack([largest, entropy, torch.full_like(entropy, queries.numel() // width)])


def _scale(module: nn.Module, head_width: int) -> float:
    """What a core attention multiplies its scores by; Transformer Engine's keeps that in modules of its own."""
    scales = (getattr(inner, "softmax_scale", None) for inner in module.modules())
    return float(next((scale for scale in scales if scale is not None), head_width**-0.5))
