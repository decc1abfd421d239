# SPDX-License-Identifier: Apache-2.0
"""Reasons to stop a run, on all ranks alike: a signal, or too many bad steps in a row.

Neither class communicates: the trainer has the ranks agree on their flags by `agreement.agree`.
"""

import signal
from types import FrameType, TracebackType
from typing import Any

from merit_ds.errors import InputError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a run to save and stop: launchers, schedulers that preempt and Kubernetes send SIGTERM, a terminal SIGINT,
Slurm SIGUSR1 ahead of a time limit (`sbatch --signal=USR1@120`)."""


class Interrupt:
    """While entered, SIGNALS only set a flag; leaving restores the handlers that were there before.

    Launchers signal the ranks one after the other, may send several of them, each more than once, and DeepSpeed's kills
    30 seconds later. So every signal is absorbed, also during the save that the first one brought about.
    Enter it in the main thread: Python allows no handler to be set elsewhere.
    """

    received: int
    """The first signal's number, 0 before any: this rank's flag for `agree`."""

    def __enter__(self) -> "Interrupt":
        self.received = 0
        self._previous: dict[signal.Signals, Any] = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = self.received or signum


class BadSteps:
    """Counts steps in a row that trained nothing: a non-finite loss, or skipped by DeepSpeed for overflow."""

    def __init__(self, limit: int) -> None:
        """Args: limit: the run stops at this many bad steps in a row, at least 1."""
        self.limit = limit
        self.in_a_row = 0
        """0 after a good step."""
        self._what = ""

    def record(self, *, non_finite: bool, skipped: bool) -> None:
        """Count one step, with flags on which all ranks agreed."""
        self.in_a_row = self.in_a_row + 1 if non_finite or skipped else 0
        self._what = "a non-finite loss" if non_finite else "a gradient overflow that DeepSpeed skipped"

    def check(self, step: int) -> None:
        """Stop the run at the limit, on all ranks in the same step.

        Raises:
            InputError: names the step.
        """
        if self.in_a_row >= self.limit:
            raise InputError(
                f"step {step} ended with {self._what}, the last of {self.in_a_row} bad steps in a row "
                "(run.max_bad_steps); lower the learning rate or look at the data, then continue from the last "
                "checkpoint with run.load"
            )
