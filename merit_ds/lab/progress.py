# SPDX-License-Identifier: Apache-2.0
"""What runs, what is left, and when it will be done: estimates, and their display on a terminal or in a log."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TextIO

from merit_ds.lab.laboratory import State
from merit_ds.lab.points import Cell
from merit_ds.lab.result import DIVERGED, DONE, FAILED, last_iteration
from merit_ds.lab.trainer_process import Machine, TrainerProcess

_Known = dict[tuple[Any, ...], list[float]]
"""Seconds a token, by model and batch, model, or nothing."""
PLAIN_SECONDS = 60.0
"""Between two lines where there is no terminal."""


class Pace:
    """Seconds of a run, from those that are done: of the same model and batch, else of the same model, else of any.

    A finished run tells its seconds a token, start and evaluations included, one that goes on if it has done a tenth.
    Those that another machine did, or this one otherwise shared, count only where there are no others.
    """

    def __init__(
        self, results: Mapping[str, Mapping[str, Any]], running: Sequence[TrainerProcess], machine: Machine
    ) -> None:
        self._here: _Known = {}
        self._elsewhere: _Known = {}
        for result in results.values():
            point = result["point"]
            if result["status"] == DONE and result["wall_seconds"]:
                known = self._here if _alike(result, machine) else self._elsewhere
                _learn(known, point["model"], point["batch"], result["wall_seconds"] / point["tokens"])
        for process in running:
            cell, seconds = process.plan.point.cell, _whole(process)
            if seconds is not None:
                _learn(self._here, cell.model, cell.batch, seconds / cell.tokens)

    def seconds(self, cell: Cell) -> float | None:
        """Of one run; None as long as nothing is known."""
        for known in (self._here, self._elsewhere):
            for key in ((cell.model, cell.batch), (cell.model,), ()):
                if found := known.get(key):
                    return cell.tokens * sum(found) / len(found)
        return None


def _learn(known: _Known, model: str, batch: int, seconds_a_token: float) -> None:
    for key in ((model, batch), (model,), ()):
        known.setdefault(key, []).append(seconds_a_token)


def _alike(result: Mapping[str, Any], machine: Machine) -> bool:
    """Whether the run had a share like that of this machine's runs, of a device of the same kind."""
    share = {"ranks": machine.ranks, "threads": machine.threads, "jobs": machine.jobs}
    on_cpu = str(result.get("device")).startswith("cpu")
    return on_cpu == (not machine.gpus) and all(result.get(key) == value for key, value in share.items())


def remaining_seconds(state: State, machine: Machine) -> float | None:
    """Seconds of one job that the rest takes, runs that wait for a learning rate included; None: unknown."""
    pace = Pace(state.results, state.running, machine)
    parts = [_left(process, pace) for process in state.running]
    parts += [pace.seconds(plan.point.cell) for plan in state.todo if plan.point.id not in state.elsewhere]
    for cell, count in state.expansion.waiting.items():
        seconds = pace.seconds(cell)
        parts.append(None if seconds is None else seconds * count)
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _left(process: TrainerProcess, pace: Pace) -> float | None:
    """Of a run that goes on: by its own speed, if it has done a tenth, else by that of the others."""
    seconds = _whole(process) or pace.seconds(process.plan.point.cell)
    return None if seconds is None else seconds * (1 - last_iteration(process.folder) / process.plan.steps)


def _whole(process: TrainerProcess) -> float | None:
    """Seconds that all of a run takes by its own speed; None before it has done a tenth."""
    done = (last_iteration(process.folder) - process.begun_at) / process.plan.steps
    return (time.monotonic() - process.started) / done if done >= 0.1 else None


def summary(state: State, machine: Machine) -> str:
    """One line: what is done, goes on, and is left, and when it will be done."""
    counts = {status: 0 for status in (DONE, DIVERGED, FAILED)}
    known = {point.id for point in state.expansion.points}
    for id_, result in state.results.items():
        counts[result["status"]] += id_ in known
    waiting = sum(state.expansion.waiting.values())
    parts = [f"{count} {status}" for status, count in counts.items() if count or status == DONE]
    parts += [f"{len(state.running)} running", f"{len(state.todo) - len(state.elsewhere)} to do"]
    parts += [f"{len(state.elsewhere)} in another process"] if state.elsewhere else []
    parts += [f"{waiting} wait for a best learning rate"] if waiting else []
    return ", ".join(parts) + finish(remaining_seconds(state, machine), machine)


def finish(seconds: float | None, machine: Machine) -> str:
    """When the rest will be done and what it costs, as the end of a line."""
    if not seconds:
        return "" if seconds == 0 else "; no estimate before a tenth of a run is done"
    end = datetime.now() + timedelta(seconds=seconds / machine.jobs)
    cost = (
        f"{seconds * machine.ranks / 3600:.1f} GPU-hours"
        if machine.gpus
        else f"{seconds * machine.cores / 3600:.1f} core-hours"
    )
    when = f"{end:%a %H:%M}" if seconds / machine.jobs < 6 * 86400 else f"{end:%d %b %H:%M}"
    return f"; {duration(seconds / machine.jobs)} left ({cost}), done about {when}"


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Display:
    """One block that is drawn anew on a terminal; elsewhere a line now and then. Events are lines on both."""

    def __init__(self, machine: Machine, *, stream: TextIO | None = None) -> None:
        self._machine = machine
        self._stream = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty()
        self._drawn = 0
        self._next = time.monotonic() + (0 if self._terminal else PLAIN_SECONDS)

    def tell(self, line: str) -> None:
        """Write an event's line, above the block."""
        self.clear()
        print(f"{datetime.now():%H:%M:%S} {line}", file=self._stream, flush=True)

    def show(self, state: State) -> None:
        """Draw the block, at most once a second; or write the summary, once a minute."""
        if time.monotonic() < self._next:
            return
        if not self._terminal:
            self._next = time.monotonic() + PLAIN_SECONDS
            self.tell(summary(state, self._machine))
            return
        self._next = time.monotonic() + 1
        width = os.get_terminal_size(self._stream.fileno()).columns
        lines = [line[: width - 1] for line in [summary(state, self._machine), *map(_bar, state.running)]]
        self.clear()
        print("\n".join(lines), file=self._stream, flush=True)
        self._drawn = len(lines)

    def clear(self) -> None:
        """Remove the block."""
        if self._drawn:
            print(f"\x1b[{self._drawn}F\x1b[J", end="", file=self._stream)
            self._drawn = 0


def _bar(process: TrainerProcess) -> str:
    steps = process.plan.steps
    done = last_iteration(process.folder)
    full = 24 * done // steps
    since = duration(time.monotonic() - process.started)
    return f"  [{'#' * full}{'.' * (24 - full)}] {done}/{steps}  {process.plan.point.id}  {since}"
