# SPDX-License-Identifier: Apache-2.0
"""Ends while a thread of gloo's still holds a collective's tensor: `gloo_exit_script.py [--settle]`.

The thread is kept from running until the last exit handler, which holds the interpreter's lock; there it waits for it.
"""

import atexit
import os
import subprocess
import sys
from pathlib import Path

atexit.register(sum, range(100_000_000))  # the first to be registered is the last to run: a second or more

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from merit_ds.gloo_threads import WORKER, settle_at_exit  # noqa: E402

LET_RUN = """
import os, sys, time
sys.stdin.read(1)
time.sleep(0.2)
for thread in map(int, sys.argv[1:]):
    os.sched_setaffinity(thread, range(os.cpu_count()))
    try:
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        pass  # they run where a processor has nothing else to do
"""


def threads() -> dict[int, str]:
    return {int(task.name): (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.barrier()
workers = [thread for thread, name in threads().items() if name == WORKER]
assert workers, threads()
helper = subprocess.Popen([sys.executable, "-c", LET_RUN, *map(str, workers)], stdin=subprocess.PIPE, bufsize=0)
atexit.register(os.write, helper.stdin.fileno(), b".")
if "--settle" in sys.argv:
    settle_at_exit()
here = min(os.sched_getaffinity(0))
for thread in threads():  # on one processor, where gloo's threads run when nobody else wants to
    os.sched_setaffinity(thread, {here})
for thread in workers:
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
held = torch.ones(3)
dist.all_reduce(held)
