# SPDX-License-Identifier: Apache-2.0
"""Waits for gloo's threads before the interpreter ends, without which now and then one of them aborts the process.

A thread of gloo's lets go of a collective's tensors a moment after the collective is done. To free them it needs the
interpreter's lock; if it gets its turn only when the interpreter is ending, it is ended in the midst of a destructor:
"terminate called without an active exception", status 250 under a launcher, of a training that was complete
(https://github.com/pytorch/pytorch/issues/190489). `destroy_process_group` ends these threads only where nothing else
holds the group, and DeepSpeed's engine does.
"""

import atexit
import os
import time
from pathlib import Path

WORKER = "pt_gloo_runloop"
"""What torch calls the threads that carry out gloo's collectives."""
LOOKS = 3
"""How often in a row they must be seen asleep: one that waits for the lock, behind another thread, sleeps as well."""


def settle_at_exit() -> None:
    """Call `settle` when the interpreter ends, before it refuses its lock to other threads."""
    atexit.register(settle)


def settle(*, timeout: float = 5.0) -> None:
    """Wait until no gloo thread of this process runs or wants to run.

    The caller must not hold up what they wait for: call it where no collective is under way. Without /proc, which
    Linux alone has, it returns at once.

    Args:
        timeout: seconds after which it returns all the same.
    """
    deadline, asleep = time.monotonic() + timeout, 0
    while asleep < LOOKS and time.monotonic() < deadline:
        time.sleep(0.005)
        asleep = 0 if _running() else asleep + 1


def _running() -> bool:
    """Whether a gloo thread is in another state than asleep.

    os.read gives up the interpreter's lock, and the kernel notes the state while it does: a thread that waits for the
    lock has been woken by then, unless another was first.
    """
    for thread in Path("/proc/self/task").glob("*"):
        try:
            descriptor = os.open(thread / "stat", os.O_RDONLY)
        except FileNotFoundError:  # it has ended
            continue
        try:
            name, _, rest = os.read(descriptor, 512).decode(errors="replace").partition("(")[2].rpartition(")")
        except ProcessLookupError:
            continue
        finally:
            os.close(descriptor)
        if name == WORKER and not rest.startswith(" S"):
            return True
    return False
