# SPDX-License-Identifier: Apache-2.0
"""Stopping a run between two steps, on all ranks alike: for a signal, or for too many bad steps in a row.

Neither class communicates. The trainer puts their per-rank flags into one `agreement.agree` call a step:

    signum, non_finite, skipped = agree([interrupt.received, int(not loss.isfinite()), int(overflow)])
    bad_steps.record(step, non_finite=bool(non_finite), skipped=bool(skipped))
    if signum: save and leave, logging signal.Signals(signum).name
"""

import signal
from types import FrameType, TracebackType
from typing import Any

from merit_ds.errors import InputError


class Interrupt:
    """While entered, SIGTERM and SIGINT only set a flag; leaving restores the handlers that were there before.

    Launchers signal the ranks one after the other, may send both signals, each more than once, and DeepSpeed's kills
    30 seconds later. So every signal is absorbed, also during the save that the first one brought about.
    Enter it in the main thread: Python allows no handler to be set elsewhere.
    """

    received: int
    """The first signal's number, 0 before any: this rank's flag for `agree`."""

    def __enter__(self) -> "Interrupt":
        self.received = 0
        self._previous: dict[signal.Signals, Any] = {
            signum: signal.signal(signum, self._note) for signum in (signal.SIGTERM, signal.SIGINT)
        }
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
        """0 after a good step. While it is not, save no checkpoint: the weights may hold NaN already."""

    def record(self, step: int, *, non_finite: bool, skipped: bool) -> None:
        """Count one step, with flags on which all ranks agreed, so that all ranks raise in the same step.

        Raises:
            InputError: at the limit; names the step.
        """
        self.in_a_row = self.in_a_row + 1 if non_finite or skipped else 0
        if self.in_a_row >= self.limit:
            what = "a non-finite loss" if non_finite else "a gradient overflow that DeepSpeed skipped"
            raise InputError(
                f"step {step} ended with {what}, the last of {self.in_a_row} bad steps in a row (run.max_bad_steps); "
                "lower the learning rate or look at the data, then continue from the last checkpoint with run.load"
            )
