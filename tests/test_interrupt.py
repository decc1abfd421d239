# SPDX-License-Identifier: Apache-2.0
"""Stopping on all ranks alike: real signals to real processes, and too many bad steps in a row."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from ranks import run_ranks

from merit_ds.errors import InputError
from merit_ds.training.agreement import agree, from_rank_zero, together
from merit_ds.training.interrupt import SIGNALS, BadSteps, Interrupt

SIGNALLED = """
import time
from merit_ds.training.interrupt import Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    while not interrupt.received:
        time.sleep(0.01)
    time.sleep(0.5)  # the save, into which the later signals fall
    print("saved", interrupt.received, flush=True)
print("restored", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("first", SIGNALS, ids=lambda signum: signum.name)
def test_signals_set_a_flag_and_the_handlers_come_back(first: signal.Signals) -> None:
    child = subprocess.Popen([sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        for signum in (first, *SIGNALS, first):
            child.send_signal(signum)
            time.sleep(0.05)
        assert child.stdout.readline() == f"saved {int(first)}\n"
        assert child.stdout.readline() == "restored\n"
        child.send_signal(signal.SIGUSR1)
        assert child.wait(timeout=20) == -signal.SIGUSR1
    finally:
        child.kill()


def stop_together(rank: int, signalled: tuple[int, ...]) -> tuple[int, str]:
    """Steps until a signal that a thread sends to some ranks, one after the other, stops all."""
    with Interrupt() as interrupt:
        if rank in signalled:
            threading.Timer(0.2 + 0.3 * rank, os.kill, (os.getpid(), signal.SIGTERM)).start()
        for step in range(10_000):
            signum, _ = agree([interrupt.received, 0])
            if signum:
                time.sleep(1.0)  # the save: the other rank's signal falls into it
                return step, signal.Signals(signum).name
            time.sleep(0.005)
    raise AssertionError("no rank saw the signal")


def fail_on(failing: int, rank: int) -> int:
    if rank == failing:
        raise OSError("No space\nleft")
    return rank


def all_cases(rank: int) -> None:
    for signalled in ((0,), (1,), (0, 1)):
        outcome = stop_together(rank, signalled)
        assert outcome[1] == "SIGTERM"
        assert together(lambda outcome=list(outcome): outcome, failing="x") == [list(outcome)] * 2
    assert agree([rank, 1 - rank, 0, -rank]) == [1, 1, 0, 0]

    for failing in (0, 1):
        with pytest.raises(InputError, match=f"^cannot save: rank {failing}: No space left$"):
            together(lambda failing=failing: fail_on(failing, rank), failing="cannot save")
    assert from_rank_zero(lambda: rank, failing="x") == 0

    # Step 1 is bad on rank 0 alone, step 3 and 4 on rank 1 and then rank 0: both ranks must stop at step 4.
    bad_steps = BadSteps(2)
    mine = {1: (1 - rank, 0), 2: (0, 0), 3: (0, rank), 4: (1 - rank, 0), 5: (0, 0)}
    with pytest.raises(InputError, match=r"^step 4 "):
        for step, flags in mine.items():
            non_finite, skipped = agree(flags)
            bad_steps.record(non_finite=bool(non_finite), skipped=bool(skipped))
            bad_steps.check(step)


def test_ranks_stop_in_the_same_step() -> None:
    run_ranks(2, all_cases, timeout=60)


def test_bad_steps_count_in_a_row_only() -> None:
    """Non-finite losses and skipped steps count together; a good step between starts the count anew."""
    bad_steps = BadSteps(3)
    for step, (non_finite, skipped) in enumerate([(True, False), (False, True), (False, False), (True, True)], 1):
        bad_steps.record(non_finite=non_finite, skipped=skipped)
        bad_steps.check(step)
    assert bad_steps.in_a_row == 1
    bad_steps.record(non_finite=False, skipped=True)
    bad_steps.check(5)
    bad_steps.record(non_finite=True, skipped=False)
    with pytest.raises(InputError, match="step 6 ended with a non-finite loss, the last of 3 bad steps in a row"):
        bad_steps.check(6)
