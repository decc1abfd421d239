# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's CPU communication op: real lock files, and a real run's shared memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import deepspeed
import deepspeed.comm
import pytest
import torch
from deepspeed import git_version_info
from ranks import run_ranks

from merit_ds.errors import InputError
from merit_ds.training.cpu_comm import check_stale_lock, prebuild, release_shared_memory, state

BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch's builder puts its lock, in a build folder of this test."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    return folder / "lock"


def start_builder(lock: Path) -> subprocess.Popen:
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    assert builder.stdout.readline() == "building\n"
    return builder


def test_only_the_lock_of_a_dead_build_is_refused(lock: Path) -> None:
    check_stale_lock()
    builder = start_builder(lock)
    try:
        check_stale_lock()
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    with pytest.raises(InputError) as refused:
        check_stale_lock()
    assert f"rm {lock}" in str(refused.value)
    assert lock.exists()
    lock.unlink()
    check_stale_lock()


def test_a_lock_that_another_machine_may_hold_is_waited_for(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    lock.touch()
    remover = subprocess.Popen(["/bin/sh", "-c", 'sleep 2; rm "$0"', str(lock)])
    check_stale_lock()
    assert remover.wait() == 0
    assert f"rm {lock}" in capsys.readouterr().out
    lock.touch()
    os.utime(lock, (0, 0))
    with pytest.raises(InputError, match="rm "):
        check_stale_lock()


def test_prebuild_names_the_lock(lock: Path) -> None:
    lock.touch()
    ended = subprocess.run(
        [sys.executable, "-m", "merit_ds.training.cpu_comm"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"error: {lock}")


def test_an_op_installed_with_deepspeed_is_not_built(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state() == "not built"
    lock.touch()
    assert state() == f"busy {lock}"
    monkeypatch.setitem(git_version_info.installed_ops, "deepspeed_shm_comm", True)
    monkeypatch.setattr(git_version_info, "accelerator_name", "cpu")
    assert state() == "ready"
    check_stale_lock()


def shared_memory_of_a_run(rank: int) -> tuple[list[str], list[str], float]:
    def named() -> list[str]:
        return [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]

    os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]  # as DeepSpeed's launcher sets it: all ranks share memory
    deepspeed.init_distributed()
    torch.distributed.barrier()
    before = named()
    torch.distributed.barrier()
    release_shared_memory()
    torch.distributed.barrier()
    total = torch.full((8,), float(rank + 1))
    deepspeed.comm.inference_all_reduce(total)
    return before, named(), float(total.sum())


def test_a_run_leaves_no_shared_memory(tmp_path: Path) -> None:
    """DeepSpeed leaves 69 MB a rank under names of its own; the memory must stay usable without them."""
    prebuild()  # `make` has done it; a bare pytest waits a minute here rather than leave the test out
    other = Path("/dev/shm/deepspeed_allreduce_buffer_of_another_run")
    other.touch()
    try:
        for before, after, total in run_ranks(2, shared_memory_of_a_run):
            assert len(before) == 2
            assert after == []
            assert total == 8 * 3
        assert other.exists()
    finally:
        other.unlink()
