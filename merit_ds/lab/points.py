# SPDX-License-Identifier: Apache-2.0
"""From a study and the losses so far to the runs that are known now: pure functions.

A grid with `lr: best` waits for the grids that list learning rates: it takes the rate with the lowest final validation
loss (the mean over their seeds) of the same optimizer, batch, model and budget, chosen as the report chooses it. A run
that diverged counts as an infinite loss; one that failed tells nothing of its rate and takes no part. A best rate at
the end of those that are left proves little, so that is recorded, and with `extend` the list grows until the best is
inside; downwards where every rate diverged. With `within` the rates that come near to the best are run with the grid's
seeds too, and the mean over these decides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from merit_ds.errors import InputError
from merit_ds.lab.report_statistics import Outcome, best_lr
from merit_ds.lab.study import BEST, Grid, Study, slug


@dataclass(frozen=True)
class Cell:
    """What shares one tuning of the learning rate. `batch` is in sequences, `tokens` the budget of a run."""

    optimizer: str
    model: str
    batch: int
    tokens: int

    def __str__(self) -> str:
        model = "" if self.model == "default" else f", model {self.model}"
        return f"{self.optimizer} at batch {self.batch}{model}"


@dataclass(frozen=True)
class Point:
    """One run. `lr` is the peak learning rate; `id` is also its folder's name."""

    cell: Cell
    lr: float
    seed: int
    id: str
    grid: str
    """The first grid that asks for it."""


@dataclass(frozen=True)
class Tuning:
    """What is known of a cell's learning rates.

    Attributes:
        losses: rate -> final validation loss, mean over the seeds that did not fail, infinite where one diverged,
            NaN where all failed; None where a run is not finished. Ascending rates.
        best: the rate with the lowest loss, once all are finished and one is finite.
        edge: "low" or "high" where the best is the first or last of several rates, failed ones left out.
        added: rates that `extend` has added.
        failed: ids of the runs that failed.
    """

    cell: Cell
    losses: dict[float, float | None]
    best: float | None
    edge: str | None
    added: int
    failed: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether every rate has its loss."""
        return None not in self.losses.values()

    @property
    def diverged(self) -> bool:
        """Whether every run that did not fail diverged: then the best rate, if there is one, lies below."""
        return self.finished and self.best is None and math.inf in self.losses.values()


@dataclass(frozen=True)
class Expansion:
    """The runs of a study as far as they are known.

    Attributes:
        points: every run whose learning rate is known, in the order of the study, finished ones included.
        waiting: cell -> number of its runs that wait for the best learning rate of `tunings`.
        hopeless: like `waiting`, but every learning rate diverged or failed.
        tunings: by the cell whose rates are listed.
    """

    points: list[Point]
    waiting: dict[Cell, int]
    hopeless: dict[Cell, int]
    tunings: dict[Cell, Tuning]


def expand(study: Study, losses: Mapping[str, float]) -> Expansion:
    """The study's runs, given the finished ones.

    Args:
        losses: id -> final validation loss of each finished run; infinity where it diverged, NaN where it failed.

    Raises:
        InputError: a grid asks for the best of rates that no grid lists.
    """
    tunings, lists = _tunings(study, losses)
    points: dict[str, Point] = {}
    for listed in lists.values():
        for point in listed:
            points.setdefault(point.id, point)
    waiting: dict[Cell, int] = {}
    hopeless: dict[Cell, int] = {}
    for grid in study.grids:
        if grid.lr == BEST:
            for cell in _cells(study, grid):
                tuning = tunings.get(_source(study, cell))
                if tuning is None:
                    raise InputError(
                        f"grid {grid.name!r}: no grid lists learning rates for {_source(study, cell)} "
                        f"({cell.tokens} tokens), of which it wants the best"
                    )
                if tuning.best is not None:
                    for point in _points(study, grid, cell, [tuning.best]):
                        points.setdefault(point.id, point)
                elif not any(point.grid == grid.name for point in lists.get(cell, ())):
                    target = hopeless if tuning.finished else waiting
                    target[cell] = target.get(cell, 0) + len(grid.seed)
    return Expansion(list(points.values()), waiting, hopeless, tunings)


def _tunings(study: Study, losses: Mapping[str, float]) -> tuple[dict[Cell, Tuning], dict[Cell, list[Point]]]:
    """The state of each list of learning rates, and its runs, those that `extend` and `within` ask for included."""
    lists: dict[Cell, list[Point]] = {}
    extend: dict[Cell, int] = {}
    closer: dict[Cell, list[Grid]] = {}
    for grid in study.grids:
        for cell in _cells(study, grid):
            if grid.lr != BEST:
                rates = grid.learning_rates(cell.optimizer)
                lists.setdefault(cell, []).extend(_points(study, grid, cell, rates))
                extend[cell] = max(extend.get(cell, 0), grid.extend)
            elif grid.within:
                closer.setdefault(cell, []).append(grid)
    tunings = {
        cell: _tune(study, listed, losses, extend=extend[cell], closer=closer.get(cell, []))
        for cell, listed in lists.items()
    }
    return tunings, lists  # to which _tune has added


def _cells(study: Study, grid: Grid) -> list[Cell]:
    tokens = grid.tokens or study.tokens
    return [
        Cell(optimizer, model, batch, tokens)
        for model in study.models_of(grid)
        for batch in grid.batch
        for optimizer in grid.optimizer
    ]


def _source(study: Study, cell: Cell) -> Cell:
    """Whose best learning rate the cell takes."""
    optimizer = study.optimizers[cell.optimizer].lr_of or cell.optimizer
    return Cell(optimizer, study.models[cell.model].lr_of or cell.model, cell.batch, cell.tokens)


def _points(study: Study, grid: Grid, cell: Cell, rates: list[float]) -> list[Point]:
    seeds = list(dict.fromkeys(grid.seed))
    return [Point(cell, rate, seed, _id(study, cell, rate, seed), grid.name) for rate in rates for seed in seeds]


def _id(study: Study, cell: Cell, rate: float, seed: int) -> str:
    """Readable, unique, and the same whatever else is in the study."""
    parts = [slug(cell.optimizer), f"b{cell.batch}", f"lr{rate:.6g}", f"s{seed}"]
    if cell.model != "default":
        parts.insert(0, slug(cell.model))
    if cell.tokens != study.tokens:
        parts.append(f"t{cell.tokens}")
    return "-".join(parts)


def _tune(study: Study, listed: list[Point], losses: Mapping[str, float], *, extend: int, closer: list[Grid]) -> Tuning:
    """Compare the rates in `listed`, to which rates are added, at most `extend`, while the best is at an edge.

    A list's step goes on from its end; from a single rate it is 2. The runs that `closer`, grids with `within`, ask for
    are added at the end.
    """
    cell, grid, added = listed[0].cell, listed[0].grid, 0
    seeds = list(dict.fromkeys(point.seed for point in listed))
    while True:
        tuning = _compare(cell, listed, losses, added=added)
        close = [point for other in closer for point in _close(study, other, tuning)]
        if close:
            tuning = _compare(cell, listed + close, losses, added=added)
        edge = "low" if tuning.diverged else tuning.edge
        if edge is None or added == extend:
            listed += close
            return tuning
        rates = list(tuning.losses) if edge == "low" else list(tuning.losses)[::-1]
        rate = float(f"{rates[0] * rates[0] / (rates[1] if len(rates) > 1 else 2 * rates[0]):.6g}")
        listed += [Point(cell, rate, seed, _id(study, cell, rate, seed), grid) for seed in seeds]
        added += 1


def _close(study: Study, grid: Grid, tuning: Tuning) -> list[Point]:
    """The runs, with the grid's seeds, of the rates that are `within` of the best; none where it is alone."""
    lowest = None if tuning.best is None else tuning.losses[tuning.best]
    if lowest is None:
        return []
    close = [rate for rate, loss in tuning.losses.items() if loss is not None and loss <= lowest + grid.within]
    return _points(study, grid, tuning.cell, close) if len(close) > 1 else []


def _compare(cell: Cell, listed: list[Point], losses: Mapping[str, float], *, added: int) -> Tuning:
    points = sorted({point.id: point for point in listed}.values(), key=lambda point: point.lr)
    found: dict[float, list[float | None]] = {}
    for point in points:
        found.setdefault(point.lr, []).append(losses.get(point.id))
    means = {rate: _mean(of_seeds) for rate, of_seeds in found.items()}
    failed = tuple(point.id for point in points if math.isnan(losses.get(point.id, 0.0)))
    if None in means.values():
        return Tuning(cell, means, None, None, added, failed)
    outcomes = [Outcome(point.lr, point.seed, losses[point.id]) for point in points if point.id not in failed]
    best = best_lr(outcomes)
    if best is None or len(means) == 1:
        return Tuning(cell, means, None if best is None else best.lr, None, added, failed)
    edge = {None: None, "lowest": "low", "only": "low", "highest": "high"}[best.edge]
    return Tuning(cell, means, best.lr, edge, added, failed)


def _mean(losses: list[float | None]) -> float | None:
    """Over the seeds that did not fail; NaN where all did, None where one is not finished."""
    known = [loss for loss in losses if loss is not None]
    left = [loss for loss in known if not math.isnan(loss)]
    if len(known) < len(losses):
        return None
    return sum(left) / len(left) if left else math.nan
