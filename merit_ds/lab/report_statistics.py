# SPDX-License-Identifier: Apache-2.0
"""What the report computes from losses: pure functions of plain numbers.

A loss is in nats a token; a run that diverged has the loss infinity, so it can never be the best of anything.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, NamedTuple

Edge = Literal["lowest", "highest", "only"]


class Outcome(NamedTuple):
    """What one run of a grid of learning rates came to."""

    lr: float
    seed: int
    loss: float
    """Final validation loss; infinity: diverged."""


class Summary(NamedTuple):
    """Losses over seeds. The finite ones make the numbers; the others are counted."""

    mean: float
    """Infinity if every seed diverged."""
    low: float
    high: float
    std: float | None
    """Sample standard deviation; None below two finite losses."""
    finite: int
    """How many."""
    diverged: int


@dataclass(frozen=True)
class Best:
    """The learning rate that a grid's runs choose, and what it gave."""

    lr: float
    losses: Mapping[int, float]
    """Of every seed that ran at `lr`."""
    chosen_on: tuple[int, ...]
    """The seeds that decided."""
    edge: Edge | None
    """Whether the best is the lowest or highest lr tried, or the only one: then the optimizer is not tuned."""
    left_out: tuple[float, ...]
    """Learning rates that could not compete, since they lack a seed of `chosen_on`."""

    @property
    def summary(self) -> Summary:
        return summarize(self.losses.values())

    @property
    def fresh(self) -> Summary | None:
        """Over the seeds that did not decide, so that the choice's luck is not in it; None if there is none."""
        losses = [loss for seed, loss in self.losses.items() if seed not in self.chosen_on]
        return summarize(losses) if losses else None


def summarize(losses: Iterable[float]) -> Summary:
    """Mean, range and sample standard deviation of the finite losses.

    Raises:
        ValueError: there is no loss at all.
    """
    every = list(losses)
    if not every:
        raise ValueError("no losses to summarize")
    found = [loss for loss in every if math.isfinite(loss)]
    if not found:
        return Summary(math.inf, math.inf, math.inf, None, 0, len(every))
    spread = stdev(found) if len(found) > 1 else None
    return Summary(fmean(found), min(found), max(found), spread, len(found), len(every) - len(found))


def losses_by_lr(outcomes: Iterable[Outcome]) -> dict[float, dict[int, float]]:
    """Learning rate, ascending, to seed to loss."""
    found: dict[float, dict[int, float]] = {}
    for outcome in sorted(outcomes):
        found.setdefault(outcome.lr, {})[outcome.seed] = outcome.loss
    return found


def best_lr(outcomes: Sequence[Outcome]) -> Best | None:
    """The learning rate with the lowest mean loss over the seeds that the whole grid has.

    Seeds that only some learning rates have would favour those that were lucky, so they do not decide; they count in
    the mean of the chosen one. But where the chosen one and others were all run with more seeds, since they were close,
    these are compared once more, over all the seeds that they share. If no seed ran everywhere, the seed with the most
    learning rates decides. Of equal ones the lowest learning rate is taken.

    Returns:
        None if there is no run, or if every learning rate diverged on the deciding seeds.
    """
    grid = losses_by_lr(outcomes)
    if not grid:
        return None
    chosen_on = _deciding_seeds(grid)
    competing = {lr: losses for lr, losses in grid.items() if losses.keys() >= chosen_on}
    best, mean = _lowest(competing, chosen_on)
    if math.isinf(mean):
        return None
    close = {lr: losses for lr, losses in competing.items() if losses.keys() > chosen_on}
    shared = set.intersection(*(set(losses) for losses in close.values())) if len(close) > 1 else chosen_on
    if best in close and shared > chosen_on:
        second, mean = _lowest(close, shared)
        if math.isfinite(mean):
            best, chosen_on = second, shared
    return Best(
        lr=best,
        losses=grid[best],
        chosen_on=tuple(sorted(chosen_on)),
        edge=_edge(best, list(grid)),
        left_out=tuple(lr for lr in grid if lr not in competing),
    )


def _lowest(grid: Mapping[float, Mapping[int, float]], seeds: Collection[int]) -> tuple[float, float]:
    """The learning rate with the lowest mean over these seeds, and that mean."""
    means = {lr: fmean(losses[seed] for seed in seeds) for lr, losses in grid.items()}
    best = min(means, key=lambda lr: (means[lr], lr))
    return best, means[best]


def _deciding_seeds(grid: Mapping[float, Mapping[int, float]]) -> set[int]:
    everywhere = set.intersection(*(set(losses) for losses in grid.values()))
    if everywhere:
        return everywhere
    counts: dict[int, int] = {}
    for losses in grid.values():
        for seed in losses:
            counts[seed] = counts.get(seed, 0) + 1
    return {min(counts, key=lambda seed: (-counts[seed], seed))}


def _edge(best: float, grid: Sequence[float]) -> Edge | None:
    if len(grid) == 1:
        return "only"
    if best == min(grid):
        return "lowest"
    return "highest" if best == max(grid) else None


def winner(summaries: Mapping[str, Summary]) -> str | None:
    """The name with the lowest mean of those that no seed lost; None if every one has a diverged seed.

    Where some have several seeds, those with one alone do not compete: their luck is not known.
    """
    sound = {name: summary for name, summary in summaries.items() if summary.diverged == 0}
    several = {name: summary for name, summary in sound.items() if summary.finite > 1}
    competing = several or sound
    return min(competing, key=lambda name: competing[name].mean, default=None)


def signed(difference: float) -> str:
    """A difference of losses with its sign and three decimals; what rounds to nothing has no sign."""
    text = f"{difference:+.3f}"
    return "0.000" if float(text) == 0 else text


def overlaps(one: Summary, other: Summary) -> bool:
    """Whether the ranges over seeds have a value in common, so that the order of the means may be chance."""
    return one.low <= other.high and other.low <= one.high


def paired_difference(losses: Mapping[int, float], base: Mapping[int, float]) -> Summary | None:
    """`losses` - `base` for each seed that both have and that did not diverge in `base`; None without such a seed."""
    shared = [seed for seed in losses if math.isfinite(base.get(seed, math.inf))]
    return summarize(losses[seed] - base[seed] for seed in shared) if shared else None


class Crossing(NamedTuple):
    """When a curve first reached a loss."""

    step: float
    at_most: bool
    """The first measurement already lay below: it was reached at `step` or before."""


def steps_to_loss(curve: Iterable[tuple[int, float]], target: float) -> Crossing | None:
    """The step at which validation first reaches `target`, on the straight line between two measurements.

    Args:
        curve: (optimizer steps, loss), by ascending steps; non-finite losses are passed over.

    Returns:
        None if it is never reached.
    """
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if not math.isfinite(loss):
            continue
        if loss <= target:
            if before is None:
                return Crossing(float(step), at_most=True)
            share = (before[1] - target) / (before[1] - loss)
            return Crossing(before[0] + share * (step - before[0]), at_most=False)
        before = (step, loss)
    return None


def is_early(curve: Sequence[tuple[int, float]], crossing: Crossing) -> bool:
    """Whether the crossing lies in the first tenth of the run or before the second measurement with a finite loss.

    There the loss falls so steeply that a straight line between two measurements says little of the step.
    """
    steps = [step for step, loss in curve if math.isfinite(loss)]
    return crossing.at_most or crossing.step <= max(steps[min(1, len(steps) - 1)], 0.1 * curve[-1][0])


def default_target(final_losses: Iterable[float]) -> float | None:
    """The worst of the finite losses, rounded up to 3 decimals: the lowest loss that all of these runs reach."""
    finite = [loss for loss in final_losses if math.isfinite(loss)]
    return math.ceil(max(finite) * 1000) / 1000 if finite else None


def ideal_steps(steps: float, *, batch: int, at: int) -> float:
    """Steps at batch `at` if twice the batch needed half the steps, from `steps` at `batch`."""
    return steps * batch / at


def smooth(values: Sequence[float], *, reach: int) -> list[float]:
    """Mean over up to `reach` values on either side, so that a slope does not lag behind; fewer at the ends.

    Non-finite values become NaN and count in no mean.
    """
    smoothed = []
    for index, value in enumerate(values):
        window = [other for other in values[max(0, index - reach) : index + reach + 1] if math.isfinite(other)]
        smoothed.append(fmean(window) if math.isfinite(value) else math.nan)
    return smoothed
