# SPDX-License-Identifier: Apache-2.0
"""When a job is lost, and by whom: told by times and messages alone, without any process or socket."""

from dataclasses import dataclass, field
from typing import Any

SETTLE_SECONDS = 1.0
"""From the first bad news to the verdict: a killed rank is the cause of its neighbours' broken connections."""
GRACE_SECONDS = 3.0
"""From the verdict to the kill: a rank that is about to end prints why, or writes its last."""
LEAVE_SECONDS = 10.0
"""In which all ranks end after one that reported an error, before its guard takes them for stuck."""
SLOW = 6
"""How many times longer starting, loading and saving may take than a part of a step."""
LEAVING = "leaving"
"""What a rank does after the last collective: from then on it no longer matters who is gone."""
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
    pulse: int = 0
    """Counts signs of life within one of these, of which ranks may give different numbers."""
    doing: str = ""
    slow: bool = False
    moved: float = 0.0
    """When it began that, or gave the last such sign."""
    state: str = ""
    """Of its process, as /proc has it: T stopped, D waiting for a disk."""
    left: bool = False


@dataclass
class Judge:
    """Hears of all ranks, and says when the job is lost and by whom. Times are seconds of one clock.

    Args:
        world: number of ranks.
        timeout: seconds of silence, or without progress, after which the job is lost.
        beat: seconds between two messages of a guard.
        now: when the job began.
    """

    world: int
    timeout: float
    beat: float
    now: float
    ranks: dict[int, Rank] = field(default_factory=dict)
    news: list[tuple[int, float, float, str]] = field(default_factory=list)
    """(kind, when it came, when it counts, the line)."""

    def arrived(self, rank: int, host: str, now: float) -> None:
        known = self.ranks.get(rank)
        if known is not None and not known.left:
            line = f"rank {rank} came from {known.host} and again from {host}: two nodes have the same number"
            self.news.append((DIED, now, now, line))
        self.ranks[rank] = Rank(host=host, heard=now, moved=now)

    def heard(self, rank: int, message: dict[str, Any], now: float) -> None:
        """A guard's message: a beat, or that its rank left or died."""
        known = self.ranks[rank]
        known.heard = now
        if (message["marks"], message["pulse"]) != (known.marks, known.pulse):
            known.marks, known.pulse, known.moved = message["marks"], message["pulse"], now
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
        """Whether every rank has come and ended of itself."""
        left = len(self.ranks) == self.world and all(known.left for known in self.ranks.values())
        return left and all(kind == FAILED for kind, *_ in self.news)

    def verdict(self, now: float) -> str | None:
        """Why the job is lost, in one line; None while it is not."""
        active = {rank: known for rank, known in self.ranks.items() if not known.left}
        if any(counts <= now for _, _, counts, _ in self.news):
            # A host that lost its power breaks no connection: its neighbours fail first, and only look like the cause.
            return self._silence(active, now, max(4 * self.beat, LEAVE_SECONDS)) or min(self.news)[3]
        absent = [rank for rank in range(self.world) if rank not in self.ranks]
        if absent and now - self.now > self.timeout:
            return f"{_ranks(absent)} of {self.world} did not start within {self.timeout:g} s"
        silence = self._silence(active, now, self.timeout)
        return silence or (None if absent or not active else self._stuck(active, now))

    def _silence(self, active: dict[int, Rank], now: float, limit: float) -> str | None:
        silent = [rank for rank, known in active.items() if now - known.heard > limit]
        if not silent:
            return None
        known = self.ranks[silent[0]]
        others = f" ({len(silent)} ranks are silent)" if len(silent) > 1 else ""
        return (
            f"{self._name(silent[0])} has not been heard of for {now - known.heard:.0f} s, last seen "
            f"{known.doing}: its host is down or its link is cut{others}"
        )

    def _stuck(self, active: dict[int, Rank], now: float) -> str | None:
        still = now - max(known.moved for known in active.values())
        # However slow its work may be, a process that was stopped does none of it.
        slow = any(known.slow for known in active.values()) and all(known.state != "T" for known in active.values())
        if still <= self.timeout * (SLOW if slow else 1):
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
