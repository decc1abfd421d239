# SPDX-License-Identifier: Apache-2.0
"""The process beside each rank that ends it when the job is lost. Run as a script; it needs no package but Python's.

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
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 1.0
"""From the first bad news to the verdict: a killed rank is the cause of its neighbours' broken connections."""
GRACE_SECONDS = 3.0
"""From the verdict to the kill: a rank that is about to end prints why, or writes its last."""
LEAVE_SECONDS = 10.0
"""In which all ranks end after one that reported an error, before its guard takes them for stuck."""
SLOW = 6
"""How many times longer starting, loading and saving may take than a part of a step."""
DIED, LOST, FAILED = range(3)
"""Bad news, the likelier cause first."""


@dataclass
class Rank:
    """What the judge knows of one rank."""

    host: str = ""
    heard: float = 0.0
    """When its guard was last heard of."""
    marks: int = 0
    """How many things it has begun: the same number at the same place of the program on every rank."""
    doing: str = ""
    slow: bool = False
    moved: float = 0.0
    """When it began that."""
    state: str = ""
    """Of its process, as /proc has it: T stopped, D waiting for a disk."""
    left: bool = False


@dataclass
class Judge:
    """Hears of all ranks, and says when the job is lost and by whom. Times are seconds of one clock.

    Args:
        world: number of ranks.
        timeout: seconds of silence, or without progress, after which the job is lost.
        now: when the job began.
    """

    world: int
    timeout: float
    now: float
    ranks: dict[int, Rank] = field(default_factory=dict)
    news: list[tuple[int, float, float, str]] = field(default_factory=list)
    """(kind, when it came, when it counts, the line)."""

    def arrived(self, rank: int, host: str, now: float) -> None:
        self.ranks[rank] = Rank(host=host, heard=now, moved=now)

    def heard(self, rank: int, message: dict[str, Any], now: float) -> None:
        """A guard's message: a beat, or that its rank left or died."""
        known = self.ranks[rank]
        known.heard = now
        if message["marks"] != known.marks:
            known.marks, known.moved = message["marks"], now
        known.doing, known.slow, known.state = message["doing"], message["slow"], message["state"]
        if message["event"] == "left":
            known.left = True
            if message["reason"] is not None:
                line = f"{self._name(rank)} stopped while {known.doing}: {message['reason']}"
                self.news.append((FAILED, now, now + LEAVE_SECONDS, line))
        elif message["event"] == "died":
            known.left = True
            line = f"{self._name(rank)} was killed or crashed while {known.doing}"
            self.news.append((DIED, now, now + SETTLE_SECONDS, line))

    def disconnected(self, rank: int, now: float) -> None:
        known = self.ranks[rank]
        if not known.left:
            known.left = True
            line = f"{self._name(rank)} is gone, last seen {known.doing}: its host or all of its processes went down"
            self.news.append((LOST, now, now + SETTLE_SECONDS, line))

    def all_left(self) -> bool:
        """Whether every rank has ended of itself."""
        return all(known.left for known in self.ranks.values()) and all(kind == FAILED for kind, *_ in self.news)

    def verdict(self, now: float) -> str | None:
        """Why the job is lost, in one line; None while it is not."""
        if any(counts <= now for _, _, counts, _ in self.news):
            return min(self.news)[3]
        absent = [rank for rank in range(self.world) if rank not in self.ranks]
        if absent and now - self.now > self.timeout:
            return f"{_ranks(absent)} of {self.world} did not start within {self.timeout:g} s"
        active = {rank: known for rank, known in self.ranks.items() if not known.left}
        silent = [rank for rank, known in active.items() if now - known.heard > self.timeout]
        if silent:
            known = self.ranks[silent[0]]
            others = f" ({len(silent)} ranks are silent)" if len(silent) > 1 else ""
            return (
                f"{self._name(silent[0])} has not been heard of for {now - known.heard:.0f} s, last seen "
                f"{known.doing}: its host is down or its link is cut{others}"
            )
        return None if absent or not active else self._stuck(active, now)

    def _stuck(self, active: dict[int, Rank], now: float) -> str | None:
        still = now - max(known.moved for known in active.values())
        if still <= self.timeout * (SLOW if any(known.slow for known in active.values()) else 1):
            return None
        halted = [rank for rank, known in active.items() if known.state in ("T", "D")]
        least = min(known.marks for known in active.values())
        behind = halted or [rank for rank, known in active.items() if known.marks == least]
        known = self.ranks[behind[0]]
        if len(behind) == len(active):
            return f"no rank has come further for {still:.0f} s: all are {known.doing}"
        state = {"T": " (its process is stopped)", "D": " (its process waits for a disk)"}.get(known.state, "")
        return f"{self._name(behind[0])} has been {known.doing} for {now - known.moved:.0f} s{state}: the others wait"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.ranks[rank].host}"


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown} ({len(numbers)})"


class Court:
    """Rank 0's guard as a server: hears every guard, and tells each that it lives, or the verdict."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._token: str = settings["token"]
        self._beat: float = settings["beat"]
        self._judge = Judge(world=settings["world"], timeout=settings["limit"], now=time.monotonic())
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, address: str | None) -> int:
        """Listen on `address`, or where this host does not have it on all, on a port that the system chooses.

        Returns:
            The port.
        """
        try:
            self._server = await asyncio.start_server(self._hear, address or "0.0.0.0", 0)
        except OSError:
            self._server = await asyncio.start_server(self._hear, "0.0.0.0", 0)
        self._telling = asyncio.create_task(self._tell())
        return int(self._server.sockets[0].getsockname()[1])

    async def wait_until_all_left(self) -> None:
        """Unless one of them was lost: then the verdict comes."""
        while not self._judge.all_left():
            await asyncio.sleep(0.1)

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = json.loads(await reader.readline())
            if not hmac.compare_digest(str(hello["token"]), self._token):
                raise ValueError("another job's guard, or none at all")
            rank = int(hello["rank"])
        except (ValueError, KeyError, TypeError, OSError):
            writer.close()
            return
        self._judge.arrived(rank, str(hello["host"]), time.monotonic())
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                self._judge.heard(rank, json.loads(line), time.monotonic())
        except OSError:
            pass  # as good as the end of the connection
        finally:
            self._writers.discard(writer)
            self._judge.disconnected(rank, time.monotonic())
            writer.close()

    async def _tell(self) -> None:
        verdict, told = None, 0.0
        while verdict is None:
            await asyncio.sleep(min(0.2, self._beat))
            verdict = self._judge.verdict(time.monotonic())
            if verdict or time.monotonic() - told >= self._beat:
                told = time.monotonic()
                for writer in self._writers:
                    writer.write(json.dumps({"verdict": verdict}).encode() + b"\n")


class Guard:
    """One rank's guard, from its first mark to its end or the verdict."""

    def __init__(self, settings: dict[str, Any], court: Court | None) -> None:
        self._settings = settings
        self._court = court
        self._rank_pid: int = settings["pid"]
        self._mark: dict[str, Any] = {"marks": 0, "doing": "starting", "slow": True}
        self._left: dict[str, Any] | None = None

    async def run(self, pipe: asyncio.StreamReader) -> None:
        settings = self._settings
        reader, writer = await asyncio.open_connection(settings["address"], settings["port"])
        self._send(writer, {key: settings[key] for key in ("token", "rank", "host")})
        watching = asyncio.create_task(self._watch(pipe))
        beating = asyncio.create_task(self._beat(writer))
        judging = asyncio.create_task(self._listen(reader))
        await asyncio.wait({watching, judging}, return_when=asyncio.FIRST_COMPLETED)
        beating.cancel()
        if watching.done():
            self._report(writer, "died" if self._left is None else "left")
            await self._wait_for_verdict(judging)
        verdict = judging.result() if judging.done() else None
        if verdict and settings["local_rank"] == 0:
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
        """The verdict, or that rank 0's guard is gone or silent; None where it is gone after this rank has left."""
        court, limit = f"rank 0 on {self._settings['address']}", self._settings["limit"]
        verdict = None
        try:
            while verdict is None:
                line = await asyncio.wait_for(reader.readline(), timeout=limit)
                verdict = json.loads(line)["verdict"] if line else ""
        except TimeoutError:
            return f"{court} has not been heard of for {limit:g} s: its host is down or a link is cut"
        except OSError:
            verdict = ""
        if verdict == "":
            return f"{court} is gone: its host or all of its processes went down" if self._left is None else None
        return str(verdict)

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
        settings["port"] = await court.open(settings["listen"])
        print(settings["port"], flush=True)
    await Guard(settings, court).run(pipe)
    os._exit(0)  # the open connections need no orderly end, and each would complain


if __name__ == "__main__":
    # Launchers signal a rank's children too; a guard ends with its rank.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    asyncio.run(main())
