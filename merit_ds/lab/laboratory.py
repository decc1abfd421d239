# SPDX-License-Identifier: Apache-2.0
"""The loop that does a study's runs: starts what is ready, collects what has ended, until nothing is left.

All of its state is in the study's folder, so it may be killed at any moment, started again, or be several processes:

    DIR/study.yaml      the study, for the reader and the report
    DIR/corpus*         links to the data that was given, with corpus.json telling its sha256
    DIR/runs/ID/        a run: recipe.yaml, deepspeed.json, what the trainer writes, and result.json once it is finished
    DIR/results.jsonl   every finished run's result
    DIR/tuning.json     every list of learning rates with its losses and its best
"""

import fnmatch
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merit_ds.lab.attempts import is_locked, kills_in_a_row, note_retry, try_lock
from merit_ds.lab.points import Expansion, Point, expand
from merit_ds.lab.recipe import RESULT, RunPlan, check_plan, plan_run, write_plan
from merit_ds.lab.result import (
    FAILED,
    final_loss,
    last_error,
    losses_of,
    read_results,
    write_result,
    write_results,
    write_tunings,
)
from merit_ds.lab.status import describe_doubts
from merit_ds.lab.study import Study
from merit_ds.lab.trainer_process import Machine, TrainerProcess
from merit_ds.training.checkpoint_folder import UNFINISHED
from merit_ds.training.interrupt import Interrupt
from merit_ds.training.report import RunFolder

POLL_SECONDS = 0.5
MOST_KILLS = 3
"""A run that SIGKILL ends so often in a row, without a new checkpoint between, has failed: memory does not suffice."""


@dataclass
class State:
    """What a display shows.

    Attributes:
        results: id -> result of the finished runs, those of other processes included.
        running: this process's, in the order of their start.
        elsewhere: ids of runs that another process works on.
        todo: runs that can be started.
        expansion: the whole study.
    """

    expansion: Expansion
    results: dict[str, dict[str, Any]]
    running: list[TrainerProcess] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    todo: list[RunPlan] = field(default_factory=list)
    stopping: bool = False


class Laboratory:
    """One process's work on a study.

    Args:
        source: the study's folder, which its recipes are relative to.
        output: the folder of its runs.
        data: what identifies the corpus, for the results.
        only: names of grids and patterns of ids; empty: all runs.
        retry_failed: do runs again that failed (not those that diverged).
        tell: called with a line for each event.
        show: called with the state, about twice a second.
    """

    def __init__(
        self,
        study: Study,
        *,
        source: Path,
        output: Path,
        machine: Machine,
        data: dict[str, Any],
        vocab: bool = False,
        only: list[str],
        retry_failed: bool = False,
        tell: Callable[[str], None],
        show: Callable[[State], None],
    ) -> None:
        self.study, self.output, self.machine = study, output, machine
        self._source, self._data, self._vocab, self._only = source, data, vocab, only
        self._tell, self._show = tell, show
        self._plans: dict[str, RunPlan] = {}
        self._given_up: set[str] = set()
        self._told: set[str] = set()
        self._stillborn: list[tuple[Point, str]] = []
        self._retry: set[str] = self._failed() if retry_failed else set()
        self.state = State(Expansion([], {}, {}, {}), {})
        self._refresh()

    def run(self) -> State:
        """Do every run that is not finished; returns the last state. SIGINT and SIGTERM stop it, with checkpoints."""
        with Interrupt() as interrupt:
            while True:
                if interrupt.received and not self.state.stopping:
                    self._stop()
                if self._collect():
                    self._publish()
                if not self.state.stopping:
                    self._start()
                if not self.state.running and (self.state.stopping or not self._left()):
                    break
                self._show(self.state)
                time.sleep(POLL_SECONDS)
        self._publish()
        return self.state

    def unfinished(self) -> bool:
        """Whether any chosen run has no result yet, or never will for want of a learning rate.

        Of a part of the study a run that another process has is that one's to finish.
        """
        state = self.state
        rest = not self._only and (state.expansion.waiting or state.expansion.hopeless)
        finished = state.results.keys() | self.left_to_others()
        return bool(rest) or any(self._is_chosen(p) and p.id not in finished for p in state.expansion.points)

    def left_to_others(self) -> list[str]:
        """Ids of unfinished runs of a part of the study that another process works on."""
        return [id_ for id_ in self.state.elsewhere if self._only and id_ not in self.state.results]

    def free(self) -> list[str]:
        """Ids of the runs that can be started and that no process works on."""
        return [p.point.id for p in self.state.todo if not is_locked(self._folder(p.point.id))]

    def _left(self) -> list[RunPlan]:
        """What there is to start or to wait for; of a part of the study nothing depends on other processes' runs."""
        return [p for p in self.state.todo if not (self._only and p.point.id in self.state.elsewhere)]

    def _failed(self) -> set[str]:
        """Ids of the chosen runs whose result is that they failed."""
        results = read_results(self.output)
        points = expand(self.study, losses_of(results)).points
        return {p.id for p in points if self._is_chosen(p) and results.get(p.id, {}).get("status") == FAILED}

    def plan(self, point: Point) -> RunPlan:
        """The point's files and steps. Raises: InputError: they are not valid, or the run's folder holds others."""
        if point.id not in self._plans:
            plan = plan_run(self.study, point, folder=self._source, ranks=self.machine.ranks, vocab=self._vocab)
            check_plan(self._folder(point.id), plan)
            self._plans[point.id] = plan
        return self._plans[point.id]

    def _folder(self, id_: str) -> Path:
        return self.output / "runs" / id_

    def _refresh(self) -> None:
        """Read the results anew, and find out which runs they make known."""
        state = self.state
        results = read_results(self.output)
        state.results = {i: r for i, r in results.items() if i not in self._retry or r["status"] != FAILED}
        state.expansion = expand(self.study, losses_of(state.results))
        busy = {process.plan.point.id for process in state.running}
        chosen = [point for point in state.expansion.points if self._is_chosen(point)]
        plans = [self.plan(point) for point in chosen]
        state.todo = [p for p in plans if p.point.id not in state.results.keys() | busy | self._given_up]
        state.elsewhere = [p.point.id for p in state.todo if p.point.id in state.elsewhere]
        for tuning in state.expansion.tunings.values():
            for text in describe_doubts(tuning):
                if text not in self._told:
                    self._told.add(text)
                    self._tell(text)

    def _publish(self) -> None:
        self._refresh()
        write_results(self.output)
        write_tunings(self.output, self.state.expansion.tunings)

    def _is_chosen(self, point: Point) -> bool:
        return not self._only or any(name == point.grid or fnmatch.fnmatch(point.id, name) for name in self._only)

    def _start(self) -> None:
        """Fill the free places with runs that no other process has."""
        state = self.state
        if len(state.running) == self.machine.jobs:
            return
        state.elsewhere, stale = [], False
        for plan in list(state.todo):
            folder = self._folder(plan.point.id)
            if len(state.running) == self.machine.jobs:  # the display wants to know of the others too
                state.elsewhere += [plan.point.id] * is_locked(folder)
                continue
            lock = try_lock(folder)
            if lock is None:
                state.elsewhere.append(plan.point.id)
                continue
            state.todo.remove(plan)
            if plan.point.id in self._retry:  # unless another process has done so by now
                if plan.point.id in self._failed():
                    (folder / RESULT).unlink()
                    note_retry(folder)
                self._retry.discard(plan.point.id)
            if (folder / RESULT).exists():  # another process has finished it since the last look
                os.close(lock)
                stale = True
                continue
            write_plan(folder, plan)
            slot = min(set(range(self.machine.jobs)) - {process.slot for process in state.running})
            state.running.append(TrainerProcess(plan, folder, lock=lock, slot=slot, machine=self.machine))
            self._tell(f"started   {plan.point.id}, {plan.steps} steps")
        if stale:
            self._publish()

    def _collect(self) -> bool:
        """Take the runs that have ended; returns whether there were any."""
        ended = [process for process in self.state.running if process.ended()]
        for process in ended:
            self.state.running.remove(process)
            process.note_end()
            id_, reason = process.plan.point.id, self._why_again(process)
            if reason is None:
                self._finish(process)
            elif process.port_taken:
                self._tell(f"again     {id_}: another process took its port")
            else:
                self._given_up.add(id_)
                self._tell(f"stopped   {id_} {reason}; run the same command to go on with it")
            process.release()
        return bool(ended)

    def _why_again(self, process: TrainerProcess) -> str | None:
        """Why what a trainer has come to is no result yet; None: it is one."""
        if process.succeeded:
            rows = RunFolder(process.folder).rows()
            return None if final_loss(rows, steps=process.plan.steps) is not None else "by a signal"
        if process.killed and kills_in_a_row(process.folder) < MOST_KILLS:
            return f"by {process.killed}"
        if process.port_taken or (process.asks_again and not self.state.stopping):
            return f"for now: {last_error(process.folder)}"
        return "by a signal" if self.state.stopping else None

    def _finish(self, process: TrainerProcess) -> None:
        plan, folder, machine = process.plan, process.folder, self.machine
        made = {"ranks": machine.ranks, "threads": machine.threads, "jobs": machine.jobs, "data": self._data}
        how = process.crashed
        if process.killed:
            how = f"{process.killed}, {kills_in_a_row(folder)} times without a checkpoint between; out of memory?"
        result = write_result(self.study, plan, folder, succeeded=process.succeeded, crashed=how, made=made)
        if not self.study.keep_checkpoints and result["status"] != FAILED:
            remove_checkpoints(folder)
        loss = result["final_valid_loss"]
        text = result["reason"] or f"validation loss {loss:.4f}"
        self._tell(f"{result['status']:9} {plan.point.id}: {text} ({result['wall_seconds']:.0f} s)")
        self._blame_machine(plan.point, result)

    def _blame_machine(self, point: Point, result: dict[str, Any]) -> None:
        """Stop where runs of several optimizers fail in a row before their first step, for one reason: not their own.

        Damaged data or a broken installation would otherwise make every run of the study a failed one. These are taken
        back.
        """
        reason = re.sub(r"\d+", "", str(result["reason"]))
        if result["status"] != FAILED or result["initial_valid_loss"] is not None:
            self._stillborn = []
            return
        self._stillborn = [(other, why) for other, why in self._stillborn if why == reason] + [(point, reason)]
        points = [point for point, _ in self._stillborn]
        if len(points) >= 3 and len({point.cell.optimizer for point in points}) > 1:
            self._tell(f"taken back: {len(points)} runs failed alike before their first step, which is not their fault")
            for point in points:
                (self._folder(point.id) / RESULT).unlink()
            self._stop()

    def _stop(self) -> None:
        self.state.stopping = True
        self._tell(f"stopping: {len(self.state.running)} runs save a checkpoint and end")
        for process in self.state.running:
            process.stop()


def remove_checkpoints(folder: Path) -> None:
    """Remove a run's checkpoints; its report, metrics and curve stay."""
    for path in [*folder.glob("global_step*"), *folder.glob(f"{UNFINISHED}*")]:
        shutil.rmtree(path, ignore_errors=True)
    for name in ("latest", "zero_to_fp32.py", "zero_to_torch.py"):
        (folder / name).unlink(missing_ok=True)
