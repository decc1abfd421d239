# SPDX-License-Identifier: Apache-2.0
"""The attention's logits and entropy, from the queries and keys of one forward pass.

Source: figures 2, 11 and 14 of arXiv 2508.20577 show the largest logit by layer and step; why it matters, and the
entropy beside it: arXiv 2309.14322, arXiv 2303.06296.
"""

from collections.abc import Collection, Iterator

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
        wanted: names of values; others than those in OF_ATTENTION are left alone.

    Raises:
        UnsupportedError: it has none.
    """

    def __init__(self, model: nn.Module, wanted: Collection[str]) -> None:
        self._wanted = wanted
        self._found: list[dict[str, Tensor]] = []
        named = model.named_modules()
        layers = [module for name, module in named if name.endswith("self_attention.core_attention")]
        if not layers:
            raise UnsupportedError("no module self_attention.core_attention: leave attention out of telemetry.values")
        self._hooks = [layer.register_forward_pre_hook(self._look) for layer in layers]
        self._hooks.append(model.register_forward_hook(lambda *_: self._remove(), always_call=True))

    def add_to(self, reduction: Reduction) -> None:
        """Have what the forward pass showed reduced over the ranks."""
        add = {"max_attention_logit": reduction.maximum, "attention_entropy": reduction.sum}
        self._reduced: dict[str, Result] = {
            value: add[value](torch.stack([layer[value] for layer in self._found])) for value in self._found[0]
        }

    def values(self) -> dict[str, list[float]]:
        """`max_attention_logit` and `attention_entropy` by layer, as far as wanted, once the reduction has run."""
        found = {value: result() for value, result in self._reduced.items()}
        if "attention_entropy" in found:
            total, queries = found["attention_entropy"].unbind(1)
            found["attention_entropy"] = total / queries
        return {value: by_layer.tolist() for value, by_layer in found.items()}

    def _look(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        query, key, *_ = arguments
        self._found.append(attention_values(query, key, self._wanted, scale=_scale(module, query.size(-1))))

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


@torch.no_grad()
def attention_values(query: Tensor, key: Tensor, wanted: Collection[str], *, scale: float) -> dict[str, Tensor]:
    """The largest logit of causal attention, and the entropy of its weights, as far as wanted.

    A query's entropy is -sum_j p_j ln p_j over p = softmax of its logits: 0 where it attends to one key alone,
    ln(i + 1) where it attends to all keys of position i alike. It costs more than the logits do.

    Args:
        query: [s, b, np, hn].
        key: [s, b, ng, hn]; ng divides np, and neighbouring heads share a key.
        wanted: names of values; others than these two are left alone.
        scale: of the logits.

    Returns:
        In float64, `max_attention_logit`, a scalar, and `attention_entropy` [2]: the sum of the entropies of all
        queries and heads, and their number.
    """
    values: dict[str, Tensor] = {}
    if "max_attention_logit" in wanted:
        values["max_attention_logit"] = torch.full((), -torch.inf, dtype=torch.float64, device=query.device)
    if "attention_entropy" in wanted:
        number = query.numel() // query.size(-1)
        values["attention_entropy"] = torch.tensor([0.0, number], dtype=torch.float64, device=query.device)
    for logits in _logits(query, key, scale=scale):
        if "max_attention_logit" in values:
            values["max_attention_logit"] = torch.maximum(values["max_attention_logit"], logits.amax().double())
        if "attention_entropy" in values:
            values["attention_entropy"][0] += torch.special.entr(logits.softmax(-1)).sum(dtype=torch.float64)
    return values


def _logits(query: Tensor, key: Tensor, *, scale: float) -> Iterator[Tensor]:
    """The logits [b * ng, np / ng, s, s] in parts, which lack keys behind all of their queries; others are -inf."""
    length, width = query.size(0), query.size(-1)
    repeats = query.size(2) // key.size(2)
    queries = query.permute(1, 2, 0, 3).reshape(-1, repeats, length, width)  # [b * ng, repeats, s, hn]
    keys = key.permute(1, 2, 0, 3).reshape(-1, 1, length, width)
    future = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool, device=query.device).triu(1)
    for start in range(0, length, _QUERIES):
        stop = min(start + _QUERIES, length)
        together = max(1, _SCORES // (repeats * (stop - start) * stop))
        for part in range(0, queries.size(0), together):
            q = queries[part : part + together, :, start:stop].float() * scale
            logits = q @ keys[part : part + together, :, :stop].float().mT  # [together, repeats, stop - start, stop]
            logits[..., start:].masked_fill_(future[: stop - start, : stop - start], -torch.inf)
            yield logits


def _scale(module: nn.Module, head_width: int) -> float:
    """What a core attention multiplies its scores by; Transformer Engine's keeps that in modules of its own."""
    scales = (getattr(inner, "softmax_scale", None) for inner in module.modules())
    return float(next((scale for scale in scales if scale is not None), head_width**-0.5))
