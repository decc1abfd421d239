# SPDX-License-Identifier: Apache-2.0
"""A DeepSpeed script as its users have them: it never heard of Merit, the JSON alone names the optimizer.

    deepspeed untouched_script.py --deepspeed_config ds.json --output weights.pt

`--output` gets the model's state dict after the last step.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

STEPS = 4


class Tiny(torch.nn.Module):
    """Predicts each token from the one before; odd sizes, so that two ranks cut its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = torch.nn.Embedding(31, 7)
        self.hidden = torch.nn.Linear(7, 13)
        self.norm = torch.nn.LayerNorm(13)
        self.head = torch.nn.Linear(13, 31, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.norm(self.hidden(self.embedding(tokens[:, :-1]))))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch(step: int, rank: int) -> Tensor:
    """Tokens [2, 9], others on each rank."""
    return torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))


def train(engine: Any) -> None:
    for step in range(STEPS):
        engine.backward(engine(batch(step, dist.get_rank())))
        engine.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--deepspeed_config", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    deepspeed.init_distributed("gloo")
    model, config = Tiny(), json.loads(arguments.deepspeed_config.read_text())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    train(engine)
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), arguments.output)


if __name__ == "__main__":
    main()
