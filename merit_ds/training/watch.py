# SPDX-License-Identifier: Apache-2.0
"""Has each rank watched, so that none waits for a rank that is dead, stopped or cut off: the rank's side.

DeepSpeed's ZeRO groups drop the time-out that `init_distributed` is given (TorchBackend.new_group in 0.19.8), and an
exception on one rank says nothing on the others. `merit_ds.training.guard` is the process that watches.
"""

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from merit_ds.errors import InputError, TransientError
from merit_ds.training.guard import judge
from merit_ds.training.plan import Plan, local_ranks
from merit_ds.training.rendezvous import listen, open_store, own_address, wait_for

GUARD = Path(judge.__file__).parent
BEAT_SECONDS = 5.0
"""Between two beats at most, a twentieth of a shorter time-out."""
REASON_LENGTH = 500
"""Characters: a line to the guard must stay below a pipe's 4096 bytes, up to which it is written whole or not."""


class Watch:
    """A rank under watch, from entering to leaving; of a single rank nothing is watched.

    Make it before the rendezvous: a rank that never comes is noticed too. An exception that leaves the block is passed
    on to the other ranks' guards as the reason.

    Raises:
        TransientError: rank 0 cannot be reached within `run.timeout`.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._store: Store | None = None
        """Kept: on rank 0 its server is the rendezvous', and ends with its last user."""
        self._guard: subprocess.Popen[bytes] | None = None
        self._marks, self._pulses = 0, 0
        self._doing, self._slow = "starting", True

    def __enter__(self) -> "Watch":
        if self._plan.world > 1:
            _refuse_process_one()
            self._store = open_store(self._plan)
            self._guard = _start_guard(self._plan, self._store)
            self.at("starting", slow=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._guard is None:
            return
        self._tell({"reason": None if error is None else _reason(error)})
        # Its guard closes the pipe when the verdict is out, so that this comes before a traceback; rank 0's when all
        # ranks have left, since the others' connections, and perhaps a container, end with it.
        assert self._guard.stdout is not None
        select.select([self._guard.stdout], [], [], judge.LEAVE_SECONDS + 2 * judge.SETTLE_SECONDS)

    def at(self, doing: str, *, slow: bool = False) -> None:
        """Say what this rank does from now on. Every rank says the same things in the same order.

        Args:
            doing: as in "rank 1 was killed while ...", for instance "in the forward pass of step 3".
            slow: it may take `judge.SLOW` times longer than `run.timeout`.
        """
        self._marks += 1
        self._doing, self._slow = doing, slow
        self.pulse()

    def pulse(self) -> None:
        """Say that this rank comes further within what it does: in loops of which ranks may have unequal shares."""
        self._pulses += 1
        self._tell({"marks": self._marks, "pulse": self._pulses, "doing": self._doing, "slow": self._slow})

    @contextmanager
    def untimed(self, doing: str) -> Iterator[None]:
        """While a rank does what may take any time and shows no progress; that it is alive is watched all the same."""
        self.at(doing, slow=True)
        done = threading.Event()

        def beat() -> None:
            while not done.wait(1):
                self.pulse()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _tell(self, mark: dict[str, object]) -> None:
        if self._guard is None or self._guard.stdin is None:
            return
        with suppress(OSError):  # its guard is dead, or does not read: the rank runs on
            os.write(self._guard.stdin.fileno(), json.dumps(mark).encode() + b"\n")


def slow_timeout(plan: Plan) -> timedelta:
    """The longest that a collective outside the training steps may take, and torch's own time-out for it."""
    return timedelta(seconds=judge.SLOW * plan.config.run.timeout)


def _start_guard(plan: Plan, store: Store) -> subprocess.Popen[bytes]:
    timeout = plan.config.run.timeout
    beat = min(BEAT_SECONDS, timeout / 20)
    settings = {"rank": plan.rank, "local_rank": plan.local_rank, "world": plan.world, "host": socket.gethostname()}
    settings |= {"pid": os.getpid(), "beat": beat, "limit": _limit(timeout, beat), "address": os.environ["MASTER_ADDR"]}
    if plan.rank != 0:
        return _spawn(settings | _find_court(store, timeout=timeout))
    with listen(own_address(os.environ["MASTER_ADDR"], several_hosts=plan.world > local_ranks()), 0) as listener:
        court = {"port": listener.getsockname()[1], "token": secrets.token_hex(16)}
        process = _spawn(settings | court, listener.fileno())
    assert process.stdout is not None
    if not process.stdout.readline():  # the socket takes connections before the guard does, and after its end
        raise InputError("rank 0's guard did not start: its own lines above say why")
    store.set("court", json.dumps(court))
    return process


def _limit(timeout: float, beat: float) -> float:
    """Seconds of silence for a verdict: with what comes after it, every rank has ended within `timeout`."""
    return timeout - 2 * beat - judge.SETTLE_SECONDS - judge.GRACE_SECONDS


def _refuse_process_one() -> None:
    if os.getpid() == 1:
        raise InputError(
            "this rank is process 1 of a container, and the kernel lets nothing in there kill that: start it by a "
            "launcher (launch/nossh.sh, torchrun), or run the container with --init or shareProcessNamespace"
        )


def _reason(error: BaseException) -> str:
    """Why the rank leaves, for the others."""
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return signal.Signals(error.code - 128).name
    return " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]


def _find_court(store: Store, *, timeout: float) -> dict[str, object]:
    """Port and token of rank 0's guard; torchrun's store may still have those of an earlier attempt."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            court: dict[str, object] = json.loads(store.get("court"))
            wait_for(os.environ["MASTER_ADDR"], int(str(court["port"])), timeout=0)
            return court
        except (OSError, DistError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise TransientError(
                    f"rank 0's guard on {os.environ['MASTER_ADDR']} cannot be reached: {str(error).splitlines()[0]}"
                ) from None
        time.sleep(0.5)


def _spawn(settings: dict[str, object], *listeners: int) -> subprocess.Popen[bytes]:
    """A guard; rank 0's gets the descriptor on which it listens."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(GUARD), *map(str, listeners)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=listeners,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(settings).encode() + b"\n")
    process.stdin.flush()
    os.set_blocking(process.stdin.fileno(), False)  # a guard that hangs must not hold up its rank
    return process
