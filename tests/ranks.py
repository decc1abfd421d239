# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several ranks of this machine, on gloo or NCCL; one process group can serve many cases."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _enter(
    local_rank: int, function: Callable[..., Any], world: int, port: int, device: str, results: Any, args: tuple
) -> None:
    os.environ.update(
        RANK=str(local_rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR=device,
    )
    torch.set_num_threads(1)
    # Without LOCAL_SIZE, DeepSpeed allots no shared memory, 69 MB a rank, that it would never give back.
    if device == "cpu":
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    else:
        own = torch.device(device, local_rank)
        torch.cuda.set_device(own)
        torch.distributed.init_process_group("nccl", timeout=timedelta(seconds=120), device_id=own)
    try:
        # Pickled here: a queue would pass tensors as handles into a process that is about to end.
        results.put((local_rank, pickle.dumps(function(local_rank, *args)), None))
    except BaseException:
        results.put((local_rank, None, traceback.format_exc()))
        raise
    finally:
        torch.distributed.destroy_process_group()


def _context(device: str) -> Any:
    """Ranks are forked from a server that has imported what takes seconds: DeepSpeed's Muon brings in torch.compile.

    The server has no threads and no process groups, so a fork of it is as good as a new process. Not so where CUDA may
    have begun: ranks with a GPU each are new processes.
    """
    if device != "cpu":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"])
    return context


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, device: str = "cpu", timeout: float = 300
) -> list[Any]:
    """Run `function(rank, *args)` on `world` ranks.

    Args:
        world: number of processes.
        function: a module-level function (it is pickled by name); returns something picklable.
        device: "cpu", on gloo, or "cuda": a GPU for each rank, on NCCL.
        timeout: seconds until every rank is killed and the test fails.

    Returns:
        What each rank returned, in rank order.

    Raises:
        AssertionError: with the traceback of every rank that failed.
    """
    context = _context(device)
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_enter, args=(rank, function, world, port, device, results, args), daemon=True)
        for rank in range(world)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", device)  # DeepSpeed chooses it when it is imported
        for process in processes:
            process.start()
    outcomes: dict[int, tuple[Any, str | None]] = {}
    try:
        while len(outcomes) < world:
            rank, value, failure = results.get(timeout=timeout)
            outcomes[rank] = (value, failure)
            if failure is not None:
                break
    finally:
        for process in processes:
            process.join(timeout=0 if len(outcomes) < world else 30)
            if process.is_alive():
                process.kill()
    failures = [f"rank {rank}:\n{failure}" for rank, (_, failure) in sorted(outcomes.items()) if failure]
    assert not failures, "\n".join(failures)
    return [pickle.loads(outcomes[rank][0]) for rank in range(world)]
