# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's communication op for CPUs: built beforehand, its stale lock named, its shared memory given back.

On a machine without an accelerator `deepspeed.init_distributed` compiles this op, which takes a minute or more the
first time. `python -m merit_ds.training.cpu_comm` does it beforehand, into TORCH_EXTENSIONS_DIR.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import git_version_info
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from merit_ds.errors import InputError
from merit_ds.training.plan import local_ranks

PATIENCE_SECONDS = 300
"""How long a lock that may belong to a build on another machine is waited for: the build takes 30 to 160 seconds."""
SHARED_BYTES = 69 * 10**6
"""What the op takes in /dev/shm for each rank."""


def prebuild() -> None:
    """Build the op where this machine's accelerator has one and the build folder does not.

    Raises:
        InputError: another build's lock lies there and nobody holds it; or the build failed.
    """
    builder = _builder()
    if builder is None:
        print(f"DeepSpeed's CPU communication op: not used with {get_accelerator().device_name()}")
        return
    if _is_installed(builder):
        builder.load()
        print("DeepSpeed's CPU communication op is ready: it was installed with DeepSpeed")
        return
    check_stale_lock()
    folder = _build_folder(builder)
    if not (folder / f"{builder.name}.so").exists():
        print(f"Building DeepSpeed's CPU communication op in {folder}: one to three minutes, once", flush=True)
    start = time.monotonic()
    try:
        builder.load()
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot build DeepSpeed's CPU communication op (it needs g++ and ninja): {reason}") from error
    print(f"DeepSpeed's CPU communication op is ready in {folder} ({time.monotonic() - start:.0f} s)")


def state() -> str:
    """In a few words: "not used", "ready", "not built", "locked" or "busy".

    The path of the lock follows: of a killed build, or of one that another machine may still hold.
    """
    builder = _builder()
    if builder is None:
        return "not used"
    if _is_installed(builder):
        return "ready"
    folder = _build_folder(builder)
    lock = _unheld(folder / "lock")
    if lock is not None:
        return f"{'locked' if time.time() - lock.st_mtime > PATIENCE_SECONDS else 'busy'} {folder / 'lock'}"
    return "ready" if (folder / f"{builder.name}.so").exists() else "not built"


def check_stale_lock() -> None:
    """Refuse to start on the lock of a killed build, on which DeepSpeed would wait forever without a word.

    Call it before `deepspeed.init_distributed`. torch's builder holds the lock file open while it lives, so on one
    machine a lock that no process holds is stale. A build by another machine on a shared folder, or by another user,
    cannot be seen: there it is waited for, PATIENCE_SECONDS after the lock was made at most.

    Raises:
        InputError: names the file and the command that removes it.
    """
    builder = _builder()
    if builder is None or _is_installed(builder):
        return
    lock = _build_folder(builder) / "lock"
    advice = f"{lock}: left by a build that was killed; no process of this machine holds it: rm {lock}"
    several_machines = int(os.environ.get("WORLD_SIZE", "1")) != local_ranks()
    told = False
    while (found := _unheld(lock)) is not None:
        left = PATIENCE_SECONDS - (time.time() - found.st_mtime)
        if left <= 0 or not (several_machines or found.st_uid != os.getuid()):
            raise InputError(advice)
        if not told:
            print(f"waiting up to {left:.0f} s for another machine's build, unless {advice}", flush=True)
            told = True
        time.sleep(1)


def release_shared_memory() -> None:
    """Remove the names of the op's shared memory, 69 MB a rank in /dev/shm, which DeepSpeed never removes.

    A collective; call it right after `deepspeed.init_distributed`. Then every rank has mapped the memory, which stays
    usable without its name and ends with its last process, however that one dies.
    """
    dist.barrier()
    # As shm_initialize in DeepSpeed's csrc/cpu/comm/shm.cpp names it.
    owner = f"{os.getuid()}_{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{owner}_{dist.get_rank()}").unlink(missing_ok=True)


def _builder() -> Any:
    """DeepSpeed's builder of the op; None with an accelerator that does without."""
    return get_accelerator().create_op_builder("ShareMemCommBuilder")


def _is_installed(builder: Any) -> bool:
    """Whether DeepSpeed was installed with the op in it (DS_BUILD_SHM_COMM=1): then it builds nothing."""
    same_accelerator = git_version_info.accelerator_name == get_accelerator().device_name()
    return same_accelerator and bool(git_version_info.installed_ops.get(builder.name))


def _build_folder(builder: Any) -> Path:
    return Path(cpp_extension._get_build_directory(builder.name, False)).resolve()


def _unheld(lock: Path) -> os.stat_result | None:
    """The lock that no process of this machine holds open; None where there is no such lock."""
    found = None
    for _ in range(2):
        try:
            found = lock.stat()
        except FileNotFoundError:
            return None
        if _is_open(lock):
            return None
        # A builder that ends closes the lock, then removes it: look again, or that moment would look like a kill.
        time.sleep(0.5)
    return found


def _is_open(path: Path) -> bool:
    """Whether a process whose open files this user may see has `path` open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path):
                return True
        except OSError:
            continue
    return False


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m merit_ds.training.cpu_comm", description=__doc__).parse_args()
    try:
        prebuild()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
