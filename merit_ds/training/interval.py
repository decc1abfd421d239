# SPDX-License-Identifier: Apache-2.0
"""What adds up between two log lines."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state


class Interval:
    """The steps since the last log line, and the bad ones since the start."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self._steps = 0
        self._seconds = 0.0
        self.skipped = 0
        self.non_finite = 0

    def add(self, loss: torch.Tensor, seconds: float, *, non_finite: bool, skipped: bool) -> None:
        self._loss += loss
        self._steps += 1
        self._seconds += seconds
        self.skipped += skipped
        self.non_finite += non_finite

    def take(self) -> tuple[int, float, float]:
        """Steps, seconds, and the mean loss over steps and ranks; starts a new interval. A collective."""
        mean = self._loss / self._steps
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        result = self._steps, self._seconds, float(mean) / parallel_state.get_data_parallel_world_size()
        self._loss.zero_()
        self._steps, self._seconds = 0, 0.0
        return result
