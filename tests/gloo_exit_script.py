# SPDX-License-Identifier: Apache-2.0
"""Ends while a thread of gloo's still holds a collective's tensor: `gloo_exit_script.py [--settle]`.

The thread is kept from running until the interpreter's last exit handler, and there waits for the lock that this holds.
"""

import atexit
import os
import sys
from pathlib import Path

atexit.register(sum, range(40_000_000))  # the first to be registered is the last to run; half a second of held lock

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from merit_ds.gloo_threads import WORKER, settle_at_exit  # noqa: E402


def threads() -> dict[int, str]:
    return {int(task.name): (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}


everywhere = os.sched_getaffinity(0)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.barrier()
workers = [thread for thread, name in threads().items() if name == WORKER]
assert workers, threads()
atexit.register(lambda: [os.sched_setaffinity(thread, everywhere) for thread in workers])
if "--settle" in sys.argv:
    settle_at_exit()
for thread in threads():  # on one processor, where gloo's threads run when nobody else wants to
    os.sched_setaffinity(thread, {min(everywhere)})
for thread in workers:
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
held = torch.ones(3)
dist.all_reduce(held)
