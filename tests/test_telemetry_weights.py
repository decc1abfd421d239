# SPDX-License-Identifier: Apache-2.0
"""Values of the weights alone against numpy on whole weights, and split over tensor-parallel ranks."""

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import run_ranks

from merit_ds.megatron import tensor_parallel_group
from merit_ds.telemetry import weights
from merit_ds.telemetry.reduction import Reduction
from merit_ds.telemetry.values import OF_WEIGHTS
from merit_ds.telemetry.weights import weight_values
from merit_ds.training.config import ModelConfig
from merit_ds.training.model import build_model, initialise_megatron

CPU = torch.device("cpu")
HEADS, WIDTH, HIDDEN = 4, 3, 12


def measured(tensor_parallel: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The values of a model, and its weights as far as this rank holds them."""
    shape = ModelConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=HEADS, seq_length=7, tensor_parallel=tensor_parallel
    )
    initialise_megatron(seed=1, device=CPU, tensor_parallel=tensor_parallel)
    model = build_model(shape, vocab_size=60, dtype=torch.float32, device="cpu", seed=1)
    with torch.no_grad():  # rows and columns that differ, as those of a trained weight do
        for parameter in model.parameters():
            if parameter.dim() == 2 and not getattr(parameter, "tensor_model_parallel", False):
                parameter *= torch.linspace(0.5, 2, parameter.size(0))[:, None]
    values = weight_values(model, OF_WEIGHTS, group=tensor_parallel_group(), device=CPU)
    single = {name: weight_values(model, {name}, group=tensor_parallel_group(), device=CPU) for name in OF_WEIGHTS}
    assert {name: value for found in single.values() for name, value in found.items()} == values
    held = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    parallel_state.destroy_model_parallel()
    return values, held


def measure(rank: int, monkey_elements: int) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    weights._ELEMENTS = monkey_elements  # small matrices in several pieces
    return [measured(1), measured(2)]


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, measure, 100)


def pairs_alike(lines: np.ndarray) -> float:
    """Over all pairs of elements of a line, over all lines: the correlation of their sizes."""
    size = np.abs(lines.astype(np.float64))
    size -= size.mean()
    products = [line[j] * line[k] for line in size for j, k in permutations(range(len(line)), 2)]
    return np.mean(products) / np.mean(size**2)


def expected(held: dict[str, np.ndarray]) -> dict[str, Any]:
    matrices = {}
    for name, weight in held.items():
        if name.endswith("linear_qkv.weight"):
            heads = np.split(weight, 3 * HEADS)  # a head's query, key and value rows follow one another
            for number, part in enumerate(("query", "key", "value")):
                matrices[f"{name}.{part}"] = np.concatenate(heads[number::3])
        elif weight.ndim == 2:
            matrices[name] = weight
    gaps = {
        name: 1 - np.abs(weight).max() / math.sqrt((weight.astype(np.float64) ** 2).sum())
        for name, weight in matrices.items()
        if name.endswith((".query", ".key"))
    }
    output = held["embedding.word_embeddings.weight"].astype(np.float64)
    return {
        "l2_max_gap": gaps,
        "row_similarity": {name: pairs_alike(weight) for name, weight in matrices.items()},
        "col_similarity": {name: pairs_alike(weight.T) for name, weight in matrices.items()},
        # Over inputs of root mean square 1 a logit is largest along its row.
        "output_operator_norm": max(abs(row @ (row * math.sqrt(HIDDEN / (row @ row)))) for row in output),
    }


def test_each_value_is_that_of_the_whole_weights(ranks):
    (found, held), _ = ranks[0]
    wanted = expected(held)
    assert found.keys() == wanted.keys() and found["row_similarity"].keys() == wanted["row_similarity"].keys()
    assert len(found["l2_max_gap"]) == 4 and len(found["row_similarity"]) == 2 * 6 + 2
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert found["row_similarity"]["embedding.position_embeddings.weight"] > 0.1  # not all of them are near zero


def test_tensor_parallel_ranks_find_the_same(ranks):
    (whole, _), (found, held) = ranks[0]
    assert ranks[1][1][0] == found  # on both ranks
    assert held["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (3 * HEADS * WIDTH // 2, HIDDEN)
    for name, value in whole.items():
        assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


def test_lines_of_one_size_are_alike_and_one_size_alone_is_no_similarity():
    class Model(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight)

    wanted = {"row_similarity", "col_similarity"}
    signs = torch.tensor([[1.0, -1, 1], [-1, -1, 1]])
    lines = weight_values(Model(signs * torch.tensor([[1.0], [3]])), wanted, group=None, device=CPU)
    assert lines == {"row_similarity": {"weight": pytest.approx(1)}, "col_similarity": {"weight": pytest.approx(-1)}}
    flat = weight_values(Model(signs), wanted, group=None, device=CPU)
    assert flat == {"row_similarity": {}, "col_similarity": {}}


def reduce_nan(rank: int) -> tuple[list[float], list[float]]:
    reduction = Reduction(CPU)
    value = [math.nan if rank == 1 else 5.0, float(rank), -math.inf, [math.inf, 2.0][rank]]
    largest, total = reduction.maximum(torch.tensor(value)), reduction.sum(torch.tensor([1.0, rank]))
    reduction.run(dist.group.WORLD)
    return largest().tolist(), total().tolist()


def test_a_nan_of_one_rank_is_everyones():
    for largest, total in run_ranks(2, reduce_nan):
        assert largest == pytest.approx([math.nan, 1, -math.inf, math.inf], nan_ok=True)
        assert total == [2, 1]
