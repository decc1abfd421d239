# SPDX-License-Identifier: Apache-2.0
"""The process beside each rank that ends it when the job is lost. It needs no package but Python's.

    python -I merit_ds/training/guard [DESCRIPTOR]      rank 0's is given the socket on which it listens

A rank that waits in a collective for one that is dead, stopped or cut off waits for half an hour, in C++, and cannot
look around. Its guard can: it holds a connection to rank 0's guard, which hears of every rank what it does, and
passes a verdict that names the rank, its host and the cause. Every guard then kills its rank.

    rank 0 --pipe--> guard 0 (judge) <--TCP-- guard 1 <--pipe-- rank 1
                                     <--TCP-- guard 2 <--pipe-- rank 2

A guard is a process of its own, so neither a lock of Python's nor SIGSTOP of its rank stops it. The rank's side is
`merit_ds.training.watch`. Messages are JSON lines; a guard that does not know the job's token is not listened to.
"""

import asyncio
import hmac
import json
import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merit_ds.training.guard.judge import GRACE_SECONDS, LEAVING, Judge
else:  # a folder that is run has its files as top-level modules; the package itself would bring in torch
    from judge import GRACE_SECONDS, LEAVING, Judge

HELLO_SECONDS = 10.0
"""In which who has connected must say who it is."""
BACKLOG = 4096
"""Connections that wait to be accepted, as `merit_ds.training.rendezvous` has it."""
PAUSE_SECONDS = 5.0
"""A longer gap between two looks at the clock is a pause of this process: Ctrl-Z, a frozen container."""


class Clock:
    """Counts the seconds in which this process runs: who is paused with it has not been silent meanwhile.

    To be read every second.
    """

    def __init__(self) -> None:
        self._read = time.monotonic()
        self._seconds = 0.0

    def now(self) -> float:
        before, self._read = self._read, time.monotonic()
        self._seconds += min(self._read - before, PAUSE_SECONDS)
        return self._seconds


class Court:
    """Rank 0's guard as a server: hears every guard, and tells each that it lives, or the verdict."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._token: str = settings["token"]
        self._beat: float = settings["beat"]
        self._clock = Clock()
        self._judge = Judge(
            world=settings["world"], timeout=settings["limit"], beat=settings["beat"], now=self._clock.now()
        )
        self._verdict: str | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, listener: socket.socket) -> None:
        # A descriptor for each rank; the usual limit of 1024 is a soft one.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._server = await asyncio.start_server(self._hear, sock=listener, backlog=BACKLOG)
        self._telling = asyncio.create_task(self._tell())

    async def wait_until_all_left(self) -> None:
        """Unless one of them was lost: then the verdict comes."""
        while not self._judge.all_left():
            await asyncio.sleep(0.1)

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), HELLO_SECONDS))
            if not hmac.compare_digest(str(hello["token"]), self._token):
                raise ValueError("another job's guard, or none at all")
            rank = int(hello["rank"])
        except (ValueError, KeyError, TypeError, OSError, TimeoutError):
            writer.close()
            return
        self._judge.arrived(rank, str(hello["host"]), self._clock.now())
        self._writers.add(writer)
        if self._verdict:
            self._send(writer)
        try:
            while line := await reader.readline():
                self._judge.heard(rank, json.loads(line), self._clock.now())
        except (OSError, ValueError, KeyError):
            pass  # broken, or a line that was torn: as good as the end of the connection
        finally:
            self._writers.discard(writer)
            self._judge.disconnected(rank, self._clock.now())
            writer.close()

    async def _tell(self) -> None:
        told = 0.0
        while self._verdict is None:
            await asyncio.sleep(min(0.2, self._beat))
            now = self._clock.now()
            self._verdict = self._judge.verdict(now)
            if self._verdict or now - told >= self._beat:
                told = now
                for writer in self._writers:
                    self._send(writer)

    def _send(self, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps({"verdict": self._verdict}).encode() + b"\n")


class Guard:
    """One rank's guard, from its first mark to its end or the verdict."""

    def __init__(self, settings: dict[str, Any], court: Court | None) -> None:
        self._settings = settings
        self._court = court
        self._rank_pid: int = settings["pid"]
        self._mark: dict[str, Any] = {"marks": 0, "pulse": 0, "doing": "starting", "slow": True}
        self._left: dict[str, Any] | None = None

    async def run(self, pipe: asyncio.StreamReader) -> None:
        settings = self._settings
        try:
            reader, writer = await self._connect()
        except OSError as error:
            return await self._execute(f"rank 0's guard on {settings['address']} cannot be reached: {error}")
        self._send(writer, {key: settings[key] for key in ("token", "rank", "host")})
        watching = asyncio.create_task(self._watch(pipe))
        beating = asyncio.create_task(self._beat(writer))
        judging = asyncio.create_task(self._listen(reader))
        await asyncio.wait({watching, judging}, return_when=asyncio.FIRST_COMPLETED)
        beating.cancel()
        if watching.done():
            self._report(writer, "died" if self._left is None else "left")
            await self._wait_for_verdict(judging)
        await self._execute(judging.result() if judging.done() else None)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        clock = Clock()
        while True:
            try:
                return await asyncio.open_connection(self._settings["address"], self._settings["port"])
            except OSError:
                if clock.now() > self._settings["limit"]:
                    raise
                await asyncio.sleep(0.5)

    async def _execute(self, verdict: str | None) -> None:
        if verdict and self._settings["local_rank"] == 0:
            with suppress(OSError):  # whoever read it may be gone, and the rank has to end all the same
                print(f"error: {verdict}; every rank ends now", file=sys.stderr, flush=True)
        os.close(sys.stdout.fileno())  # a rank that has left waits for this: now it may print its own reason
        if verdict:
            await self._end_rank()

    async def _wait_for_verdict(self, judging: asyncio.Task[str | None]) -> None:
        """The rank has left or died: a failure may have its cause elsewhere, and rank 0's guard judges to the last."""
        if self._court is not None:
            leaving = asyncio.create_task(self._court.wait_until_all_left())
            await asyncio.wait({judging, leaving}, return_when=asyncio.FIRST_COMPLETED)
        elif self._left is not None and self._left["reason"] is not None:
            await judging

    async def _end_rank(self) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        while os.getppid() == self._rank_pid:
            if time.monotonic() > deadline:
                os.kill(self._rank_pid, signal.SIGKILL)
                return
            await asyncio.sleep(0.1)

    async def _watch(self, pipe: asyncio.StreamReader) -> None:
        """Follow the rank's marks until it leaves or dies; a child of its own may hold the pipe open after that."""
        while os.getppid() == self._rank_pid:
            try:
                line = await asyncio.wait_for(pipe.readline(), timeout=1)
            except TimeoutError:
                continue
            if not line:
                return
            mark = json.loads(line)
            if "reason" in mark:
                self._left = mark
                return
            self._mark = mark

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        while True:
            self._report(writer, "beat")
            await asyncio.sleep(self._settings["beat"])

    async def _listen(self, reader: asyncio.StreamReader) -> str | None:
        """The verdict, or that rank 0's guard is gone or silent; None where that no longer matters to this rank."""
        court, clock = f"rank 0 on {self._settings['address']}", Clock()
        limit, heard = self._settings["limit"], clock.now()
        while clock.now() - heard <= limit:
            try:
                line = await asyncio.wait_for(reader.readline(), timeout=1)
            except TimeoutError:
                continue
            except OSError:
                line = b""
            if not line:
                gone = f"{court} is gone: its host or all of its processes went down"
                return gone if self._left is None and self._mark["doing"] != LEAVING else None
            heard = clock.now()
            if verdict := json.loads(line)["verdict"]:
                return str(verdict)
        return f"{court} has not been heard of for {limit:g} s: its host is down or a link is cut"

    def _report(self, writer: asyncio.StreamWriter, event: str) -> None:
        message = {"event": event, "state": _state(self._rank_pid), "reason": None}
        self._send(writer, message | self._mark | (self._left or {}))

    @staticmethod
    def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        writer.write(json.dumps(message).encode() + b"\n")


def _state(pid: int) -> str:
    """Of a process, a letter: R, S, T, D, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


async def main() -> None:
    """Settings come in the pipe's first line: a token in the arguments would be for all to see."""
    pipe = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(pipe), sys.stdin)
    settings = json.loads(await pipe.readline())
    court = Court(settings) if settings["rank"] == 0 else None
    if court is not None:
        await court.open(socket.socket(fileno=int(sys.argv[1])))
        print("listening", flush=True)
    await Guard(settings, court).run(pipe)
    os._exit(0)  # the open connections need no orderly end, and each would complain


if __name__ == "__main__":
    # Launchers signal a rank's children too; a guard ends with its rank.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    asyncio.run(main())
