# SPDX-License-Identifier: Apache-2.0
"""Llama-style models and QK-Norm against formulas in plain PyTorch, and against transformers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from alone import megatron_alone
from plain_gpt import plain_logits
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from merit_ds.training.config import ModelConfig
from merit_ds.training.model import build_model
from merit_ds.training.report import flops_per_sequence
from merit_ds.training.sample import sample_text
from merit_ds.training.tokenizer import build_tokenizer
from merit_ds.training.transformers_names import transformers_weights

LAYERS, HIDDEN, HEADS, CONTEXT, VOCAB, ROWS = 2, 48, 4, 20, 200, 256
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "ffn_hidden_size": 72}
UNTIED, QK = {"tied_embeddings": False}, {"qk_norm": True}
SHAPES = {
    "gpt2": {},
    "gpt2-qk": QK,
    "gpt2-wide": {"ffn_hidden_size": 56},
    "llama": LLAMA,
    "llama-untied": LLAMA | UNTIED,
    "llama-qk": LLAMA | QK,
    "rotary": {"positions": "rotary"},
}


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> Iterator[None]:
    with megatron_alone():
        yield


def shape_of(**settings: Any) -> ModelConfig:
    sizes = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "seq_length": CONTEXT}
    return ModelConfig(**sizes, **settings)


def build(shape: ModelConfig, dtype: torch.dtype = torch.float32):
    return build_model(shape, vocab_size=VOCAB, dtype=dtype, device="cpu", seed=1)


def far_from_initial(shape: ModelConfig, dtype: torch.dtype):
    """A model whose attention is not uniform and whose norms' weights are not one."""
    model = build(shape, dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = torch.randint(0, VOCAB, (2, CONTEXT + 1), generator=torch.Generator().manual_seed(3))
    return drawn[:, :-1], torch.arange(CONTEXT).expand(2, -1), drawn[:, 1:]


def loss_and_gradients(logits: torch.Tensor, labels: torch.Tensor, weights: dict[str, torch.Tensor]):
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss, dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def assert_close(found: torch.Tensor, expected: torch.Tensor, *, roundings: float, dtype: torch.dtype) -> None:
    """To so many roundings of the largest value."""
    assert found.shape == expected.shape
    bound = roundings * torch.finfo(dtype).eps * expected.abs().max().item()
    assert (found - expected).abs().max().item() <= bound


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_are_those_of_the_formulas(name: str) -> None:
    """In float64. Rotary angles are float32 in Megatron-core, so there the bound is float32's."""
    shape = shape_of(**SHAPES[name])
    model = far_from_initial(shape, torch.float64)
    tokens, positions, labels = batch()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = plain_logits(shape, weights, tokens)
    found = model(tokens, positions, None)
    rounding = torch.float32 if shape.positions == "rotary" else torch.float64
    assert_close(found, expected, roundings=64, dtype=rounding)
    loss, gradients = loss_and_gradients(found, labels, weights)
    expected_loss, expected_gradients = loss_and_gradients(expected, labels, weights)
    assert_close(loss, expected_loss, roundings=64, dtype=rounding)
    for parameter, gradient in expected_gradients.items():
        assert_close(gradients[parameter], gradient, roundings=256, dtype=rounding)


def theirs(shape: ModelConfig):
    """transformers' Llama, or its Qwen3, which is a Llama with QK-Norm."""
    settings = {
        "vocab_size": ROWS,
        "hidden_size": HIDDEN,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_bias": False,
        "attn_implementation": "eager",
    }
    return Qwen3ForCausalLM(Qwen3Config(**settings)) if shape.qk_norm else LlamaForCausalLM(LlamaConfig(**settings))


@pytest.mark.parametrize("name", ["llama", "llama-untied", "llama-qk"])
def test_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    shape = shape_of(**SHAPES[name])
    model, reference = far_from_initial(shape, torch.float32), theirs(shape_of(**SHAPES[name]))
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    copied = transformers_weights(shape, {n: p.detach() for n, p in weights.items()})
    parameters = dict(reference.named_parameters())
    assert parameters.keys() == copied.keys()
    with torch.no_grad():
        for parameter, value in copied.items():
            parameters[parameter].copy_(value)
    tokens, positions, labels = batch()
    found, expected = model(tokens, positions, None), reference(tokens).logits
    assert_close(found, expected, roundings=64, dtype=torch.float32)
    loss, gradients = loss_and_gradients(found, labels, weights)
    expected_loss, expected_gradients = loss_and_gradients(expected, labels, parameters)
    assert_close(loss, expected_loss, roundings=64, dtype=torch.float32)
    for parameter, gradient in transformers_weights(shape, gradients).items():
        assert_close(gradient, expected_gradients[parameter], roundings=256, dtype=torch.float32)


@pytest.mark.parametrize("name", SHAPES)
def test_initial_weights_norms_and_what_is_frozen(name: str) -> None:
    shape = shape_of(**SHAPES[name])
    for parameter, value in build(shape).named_parameters():
        frozen = parameter.endswith("bias")
        assert value.requires_grad != frozen
        assert not frozen or (shape.norm == "layernorm" and not value.any())
        if value.dim() == 1:
            assert frozen or torch.equal(value, torch.ones_like(value)), parameter
            continue
        residual_output = parameter.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.02 / (2 * LAYERS) ** 0.5 if residual_output else 0.02
        assert value.std().item() == pytest.approx(expected, rel=5 / (2 * value.numel()) ** 0.5), parameter


@pytest.mark.parametrize("name", SHAPES)
def test_flops_follow_from_the_parameters(name: str) -> None:
    """6 for each token and weight that multiplies something, and 12 s^2 h in each layer for attention."""
    shape = shape_of(**SHAPES[name])
    multiplied = {
        parameter: value.numel()
        for parameter, value in build(shape).named_parameters()
        if value.dim() == 2 and not parameter.startswith("embedding.")
    }
    multiplied["output_layer.weight"] = ROWS * HIDDEN
    attention = 12 * CONTEXT**2 * HIDDEN * LAYERS
    expected = 6 * CONTEXT * sum(multiplied.values()) + attention
    assert flops_per_sequence(shape, vocab_rows=ROWS) == expected


@pytest.mark.parametrize("name", ["llama", "llama-qk"])
def test_recomputation_changes_no_bit(name: str) -> None:
    tokens, positions, labels = batch()
    results = []
    for recompute in (False, True):
        model = far_from_initial(shape_of(**SHAPES[name], activation_checkpointing=recompute), torch.float32)
        loss = model(tokens, positions, None, labels=labels).mean()
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (again, gradients_again) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients_again[name], gradient) for name, gradient in gradients.items())


def test_text_can_be_drawn_from_a_rotary_model() -> None:
    """Longer than the context: the oldest tokens drop out, and positions begin anew."""
    model = build_model(shape_of(**LLAMA), vocab_size=256, dtype=torch.float32, device="cpu", seed=1)
    settings = {"prompt": "odd", "tokens": 2 * CONTEXT, "seq_length": CONTEXT, "device": torch.device("cpu")}
    text = sample_text(model, build_tokenizer("byte"), **settings)
    assert text.startswith("odd") and len(text) > 3
    assert sample_text(model, build_tokenizer("byte"), **settings) == text


def test_bfloat16_trains() -> None:
    tokens, positions, labels = batch()
    shape = shape_of(**LLAMA | QK)
    model, exact = build(shape, torch.bfloat16), build(shape)
    loss = model(tokens, positions, None, labels=labels).mean()
    loss.backward()
    assert loss.item() == pytest.approx(exact(tokens, positions, None, labels=labels).mean().item(), rel=1e-2)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_settings_that_a_checkpoint_fits() -> None:
    """Those of older checkpoints are still the same for the same model; every change of the weights shows."""
    sizes = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "seq_length": CONTEXT}
    first = sizes | {"vocab_multiple": 128, "init_std": 0.02}
    assert shape_of().identity() == first
    assert shape_of(ffn_hidden_size=4 * HIDDEN, activation_checkpointing=True, tensor_parallel=2).identity() == first
    changes = [LLAMA, QK, UNTIED, *({key: value} for key, value in LLAMA.items())]
    for change in changes:
        assert shape_of(**change).identity() == first | change
