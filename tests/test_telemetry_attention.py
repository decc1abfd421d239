# SPDX-License-Identifier: Apache-2.0
"""Attention logits and entropy against an explicit softmax, and the hooks that see each layer once."""

import math
from typing import Any

import pytest
import torch
from alone import megatron_alone
from torch import nn

from merit_ds.errors import UnsupportedError
from merit_ds.telemetry import attention
from merit_ds.telemetry.attention import AttentionWatch, attention_values
from merit_ds.telemetry.reduction import Reduction
from merit_ds.telemetry.values import OF_ATTENTION
from merit_ds.training.config import ModelConfig
from merit_ds.training.model import build_model

CPU = torch.device("cpu")
WIDTH = 8


def measured(query: torch.Tensor, key: torch.Tensor, *, scale: float) -> list[float]:
    """The largest logit, the sum of the entropies, their number."""
    found = attention_values(query, key, OF_ATTENTION, scale=scale)
    return [float(found["max_attention_logit"]), *found["attention_entropy"].tolist()]


def explicit(query: torch.Tensor, key: torch.Tensor, *, scale: float) -> tuple[float, float, int]:
    """Query by query and head by head: the largest logit, the sum of the entropies, their number."""
    largest, entropy, number = -math.inf, 0.0, 0
    for position in range(query.size(0)):
        for batch in range(query.size(1)):
            for head in range(query.size(2)):
                group = head * key.size(2) // query.size(2)
                logits = [
                    scale * float(query[position, batch, head].double() @ key[earlier, batch, group].double())
                    for earlier in range(position + 1)
                ]
                weights = [math.exp(logit - max(logits)) for logit in logits]
                shares = [weight / sum(weights) for weight in weights]
                largest = max(largest, *logits)
                entropy -= sum(share * math.log(share) for share in shares if share)
                number += 1
    return largest, entropy, number


@pytest.mark.parametrize("scores", [attention._SCORES, 300], ids=["whole", "in parts"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_logits_and_entropy_are_those_of_the_softmax(monkeypatch, scores: int, groups: int) -> None:
    """Of 21 positions, in blocks of 8."""
    monkeypatch.setattr(attention, "_SCORES", scores)
    monkeypatch.setattr(attention, "_QUERIES", 8)
    generator = torch.Generator().manual_seed(groups)
    query = 2 * torch.randn(21, 3, 4, WIDTH, generator=generator)
    key = torch.randn(21, 3, groups, WIDTH, generator=generator)
    assert measured(query, key, scale=0.6) == pytest.approx(explicit(query, key, scale=0.6), rel=1e-5)


def test_a_key_of_the_future_does_not_count() -> None:
    query, key = torch.ones(5, 1, 1, WIDTH), torch.zeros(5, 1, 1, WIDTH)
    key[4] = 1
    assert measured(query[:4], key[:4], scale=1.0)[0] == 0
    largest, entropy, _ = measured(query, key, scale=1.0)
    assert largest == WIDTH
    # All earlier queries attend to their i + 1 keys alike, the last one hardly to any but its own.
    last = -sum(share * math.log(share) for share in torch.tensor([0.0] * 4 + [WIDTH]).double().softmax(0).tolist())
    assert entropy == pytest.approx(sum(math.log(i + 1) for i in range(4)) + last, rel=1e-6)


def test_a_nan_reaches_the_eye() -> None:
    query = torch.zeros(5, 1, 1, WIDTH)
    query[3, 0, 0, 2] = math.nan
    assert all(map(math.isnan, measured(query, torch.ones_like(query), scale=1.0)[:2]))


class _Kernel(nn.Module):
    softmax_scale = 0.25


class _Core(nn.Module):
    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.softmax_scale = scale
        self.kernel = nn.Identity()


def test_the_scale_is_the_modules_own_or_an_inner_ones_or_that_of_the_head_width() -> None:
    core = _Core(None)
    assert attention._scale(core, 16) == 0.25  # 1 / sqrt(16)
    core.kernel = _Kernel()  # as Transformer Engine keeps it
    assert attention._scale(core, 64) == 0.25
    assert attention._scale(_Core(0.7), 64) == 0.7


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_watch_sees_each_layer_in_one_forward_pass(recomputed: bool) -> None:
    """Against queries and keys that are cut out of the projection's output by hand; and not a bit changes."""
    shape = ModelConfig(
        num_layers=3, hidden_size=32, num_attention_heads=4, seq_length=16, activation_checkpointing=recomputed
    )
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    projected: list[torch.Tensor] = []

    def run(model: Any) -> list[torch.Tensor]:
        loss = model(tokens, torch.arange(16).expand(2, -1), None, labels=tokens).mean()
        model.zero_grad()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with megatron_alone():
        model = build_model(shape, vocab_size=256, dtype=torch.float32, device="cpu", seed=1)
        unwatched = run(model)
        before = hooks(model)
        watch = AttentionWatch(model, OF_ATTENTION)
        assert hooks(model) == before + 3 + 1
        watched = run(model)
        assert hooks(model) == before
        taken = [
            layer.self_attention.linear_qkv.register_forward_hook(lambda *call: projected.append(call[2][0]))
            for layer in model.decoder.layers
        ]
        with torch.no_grad():
            model(tokens, torch.arange(16).expand(2, -1), None)
        del taken
    assert all(map(torch.equal, watched, unwatched))
    reduction = Reduction(CPU)
    watch.add_to(reduction)
    reduction.run(None)
    values = watch.values()
    for index, output in enumerate(projected):
        query, key, _ = output.view(16, 2, 4, 3, WIDTH).unbind(3)
        largest, entropy, number = explicit(query, key, scale=WIDTH**-0.5)
        assert values["max_attention_logit"][index] == pytest.approx(largest, rel=1e-5)
        assert values["attention_entropy"][index] == pytest.approx(entropy / number, rel=1e-5)
    assert number == 16 * 2 * 4 and len(watch._found) == 3  # no layer twice


def test_a_model_without_such_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"leave attention out of telemetry\.values"):
        AttentionWatch(nn.Linear(2, 2), OF_ATTENTION)
