# SPDX-License-Identifier: Apache-2.0
"""A sample does the operations of the values that are wanted, and no other's; these are bitwise what they are beside
all of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alone import megatron_alone
from torch.utils._python_dispatch import TorchDispatchMode

from merit_ds import Merit
from merit_ds.telemetry import sampler
from merit_ds.telemetry.sampler import Telemetry
from merit_ds.telemetry.values import OF_ATTENTION, OF_UPDATES
from merit_ds.training.config import ModelConfig
from merit_ds.training.model import build_model

OPERATIONS = {
    "max_attention_logit": {"amax"},
    "attention_entropy": {"_softmax", "special_entr"},
    "ratios": {"amin", "amax"},
    "clipped_share": {"ge"},
    "whole_share": {"eq"},
}
"""By value, what it takes and some other does not."""


class Operations(TorchDispatchMode):
    """Notes the names of torch's operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def sample(wanted: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The row of a step with only these values, and the operations of the whole step."""
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    rows: list[dict[str, Any]] = []
    shape = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16)
    with megatron_alone():
        model = build_model(shape, vocab_size=256, dtype=torch.float32, device="cpu", seed=1)
        optimizer = Merit(model.parameters(), lr=0.02, fused=False)
        optimizer.inspect = list  # what it takes to show pieces is no value's own
        engine = SimpleNamespace(module=model, basic_optimizer=optimizer, monitor=SimpleNamespace(enabled=False))
        telemetry = Telemetry(engine, wanted=wanted, interval=1, device=torch.device("cpu"), record=rows.append)
        with Operations() as operations:
            telemetry.before_step(1)
            model(tokens, torch.arange(16).expand(2, -1), None, labels=tokens).mean().backward()
            optimizer.step()
            telemetry.after_step(1, samples=2)
    (row,) = rows
    return row, operations.names


@pytest.fixture(scope="module")
def every():
    """The row of a sample of all these values, unrounded; and the operations of a step without any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_rounded", lambda value: value)
        yield sample({*OF_ATTENTION, *OF_UPDATES})[0], sample(set())[1]


@pytest.mark.parametrize("value", sorted(OF_ATTENTION | OF_UPDATES))
def test_a_value_alone_is_the_same_and_takes_only_its_own_operations(every, value):
    row, plain = every
    found, names = sample({value})
    assert found.pop("elements", row["elements"]) == row["elements"]
    assert found == {"iteration": 1, value: row[value]}
    telling = set().union(*OPERATIONS.values())
    assert {name for name in telling if names.count(name) > plain.count(name)} == OPERATIONS[value]
