# SPDX-License-Identifier: Apache-2.0
"""The model against an independent GPT-2, and what the trainer relies on."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from alone import megatron_alone
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from merit_ds.errors import InputError
from merit_ds.training.config import ModelConfig, padded_vocab
from merit_ds.training.model import build_model, initialise_megatron, masked_mean
from merit_ds.training.transformers_names import transformers_weights

LAYERS, HIDDEN, HEADS, CONTEXT, VOCAB, ROWS = 3, 64, 4, 24, 200, 256


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> Iterator[None]:
    with megatron_alone():
        yield


def small(*, dtype: torch.dtype = torch.float32, seed: int = 1, checkpointing: bool = False):
    shape = ModelConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        seq_length=CONTEXT,
        activation_checkpointing=checkpointing,
    )
    return build_model(shape, vocab_size=VOCAB, dtype=dtype, device="cpu", seed=seed)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and labels, each [2, CONTEXT]."""
    drawn = torch.randint(0, VOCAB, (2, CONTEXT + 1), generator=torch.Generator().manual_seed(3))
    return drawn[:, :-1], torch.arange(CONTEXT).expand(2, -1), drawn[:, 1:]


def randomise(model) -> None:
    """Weights far from their initial values, so that attention is not uniform and no norm weight is one."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


def gpt2_with_weights_of(model) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the same weights; its biases are zero."""
    config = GPT2Config(
        vocab_size=ROWS,
        n_positions=CONTEXT,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu",
        attn_implementation="eager",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    shape = ModelConfig(num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, seq_length=CONTEXT)
    theirs = transformers_weights(shape, dict(model.named_parameters()))
    gpt2 = GPT2LMHeadModel(config).to(next(iter(theirs.values())).dtype)
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            parameter.copy_(theirs[name]) if name in theirs else parameter.zero_()
    assert set(theirs) == {name for name, p in gpt2.named_parameters() if not name.endswith("bias")}
    return gpt2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_logits_and_loss_are_those_of_an_independent_gpt2(dtype: torch.dtype) -> None:
    """Both compute the same sums in another order: 5 roundings of the largest logit were seen, 16 are allowed."""
    model = small(dtype=dtype)
    randomise(model)
    tokens, positions, labels = batch()
    with torch.no_grad():
        expected = gpt2_with_weights_of(model)(tokens).logits
        logits = model(tokens, positions, None)
        losses = model(tokens, positions, None, labels=labels)
    bound = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
    assert logits.shape == (2, CONTEXT, ROWS)
    assert (logits - expected).abs().max().item() <= bound
    # Over all rows, the padded ones too: they take part in the softmax. The loss is float32 whatever the model is.
    reference = cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, reference.float(), rtol=1e-5, atol=1e-5)


def test_initial_weights_are_gpt2s() -> None:
    """N(0, 0.02), the two residual outputs of a layer divided by sqrt(2 layers); norms one and zero."""
    for name, parameter in small().named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
            continue
        residual_output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.02 / (2 * LAYERS) ** 0.5 if residual_output else 0.02
        # The relative error of a sample's deviation is 1 / sqrt(2 n); five of them.
        assert parameter.std().item() == pytest.approx(expected, rel=5 / (2 * parameter.numel()) ** 0.5), name
        assert parameter.mean().abs().item() < 5 * expected / parameter.numel() ** 0.5, name


def test_only_the_norms_biases_are_frozen() -> None:
    model = small()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert len(frozen) == 2 * LAYERS + 1
    assert all("layernorm" in name for name in frozen)


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = small(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again, other = small(seed=1).state_dict(), small(seed=2).state_dict()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again[name]), name
        if parameter.dim() == 2:
            assert not torch.equal(parameter, other[name]), name


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(50257, 128, 50304), (256, 128, 256), (257, 128, 384)])
def test_padded_vocab(vocab: int, multiple: int, rows: int) -> None:
    assert padded_vocab(vocab, multiple=multiple) == rows


def test_bfloat16_trains_on_a_cpu() -> None:
    model, exact = small(dtype=torch.bfloat16), small()
    tokens, positions, labels = batch()
    mask = torch.ones_like(labels, dtype=torch.float32)
    loss = masked_mean(model(tokens, positions, None, labels=labels), mask)
    loss.backward()
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits: the loss of an untrained model moves in its third digit.
    assert loss.item() == pytest.approx(exact(tokens, positions, None, labels=labels).mean().item(), rel=1e-2)
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or parameter.grad.abs().max() > 0


def test_masked_mean_counts_only_what_the_mask_keeps() -> None:
    losses = torch.tensor([[1.0, 2.0], [4.0, 100.0]])
    assert masked_mean(losses, torch.tensor([[1.0, 0.0], [1.0, 0.0]])).item() == 2.5


@contextmanager
def count_saved_bytes() -> Iterator[list[int]]:
    """The bytes of each tensor that autograd saves; recomputation's own are counted as they come."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointing_recomputes_and_changes_no_bit(dtype: torch.dtype) -> None:
    results = []
    for checkpointing in (False, True):
        model = small(dtype=dtype, checkpointing=checkpointing)
        calls: list[int] = []
        model.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        tokens, positions, labels = batch()
        with count_saved_bytes() as saved:
            loss = model(tokens, positions, None, labels=labels).mean()
        kept = sum(saved)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((loss, gradients, kept, len(calls)))
    (loss, gradients, kept, calls), (loss_again, gradients_again, kept_again, calls_again) = results
    assert (calls, calls_again) == (1, 2)
    assert kept_again < kept / 2
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


def test_a_split_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="tensor-parallel size of 2 does not divide the 1 ranks"):
        initialise_megatron(seed=1, device=torch.device("cpu"), tensor_parallel=2)
