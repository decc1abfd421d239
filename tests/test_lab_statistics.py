# SPDX-License-Identifier: Apache-2.0
"""The report's statistics against cases that were computed by hand."""

import math

import pytest

from merit_ds.lab.report_listing import leader_text
from merit_ds.lab.report_statistics import (
    Best,
    Crossing,
    Outcome,
    Summary,
    best_lr,
    default_target,
    ideal_steps,
    is_early,
    overlaps,
    paired_difference,
    signed,
    smooth,
    steps_to_loss,
    summarize,
    winner,
)

INF = math.inf


def test_summary():
    assert summarize([2.0, 4.0, 9.0]) == Summary(5.0, 2.0, 9.0, pytest.approx(math.sqrt(13)), 3, 0)
    assert summarize([2.0]) == Summary(2.0, 2.0, 2.0, None, 1, 0)
    assert summarize([1.0, INF, math.nan]) == Summary(1.0, 1.0, 1.0, None, 1, 2)
    assert summarize([INF]) == Summary(INF, INF, INF, None, 0, 1)
    with pytest.raises(ValueError, match="no losses"):
        summarize([])


def test_best_lr_is_chosen_on_the_seeds_of_the_whole_grid():
    """Seed 2 at 0.01 is lucky; 0.02 is better on seed 1, the only one that every learning rate has."""
    grid = [(0.01, 1, 2.0), (0.01, 2, 1.0), (0.02, 1, 1.9), (0.02, 3, 2.5), (0.04, 1, INF)]
    best = best_lr([Outcome(*one) for one in grid])
    assert best == Best(lr=0.02, losses={1: 1.9, 3: 2.5}, chosen_on=(1,), edge=None, left_out=())
    assert best.summary.mean == 2.2
    assert best.fresh.mean == 2.5  # of seed 3, which did not choose
    assert best_lr([Outcome(0.02, 1, 1.9)]).fresh is None


def test_close_rates_with_more_seeds_are_compared_again_over_these():
    """On seed 1 alone 0.02 is the lowest; over seeds 1 and 2, which 0.01 has as well, 0.01 is."""
    grid = [(0.01, 1, 2.0), (0.01, 2, 2.0), (0.02, 1, 1.9), (0.02, 2, 2.5), (0.02, 3, 1.0), (0.04, 1, 1.95)]
    best = best_lr([Outcome(*one) for one in grid])
    assert (best.lr, best.chosen_on, best.left_out) == (0.01, (1, 2), ())
    diverged = [(lr, seed, INF if seed == 2 else loss) for lr, seed, loss in grid]
    assert best_lr([Outcome(*one) for one in diverged]).lr == 0.02  # the second look says nothing: the first one stands
    elsewhere = [(0.04, 1, 1.8), *grid[:-1]]
    assert best_lr([Outcome(*one) for one in elsewhere]).lr == 0.04  # more seeds of others do not count against it


def test_best_lr_over_several_common_seeds():
    grid = [(0.1, 1, 1.0), (0.1, 2, 3.0), (0.2, 1, 1.8), (0.2, 2, 2.0)]
    assert best_lr([Outcome(*one) for one in grid]).lr == 0.2  # 1.9 against 2.0


def test_one_diverged_seed_of_the_choice_rules_a_learning_rate_out():
    grid = [(0.1, 1, 2.0), (0.1, 2, 2.0), (0.2, 1, 1.0), (0.2, 2, INF)]
    assert best_lr([Outcome(*one) for one in grid]).lr == 0.1


def test_a_seed_that_diverged_later_is_counted():
    grid = [(0.1, 1, 2.0), (0.2, 1, 1.0), (0.2, 2, INF)]
    best = best_lr([Outcome(*one) for one in grid])
    assert (best.lr, best.summary) == (0.2, Summary(1.0, 1.0, 1.0, None, 1, 1))


def test_without_a_common_seed_the_one_with_most_learning_rates_decides():
    grid = [(0.1, 1, 2.0), (0.2, 1, 1.5), (0.4, 1, 1.7), (0.8, 2, 0.5)]
    best = best_lr([Outcome(*one) for one in grid])
    assert (best.lr, best.chosen_on, best.left_out) == (0.2, (1,), (0.8,))


@pytest.mark.parametrize(
    ("losses", "edge"),
    [((1, 2, 3), "lowest"), ((3, 2, 1), "highest"), ((2, 1, 3), None), ((3, 2, INF), None), ((1,), "only")],
)
def test_edge(losses, edge):
    """A diverged neighbour is a tried one: the best beside it lies inside the grid."""
    assert best_lr([Outcome(0.1 * 2**n, 1, loss) for n, loss in enumerate(losses)]).edge == edge


def test_no_best():
    assert best_lr([]) is None
    assert best_lr([Outcome(0.1, 1, INF), Outcome(0.2, 1, INF)]) is None


def test_equal_losses_take_the_lower_learning_rate():
    assert best_lr([Outcome(0.2, 1, 1.0), Outcome(0.1, 1, 1.0)]).lr == 0.1


def test_winner_has_lost_no_seed():
    assert winner({"a": summarize([1.0, INF]), "b": summarize([2.0, 2.1]), "c": summarize([1.9, 2.3])}) == "b"
    assert winner({"a": summarize([INF])}) is None


def test_one_seed_does_not_win_over_several():
    several = {"a": summarize([2.0, 2.2]), "b": summarize([2.3, 2.1])}
    assert winner(several | {"lucky": summarize([1.0])}) == "a"
    assert winner({"a": summarize([2.0]), "b": summarize([1.9])}) == "b"


def tuned(*losses, edge=None):
    """Chosen on seed 1."""
    return Best(lr=0.1, losses=dict(enumerate(losses, start=1)), chosen_on=(1,), edge=edge, left_out=())


def test_leader_is_compared_with_optimizers_that_lost_no_seed():
    """B is lower on the one seed that it kept; its mean says nothing of the other."""
    sound, lost = tuned(2.0, 2.03), tuned(1.9, INF)
    assert leader_text({"A": sound, "B": lost}) == "A alone lost no seed, 2.015 (not compared: B lost 1 of 2 seeds)"
    assert leader_text({"A": sound, "B": lost, "C": tuned(2.2, 2.23)}) == (
        "A has the lowest loss, 2.015, 0.200 below C (not compared: B lost 1 of 2 seeds)"
    )
    assert leader_text({"B": lost, "C": lost}) is None
    assert leader_text({"A": sound}) is None


def test_doubts_in_a_leader():
    a, b = tuned(1.0, 1.4, edge="highest"), tuned(1.3, 1.3)
    assert leader_text({"A": a, "B": b}) == (
        "A has the lowest loss, 1.200, 0.100 below B (ranges over seeds overlap; A's best learning rate is the highest "
        "one tried; on the fresh seeds B is ahead)"
    )
    assert "(B's best learning rate is the lowest one tried)" in leader_text(
        {"A": tuned(1.0, 1.1), "B": tuned(2.0, 2.1, edge="lowest")}
    )
    assert leader_text({"A": tuned(1.0), "B": tuned(2.0)}).endswith("(not both with several seeds)")
    assert leader_text({"A": tuned(1.0, 1.1), "B": tuned(2.0, 2.1), "C": tuned(0.5)}) == (
        "A has the lowest loss, 1.050, 1.000 below B (lower with one seed: C)"
    )


def test_overlap():
    assert overlaps(summarize([1.0, 2.0]), summarize([2.0, 3.0]))
    assert not overlaps(summarize([1.0, 1.9]), summarize([2.0, 3.0]))
    assert overlaps(summarize([1.0, 4.0]), summarize([2.0]))


def test_paired_difference():
    """By seed: 0.5 and 0.25; seed 3 has no partner, the base diverged on seed 4."""
    losses, base = {1: 2.5, 2: 2.0, 3: 9.0, 4: 1.0}, {1: 2.0, 2: 1.75, 4: INF, 5: 1.0}
    assert paired_difference(losses, base) == Summary(0.375, 0.25, 0.5, pytest.approx(0.25 / math.sqrt(2)), 2, 0)
    assert paired_difference({1: INF}, {1: 2.0}).diverged == 1
    assert paired_difference({1: 2.0}, {2: 2.0}) is None


def test_signed():
    assert [signed(value) for value in (0.0625, -0.2, -1e-7, 1e-7)] == ["+0.062", "-0.200", "0.000", "0.000"]


def test_steps_to_loss():
    curve = [(0, 5.0), (10, 3.0), (20, math.nan), (30, 2.0), (40, 2.2)]
    assert steps_to_loss(curve, 4.0) == Crossing(5.0, at_most=False)
    assert steps_to_loss(curve, 3.0) == Crossing(10.0, at_most=False)
    assert steps_to_loss(curve, 2.5) == Crossing(20.0, at_most=False)  # over the gap, from 10 to 30
    assert steps_to_loss(curve, 1.9) is None
    assert steps_to_loss(curve[1:], 3.5) == Crossing(10.0, at_most=True)
    assert steps_to_loss([], 3.0) is None


def test_early_crossings():
    """In the first tenth of 200 steps, or before the second measurement."""
    curve = [(0, 5.0), (10, 4.0), (30, 2.0), (200, 1.0)]
    assert [is_early(curve, Crossing(step, at_most=False)) for step in (20.0, 20.1)] == [True, False]
    sparse = [(0, 5.0), (50, 3.0), (100, 2.0), (200, 1.0)]
    assert [is_early(sparse, Crossing(step, at_most=False)) for step in (49.0, 51.0)] == [True, False]
    assert is_early([(100, math.nan), (200, 1.0)], Crossing(200.0, at_most=True))


def test_target_is_reached_by_all():
    assert default_target([1.2341, INF, 1.1]) == 1.235
    assert default_target([math.nan]) is None


def test_ideal_steps():
    assert ideal_steps(800, batch=64, at=256) == 200


def test_smooth_has_no_lag_and_no_nan_in_its_means():
    assert smooth([0.0, 1.0, 2.0, 3.0, 4.0], reach=1) == [0.5, 1.0, 2.0, 3.0, 3.5]
    assert smooth([1.0, math.nan, 3.0], reach=1) == [1.0, pytest.approx(math.nan, nan_ok=True), 3.0]
