# SPDX-License-Identifier: Apache-2.0
"""Exceptions by name, and a fused QKV weight seen as three."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from ranks import run_ranks

from merit_ds import Merit, mark_parameters, split_qkv
from merit_ds.reference import merit_step
from merit_ds.training.attention import CausalAttention
from merit_ds.training.model import initialise_megatron

SETTINGS = {"lr": 0.1, "weight_decay": 0.3}


def step(model):
    """One step with random gradients; the gradients."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    Merit(model.parameters(), **SETTINGS).step()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_marks_by_pattern():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mark_parameters(model, no_weight_decay=["0.*"], no_trust_ratio=["1.weight"])
    grads = step(model)
    for name, decay in (("0.weight", 0.0), ("2.weight", 0.3), ("2.bias", 0.0)):
        wanted = before[name].clone()
        merit_step(wanted, grads[name], torch.zeros_like(wanted), torch.zeros_like(wanted), lr=0.1, weight_decay=decay)
        assert torch.equal(dict(model.named_parameters())[name], wanted)
    weight, grad = before["1.weight"], grads["1.weight"]
    m, v = grad * (1 - 0.9), grad * grad * (1 - 0.95)
    update = m / (v.double().sqrt().float() + 1e-6) + weight * 0.3
    assert torch.equal(model[1].weight, weight - update.clamp(-1, 1) * 0.1)


def test_a_pattern_without_a_match_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no parameter matches no_trust_ratio='\*\.wieght'; one is 'weight'"):
        mark_parameters(model, no_weight_decay=["weight"], no_trust_ratio=["*.wieght"])
    assert not hasattr(model.weight, "no_weight_decay")
    with pytest.raises(ValueError, match="no linear_qkv"):
        split_qkv(model)


def test_a_tied_weight_goes_by_each_of_its_names():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    mark_parameters(model, no_trust_ratio=["1.*"])
    assert model[0].weight.no_trust_ratio is True


def _grouped_queries(rank):
    """Megatron-core's own split of its fused output tells which rows are whose."""
    initialise_megatron(seed=1, device=torch.device("cpu"))
    config = TransformerConfig(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=6,
        num_query_groups=2,
        add_bias_linear=False,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    model = GPTModel(config, layer, vocab_size=128, max_sequence_length=8)
    attention = model.decoder.layers[0].self_attention
    marked = split_qkv(model)
    weight = attention.linear_qkv.weight
    x = torch.randn(8, 1, 24)
    outputs = attention.get_query_key_value_tensors(x)
    before = weight.detach().clone()
    grads = step(model)
    parallel_state.destroy_model_parallel()
    return (
        marked,
        weight.matrix_view,
        [part.flatten(2)[:, 0].detach() for part in outputs[:3]],
        x[:, 0],
        before,
        weight,
        grads,
    )


def test_fused_qkv_is_three_matrices():
    ((marked, view, parts, x, before, after, grads),) = run_ranks(1, _grouped_queries)
    assert marked == [f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in (0, 1)]
    _, query, head = view
    rows = torch.arange(len(before)).view(-1, query + 2 * head).split([query, head, head], dim=1)
    for mine, output in zip(rows, parts, strict=True):
        mine = mine.flatten()
        torch.testing.assert_close(x @ before[mine].T, output)  # these rows made Megatron-core's Q, K, V
        wanted, grad = before[mine].clone(), grads[marked[0]][mine]
        zeros = torch.zeros_like(wanted), torch.zeros_like(wanted)
        merit_step(wanted, grad, *zeros, lr=0.1, weight_decay=0.3)
        assert torch.equal(after[mine], wanted)
