# SPDX-License-Identifier: Apache-2.0
"""The estimate that Sophia-G is given: against a direct computation, on ranks of all kinds, and beside ZeRO."""

import json
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
import torch
from alone import megatron_alone
from plain_gpt import plain_logits
from ranks import run_ranks
from tensor_parallel_cases import CONTEXT, Run, Split, megatron, train_runs, whole
from torch.nn.functional import cross_entropy

from merit_ds.training.config import ModelConfig, load_config
from merit_ds.training.dataset import open_datasets
from merit_ds.training.gauss_newton import draw_labels, sampled_gradients
from merit_ds.training.model import build_model
from merit_ds.training.tokenizer import build_tokenizer

SEED, VOCAB, START, STOP, MICRO = 7, 200, 3, 8, 2  # 56 rows pad the vocabulary; 5 sequences do not share out evenly
STEPS, BATCH, INTERVAL, SEQUENCES = 4, 8, 2, 5
RECIPE = f"""
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, seq_length: {CONTEXT}}}
data: {{prefix: data, tokenizer: byte}}
run: {{deepspeed: none.json, train_tokens: {STEPS * BATCH * CONTEXT}, eval_interval: 100, eval_sequences: 6,
      save_interval: 2}}
"""
DEEPSPEED = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.5,
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
}
WRAPPERS = {
    "stage0": {},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "bf16_optimizer": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}
SPLITS = (Split(), Split(2), Split(llama=True), Split(2, llama=True), Split(2, sequence=True, llama=True))
RECORDED: dict[str, list[Any]] = {"calls": []}


class HessianSGD(torch.optim.SGD):
    """SGD that takes estimates, notes them, and makes nothing of them."""

    def __init__(self, params, lr: float, hessian_interval: int, hessian_sequences: int) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group |= {"hessian_interval": hessian_interval, "hessian_sequences": hessian_sequences}

    def update_hessian(self, grads, *, examples: int) -> None:
        RECORDED["calls"].append(([grad.clone() for grad in grads], examples))


class RandomTokens:
    """Sequences that are a function of their number."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, VOCAB, (CONTEXT,), generator=torch.Generator().manual_seed(index))
        mask = torch.ones(CONTEXT)
        mask[: index % 3] = 0  # some tokens do not count
        return {"tokens": tokens, "labels": tokens, "position_ids": torch.arange(CONTEXT), "loss_mask": mask}


def build(shape: ModelConfig):
    """A model whose predictions are far from uniform."""
    model = build_model(shape, vocab_size=VOCAB, dtype=torch.float32, device="cpu", seed=1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not name.startswith("embedding.position"):
            parameter.data *= 8
    return model


def shape_of(split: Split) -> ModelConfig:
    return ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=CONTEXT, **split.settings())


def estimate(split: Split) -> tuple[dict[str, torch.Tensor], int]:
    """By parameter, put together from the tensor-parallel ranks; nothing may be left in `grad`."""
    with megatron(split.tensor):
        model = build(shape_of(split))
        arguments = {"start": START, "stop": STOP, "micro_batch": MICRO, "vocab_size": VOCAB, "seed": SEED}
        gradients, tokens = sampled_gradients(model, RandomTokens(), **arguments, device=torch.device("cpu"))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert all(p.grad is None for _, p in trained)
        return {name: whole(p, g) for (name, p), g in zip(trained, gradients, strict=True)}, tokens


def direct_estimate(split: Split) -> tuple[dict[str, torch.Tensor], int]:
    """All sequences at once, by formulas in float64."""
    shape = shape_of(split.whole())
    with megatron_alone():
        trained = {name: p.detach().double() for name, p in build(shape).named_parameters() if p.requires_grad}
    for weight in trained.values():
        weight.requires_grad_()
    samples = [RandomTokens()[number] for number in range(START, STOP)]
    logits = plain_logits(shape, trained, torch.stack([sample["tokens"] for sample in samples]))
    mask = torch.stack([sample["loss_mask"] for sample in samples])
    losses = []
    for number, own in enumerate(logits):
        bounds = own.detach()[:, :VOCAB].softmax(-1).cumsum(-1).numpy()
        drawn = np.random.default_rng([SEED, START + number]).random(CONTEXT)
        labels = [int(np.searchsorted(row, u)) for row, u in zip(bounds, drawn, strict=True)]
        losses.append(cross_entropy(own, torch.tensor(labels), reduction="none"))
    loss = (torch.stack(losses) * mask).sum() / mask.sum()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, gradients, strict=True)), int(mask.sum())


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, error: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < error * value.abs().max(), name


def on_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """Estimates at every split; and runs with and without estimates, with what the optimizer was given."""
    torch.optim.HessianSGD = HessianSGD
    runs, calls = {}, {}
    for name, changes in WRAPPERS.items():
        for kind in ("", "_estimated"):
            RECORDED["calls"] = []
            runs |= train_runs([Run(name + kind, Split(), changes, steps=STEPS)], folder)
            calls[name + kind] = RECORDED["calls"]
    return {"estimates": {split: estimate(split) for split in SPLITS}, "runs": runs, "calls": calls}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gauss_newton")
    (path / "recipe.yaml").write_text(RECIPE)
    launch.prepare_text(path)
    options = {"lr": 0.5, "hessian_interval": INTERVAL, "hessian_sequences": SEQUENCES}
    estimated = {"optimizer": {"type": "HessianSGD", "params": options}}
    for name, changes in WRAPPERS.items():
        for kind, optimizer in (("", {}), ("_estimated", estimated)):
            (path / f"{name}{kind}").mkdir()
            (path / f"{name}{kind}" / "deepspeed.json").write_text(json.dumps(DEEPSPEED | changes | optimizer))
    return path


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(2, on_ranks, folder)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_estimate_is_that_of_a_direct_computation(ranks, split):
    """On two ranks, which share the sequences or the layers; those of each rank are the same bits."""
    expected, tokens = direct_estimate(split)
    found = ranks[0]["estimates"][split]
    assert found[1] == tokens < (STOP - START) * CONTEXT
    assert_alike(found[0], expected, error=2e-5)
    other = ranks[1]["estimates"][split]
    assert all(torch.equal(other[0][name], gradient) for name, gradient in found[0].items())


def test_one_rank_gives_what_two_give(ranks):
    with megatron_alone():
        model = build(shape_of(Split()))
        before = torch.get_rng_state()
        arguments = {"start": START, "stop": STOP, "micro_batch": 3, "vocab_size": VOCAB, "seed": SEED}
        gradients, tokens = sampled_gradients(model, RandomTokens(), **arguments, device=torch.device("cpu"))
        other, _ = sampled_gradients(model, RandomTokens(), **arguments | {"seed": 8}, device=torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), before)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    expected, same_tokens = ranks[0]["estimates"][Split()]
    assert tokens == same_tokens
    assert_alike(dict(zip(names, gradients, strict=True)), expected, error=1e-5)
    assert not any(torch.equal(one, another) for one, another in zip(gradients, other, strict=True))


def test_labels_have_the_softmaxs_frequencies():
    positions, rows = 40_000, 16
    logits = torch.randn(rows, generator=torch.Generator().manual_seed(2)) * 2
    logits[3] = -torch.inf
    logits[12:] = 100.0  # these rows pad the vocabulary
    with megatron_alone():
        labels = draw_labels(logits.expand(2, positions, rows), vocab_size=12, seed=SEED, first=0)
        assert torch.equal(
            draw_labels(logits.expand(1, positions, rows), vocab_size=12, seed=SEED, first=1)[0], labels[1]
        )
    assert not torch.equal(labels[0], labels[1])
    share = labels.flatten().bincount(minlength=rows).double() / labels.numel()
    expected = torch.zeros(rows, dtype=torch.float64)
    expected[:12] = logits[:12].double().softmax(0)
    assert share[3] == 0 and share[12:].sum() == 0
    deviation = (expected * (1 - expected) / labels.numel()).sqrt()
    assert ((share - expected).abs() <= 5 * deviation).all()


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_engines_step_is_bitwise_the_same_with_estimates(folder, ranks, name):
    """Losses, norms and weights: an estimate leaves nothing in ZeRO's gradients."""
    rows = [launch.metrics(folder / f"{name}{kind}") for kind in ("", "_estimated")]
    for plain, estimated in zip(*rows, strict=True):
        for key in {"loss", "valid_loss", "grad_norm"} & plain.keys():
            assert estimated[key] == plain[key]
    for rank in ranks:
        plain, estimated = rank["runs"][name]["after"], rank["runs"][f"{name}_estimated"]["after"]
        assert all(torch.equal(estimated[key], weight) for key, weight in plain.items())
        assert any(not torch.equal(rank["runs"][name]["before"][key], weight) for key, weight in plain.items())


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_optimizer_gets_an_estimate_every_few_steps(folder, ranks, name):
    """At steps 0 and 2, of the first five sequences of the batch, the same on both ranks."""
    first, second = (rank["calls"][f"{name}_estimated"] for rank in ranks)
    assert [examples for _, examples in first] == [SEQUENCES * CONTEXT] * (STEPS // INTERVAL)
    for (gradients, _), (others, _) in zip(first, second, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
        assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)
    assert ranks[0]["calls"][name] == []
    low = "bf16" in WRAPPERS[name]
    config = load_config(folder / "recipe.yaml", overrides=[f"data.prefix={folder / 'data'}"])
    train, _ = open_datasets(
        config.data,
        seq_length=CONTEXT,
        seed=1234,
        train_samples=STEPS * BATCH,
        valid_samples=6,
        tokenizer=build_tokenizer("byte"),
    )
    with megatron_alone():
        dtype = torch.bfloat16 if low else torch.float32
        model = build_model(config.model, vocab_size=256, dtype=dtype, device="cpu", seed=1234)
        arguments = {"start": 0, "stop": SEQUENCES, "micro_batch": 2, "vocab_size": 256, "seed": 1234}
        expected, _ = sampled_gradients(model, train, **arguments, device=torch.device("cpu"))
    for found, value in zip(first[0][0], expected, strict=True):
        assert (found - value).abs().max() < (3e-2 if low else 1e-5) * value.abs().max()
