# SPDX-License-Identifier: Apache-2.0
"""From a study and the losses so far to the runs that are known now: pure functions.

A grid with `lr: best` waits for the grids that list learning rates: it takes the rate with the lowest final validation
loss (the mean over their seeds) of the same optimizer, batch, model and budget, chosen as the report chooses it. A run
that diverged counts as an infinite loss; one that failed tells nothing of its rate and takes no part. A best rate at
the end of those that are left proves little, so that is recorded, and with `extend` the list grows until the best is
inside; downwards where every rate diverged. With `within` the rates that come near to the best are run with the grid's
seeds too, and the mean over these decides; then rates that come near to that mean, until there is none.
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
    seeds: dict[Cell, list[list[int]]] = {}
    for grid in study.grids:
        for cell in _cells(study, grid):
            seeds.setdefault(cell, []).append(grid.seed)
            if grid.lr != BEST:
                rates = grid.learning_rates(cell.optimizer)
                lists.setdefault(cell, []).extend(_points(study, grid, cell, rates))
                extend[cell] = max(extend.get(cell, 0), grid.extend)
            elif grid.within:
                closer.setdefault(cell, []).append(grid)
    tunings = {
        cell: _Tuner(study, listed, losses, extend=extend[cell], closer=closer.get(cell, []), seeds=seeds[cell]).tune()
        for cell, listed in lists.items()
    }
    return tunings, lists  # to which they have added


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


class _Tuner:
    """Compares the rates of one list, as the report compares them: another choice here would give the ablations another
    rate than the report's best.

    Args:
        listed: the list's runs, to which `tune` adds.
        extend: rates that may be added.
        closer: the grids with `within`.
        seeds: of each grid. Where a rate has run with all of them they count, whichever grid asked for them; some
            alone would let the order in which runs finish decide what else is run.
    """

    def __init__(
        self,
        study: Study,
        listed: list[Point],
        losses: Mapping[str, float],
        *,
        extend: int,
        closer: list[Grid],
        seeds: list[list[int]],
    ) -> None:
        self._study, self._listed, self._losses = study, listed, losses
        self._extend, self._closer, self._seeds = extend, closer, seeds
        self._cell, self._grid = listed[0].cell, listed[0].grid

    def tune(self) -> Tuning:
        """Add rates while the best is at an edge, and the seeds of those close to it, until nothing is to be added.

        A list's step goes on from its end; from a single rate it is 2.
        """
        added, seeds = 0, list(dict.fromkeys(point.seed for point in self._listed))
        while True:
            tuning = self._compare(added)
            there = {point.id for point in self._listed}
            close = [point for grid in self._closer for point in self._close(grid, tuning) if point.id not in there]
            if close:
                self._listed += close
                continue
            edge = "low" if tuning.diverged else tuning.edge
            if edge is None or added == self._extend:
                return tuning
            rates = list(tuning.losses) if edge == "low" else list(tuning.losses)[::-1]
            rate = float(f"{rates[0] * rates[0] / (rates[1] if len(rates) > 1 else 2 * rates[0]):.6g}")
            self._listed += [self._point(rate, seed) for seed in seeds]
            added += 1

    def _point(self, rate: float, seed: int) -> Point:
        return Point(self._cell, rate, seed, _id(self._study, self._cell, rate, seed), self._grid)

    def _close(self, grid: Grid, tuning: Tuning) -> list[Point]:
        """The runs, with the grid's seeds, of the rates that are `within` of the best; none where it is alone.

        It is not alone where another rate has these seeds already: all of them will be compared over them.
        """
        lowest = None if tuning.best is None else tuning.losses[tuning.best]
        if tuning.best is None or lowest is None:
            return []
        close = [rate for rate, loss in tuning.losses.items() if loss is not None and loss <= lowest + grid.within]
        others = [rate for rate in tuning.losses if rate != tuning.best]
        alone = close == [tuning.best] and not any(self._has_run(rate, grid.seed) for rate in others)
        return [] if alone else _points(self._study, grid, self._cell, list(dict.fromkeys([*close, tuning.best])))

    def _has_run(self, rate: float, seeds: list[int]) -> bool:
        return all(self._point(rate, seed).id in self._losses for seed in seeds)

    def _compare(self, added: int) -> Tuning:
        listed = {point.id: point for point in self._listed}
        rates = dict.fromkeys(point.lr for point in self._listed)
        also = [
            self._point(rate, seed)
            for rate in rates
            for seeds in self._seeds
            if self._has_run(rate, seeds)
            for seed in seeds
        ]
        known = listed | {point.id: point for point in also}
        points = sorted(known.values(), key=lambda point: (point.lr, point.seed))
        found: dict[float, list[float | None]] = {}
        for point in points:
            found.setdefault(point.lr, []).append(self._losses.get(point.id))
        means = {rate: _mean(of_seeds) for rate, of_seeds in found.items()}
        failed = tuple(point.id for point in points if math.isnan(self._losses.get(point.id, 0.0)))
        if None in means.values():
            return Tuning(self._cell, means, None, None, added, failed)
        outcomes = [Outcome(point.lr, point.seed, self._losses[point.id]) for point in points if point.id not in failed]
        best = best_lr(outcomes)
        if best is None or len(means) == 1:
            return Tuning(self._cell, means, None if best is None else best.lr, None, added, failed)
        edge = {None: None, "lowest": "low", "only": "low", "highest": "high"}[best.edge]
        return Tuning(self._cell, means, best.lr, edge, added, failed)


def _mean(losses: list[float | None]) -> float | None:
    """Over the seeds that did not fail; NaN where all did, None where one is not finished."""
    known = [loss for loss in losses if loss is not None]
    left = [loss for loss in known if not math.isnan(loss)]
    if len(known) < len(losses):
        return None
    return sum(left) / len(left) if left else math.nan
