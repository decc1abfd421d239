# SPDX-License-Identifier: Apache-2.0
"""What the report's pictures decide: colours, places of labels, limits of axes, maps of layers."""

import math
from itertools import pairwise

import pytest

from merit_ds.lab.figures import (
    ink,
    legend,
    look,
    ordered,
    panels,
    plain,
    spread_apart,
    styled,
    three_digits,
    to_png,
    two_digits,
)
from merit_ds.lab.figures_loss import draw_ablations, draw_best
from merit_ds.lab.figures_sensitivity import draw_sensitivity, loss_window
from merit_ds.lab.figures_telemetry import LayerMap, draw_maps, draw_peaks, over_seeds, step_edges
from merit_ds.lab.report_quantities import QUANTITIES, by_layer, is_trivial, share_by_layer
from merit_ds.lab.report_statistics import Best, Outcome, best_lr, summarize

OPTIMIZERS = ["AdamW", "LAMB", "maxLAMB", "MERIT", "MERIT-W", "LARS", "Lion", "Sophia-G", "Scion", "Muon"]


def test_each_optimizer_has_a_colour_and_a_mark_of_its_own():
    assert len({look(name)[0] for name in OPTIMIZERS}) == len({look(name)[1] for name in OPTIMIZERS}) == 10
    for type_, name in (
        ("Merit", "MERIT"),
        ("MeritW", "MERIT-W"),
        ("MeritMaxLAMB", "maxLAMB"),
        ("sophia_g", "Sophia-G"),
    ):
        assert look(type_) == look(name)
    assert look("Something else") == look("Something else")


def test_order_is_the_papers():
    assert ordered(["zeta", *reversed(OPTIMIZERS), "alpha"]) == [*OPTIMIZERS, "alpha", "zeta"]


def test_text_is_dark_enough_on_white():
    """Contrast of at least 4.5 to 1, as WCAG asks of text."""
    for name in OPTIMIZERS:
        parts = [int(ink(name)[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 4.5, name


def test_labels_are_moved_apart_and_no_further():
    assert spread_apart([0.0, 100.0], 10) == [0.0, 100.0]
    assert spread_apart([50.0, 50.0, 51.0], 10) == pytest.approx([40 + 1 / 3, 50 + 1 / 3, 60 + 1 / 3])
    crowded = spread_apart([0.0, 1.0, 9.0, 9.5, 30.0], 10)
    assert all(other - one >= 10 - 1e-9 for one, other in pairwise(crowded))


def test_numbers_as_people_write_them():
    assert [plain(value) for value in (4e-4, 0.002, 12, 4096, 2e-5)] == ["0.0004", "0.002", "12", "4,096", "2e-5"]
    assert [three_digits(value) for value in (3, 0.1823, 245.4, 1250)] == ["3.00", "0.182", "245", "1,250"]
    assert [two_digits(value) for value in (0.00172, 3.14, 118.4)] == ["0.0017", "3.1", "118"]


def test_a_small_last_value_is_not_written_as_zero():
    figure = draw_peaks({64: {"LARS": [[(0, 0.5), (10, 0.0017)]]}}, label="max attention logit")
    assert [text.get_text() for text in figure.axes[0].texts] == ["LARS 0.0017"]
    to_png(figure)


def test_peaks_are_the_mean_over_seeds_and_their_range():
    """The third seed was cut short, and the second lost a value."""
    seeds = [[(0, 2.0), (10, 10.0)], [(0, 4.0), (10, math.nan)], [(0, 6.0)]]
    assert over_seeds(seeds) == [(0, 4.0, 2.0, 6.0), (10, 10.0, 10.0, 10.0)]
    (_, *values), *_ = over_seeds([[(0, math.inf)]])
    assert all(math.isnan(value) for value in values)


def test_tiny_values_of_one_optimizer_do_not_flatten_the_others():
    lines = {"AdamW": [[(0, 2.0), (10, 50.0)]], "LARS": [[(0, 2.0), (10, 0.0017)]]}
    figure = draw_peaks({64: lines}, label="logit", floor=1.0)
    axes = figure.axes[0]
    assert axes.get_ylim()[0] == 1.0
    label = next(text for text in axes.texts if "LARS" in text.get_text())
    assert (label.get_text(), label.xy) == ("LARS 0.0017 ↓", (10, 1.0))
    maps = {name: LayerMap([0, 10], [[v] for _, v in line], note="") for name, (line,) in lines.items()}
    bar = draw_maps(maps, label="logit", percent=False, logarithmic=True, floor=1.0).axes[-1]
    assert bar._colorbar.extend == "min"
    assert bar.get_ylim() == pytest.approx((1.0, 50.0))
    alone = draw_peaks({64: {"LARS": lines["LARS"]}}, label="logit", floor=5.0).axes[0]
    assert alone.get_ylim()[0] < 0.0017  # nothing lies above the floor


def colour_bar(values: dict[str, list[float]], *, percent: bool = False):
    maps = {name: LayerMap(range(len(found)), [[v] for v in found], note="") for name, found in values.items()}
    return draw_maps(maps, label="share", percent=percent, logarithmic=False).axes[-1]


def test_an_outlier_does_not_take_the_colours_from_the_other_panels():
    """Of 151 values one lies far above, then one far below; the table has both."""
    others = {name: [0.90 + 0.001 * n for n in range(50)] for name in ("AdamW", "LAMB", "MERIT")}
    for outlier, extend in ((2.0, "max"), (0.1, "min")):
        bar = colour_bar(others | {"LARS": [outlier]})
        assert bar._colorbar.extend == extend
        assert bar.get_ylim() == pytest.approx((0.90, 0.949), abs=0.002)
    assert colour_bar(others | {"LARS": [0.1], "Lion": [2.0]})._colorbar.extend == "both"
    near = colour_bar(others | {"LARS": [0.955]})
    assert (near._colorbar.extend, near.get_ylim()) == ("neither", pytest.approx((0.90, 0.955)))
    share = colour_bar(others | {"LARS": [0.1, 2.0]}, percent=True)
    assert (share._colorbar.extend, share.get_ylim()[0]) == ("max", 0.0)


def test_colours_of_values_that_are_nearly_all_alike_reach_to_the_others():
    assert colour_bar({"LARS": [0.0] * 99 + [0.5]}).get_ylim() == (0.0, 0.5)
    assert colour_bar({"LARS": [0.5]}).get_ylim()[0] == 0.5


def test_loss_window_leaves_out_what_would_press_the_others_together():
    close = [1.5 + 0.01 * n for n in range(19)]
    low, high = loss_window([*close, 9.0, math.inf, math.nan])
    assert low < 1.5 and 1.68 < high < 1.8
    assert loss_window([1.0, 2.0])[1] > 2.0
    assert loss_window([math.inf]) == (0.0, 1.0)


def test_diverged_runs_are_marked_over_the_upper_edge():
    """Two of one learning rate lie one over the other, below the title; inside the axes they would look like losses."""
    outcomes = [Outcome(0.01, 1, 1.5), Outcome(0.02, 1, 1.4), Outcome(0.04, 1, math.inf)]
    figure = draw_sensitivity({64: {name: (outcomes, best_lr(outcomes)) for name in ("LAMB", "MERIT")}})
    (axes,) = figure.axes
    assert axes.get_xlim()[0] < 0.5 and axes.get_xlim()[1] > 2  # though nothing else lies at twice the best
    marks = [mark for mark in axes.collections if len(mark.get_offsets())]
    assert [tuple(mark.get_offsets()[0]) for mark in marks] == [(2, axes.get_ylim()[1])] * 2
    figure.canvas.draw()
    heights = [mark.get_offset_transform().transform(mark.get_offsets()[0])[1] for mark in marks]
    assert axes.bbox.y1 < heights[0] < heights[1] < axes.title.get_window_extent().y0
    assert to_png(figure).startswith(b"\x89PNG")


def test_rates_that_lie_decades_apart_share_an_axis():
    outcomes = {
        name: [Outcome(scale * lr, 1, lr) for lr in (1.0, 2.0)] for name, scale in (("LARS", 8), ("Lion", 1e-4))
    }
    (axes,) = draw_sensitivity({64: {name: (found, best_lr(found)) for name, found in outcomes.items()}}).axes
    lines = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() != "None"]
    assert [list(line) for line in lines] == [[1, 2]] * 2


def test_the_best_rate_lies_where_the_choice_was_made():
    """Seed 1 alone chooses 0.02; over all seeds, which 0.02 and 0.04 share, 0.04 is better. 0.01 has one seed."""
    losses = {0.01: (1.6,), 0.02: (1.5, 1.7, 1.8), 0.04: (1.55, 1.6, 1.62)}
    outcomes = [Outcome(lr, seed, loss) for lr, by in losses.items() for seed, loss in enumerate(by, 1)]
    best = best_lr(outcomes)
    assert (best.lr, best.chosen_on) == (0.04, (1, 2, 3))
    (axes,) = draw_sensitivity({64: {"MERIT": (outcomes, best)}}).axes
    _, line, hollow = axes.lines
    assert list(line.get_xdata()) == [0.25, 0.5, 1]
    assert list(line.get_ydata()) == pytest.approx([1.6, 5 / 3, 1.59])
    assert (list(hollow.get_xdata()), list(hollow.get_ydata())) == ([0.25], [1.6])
    assert hollow.get_markerfacecolor() == "white" != line.get_markerfacecolor()
    alone = [Outcome(0.01, 1, 1.6), Outcome(0.02, 1, 1.5), Outcome(0.02, 2, 1.7)]  # 0.01 lacks seed 2
    (axes,) = draw_sensitivity({64: {"MERIT": (alone, best_lr(alone))}}).axes
    assert list(axes.lines[-1].get_ydata()) == [1.6, 1.5]


def test_best_losses_have_an_axis_and_the_optimizers_of_their_batch():
    """A narrow range beside a far batch; the one seed of Lion is hollow, and so is what a diverged seed left."""
    runs = {
        64: {"MERIT": (1.50, 1.51, 1.52), "AdamW": (1.53, 1.54, math.inf)},
        1024: {"Lion": (2.4,), "LAMB": (2.5, math.inf, math.inf)},
    }
    bests = {
        batch: {name: Best(0.01, dict(enumerate(losses)), (0,), None, ()) for name, losses in by.items()}
        for batch, by in runs.items()
    }
    first, second = draw_best(bests).axes
    assert first.get_ylim()[1] < 1.6 and second.get_ylim()[0] > 2.3
    names = [[label.get_text() for label in axes.get_xticklabels()] for axes in (first, second)]
    assert names == [["AdamW", "MERIT"], ["LAMB", "Lion"]]
    marks = [[line for line in axes.lines if line.get_zorder() == 3] for axes in (first, second)]
    assert [[mark.get_markerfacecolor() == "white" for mark in panel] for panel in marks] == [[False] * 2, [True] * 2]
    seeds = next(line for line in first.lines if list(line.get_ydata()) == [1.50, 1.51, 1.52])
    place, mean = (line.get_transform().transform((1, 1.51)) for line in (seeds, marks[0][1]))
    assert place[0] - mean[0] > 10 and place[1] == mean[1]  # beside the mark, which would hide it


def test_small_effects_of_one_batch_are_seen_beside_large_ones_of_another():
    groups = {256: {"l2": summarize([0.1, 0.3])}, 1024: {"l2": summarize([-0.004, -0.006])}}
    figure = draw_ablations(groups, full="MERIT")
    first, second = figure.axes
    assert first.get_xlim()[1] > 0.3 and -0.02 < second.get_xlim()[0] < -0.006
    signs = {text.get_text(): handle for text, handle in zip(*legend_entries(figure), strict=True)}
    bars = [axes.patches[0].get_facecolor() for axes in (first, second)]
    assert bars == [signs["a higher loss"].get_facecolor(), signs["a lower loss"].get_facecolor()]
    assert signs["MERIT"].get_color() == look("MERIT")[0]


def legend_entries(figure):
    (found,) = figure.legends
    return found.get_texts(), found.legend_handles


@pytest.mark.parametrize("count", [1, 2])
def test_the_legend_lies_within_the_picture(count):
    """A single panel is 6.4 inches wide: eight entries in a row lost the first and the last."""
    from matplotlib.lines import Line2D

    for entries in range(2, 11):
        with styled():
            figure, _ = panels(count)
            extra = [Line2D([], [], label="above the axis")]
            legend(figure, OPTIMIZERS[: entries - 1], extra=extra)
            figure.canvas.draw()
            box = figure.legends[0].get_window_extent()
            assert len(figure.legends) == 1
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width, entries
            assert box.y1 <= figure.bbox.height, entries
            to_png(figure)


def test_unused_panels_are_not_drawn():
    assert [len(panels(count)[0].axes) for count in (1, 2, 4, 5)] == [1, 2, 4, 5]


def test_cells_of_a_map_surround_their_samples():
    assert step_edges([0, 10, 30]) == [-5, 5, 20, 40]
    assert step_edges([7]) == [6.5, 7.5]


def test_values_by_parameter_become_values_by_layer():
    sample = {
        "decoder.layers.0.mlp.linear_fc1.weight": 1.0,
        "decoder.layers.0.self_attention.linear_qkv.weight": 3.0,
        "decoder.layers.2.mlp.linear_fc1.weight": math.nan,
        "decoder.layers.2.mlp.linear_fc2.weight": 5.0,
        "embedding.word_embeddings.weight": 100.0,
    }
    assert by_layer(sample) == [2.0, pytest.approx(math.nan, nan_ok=True), 5.0]
    assert by_layer([1, None, 2.5]) == [1.0, pytest.approx(math.nan, nan_ok=True), 2.5]
    assert by_layer(None) == []


def test_shares_count_by_the_elements_of_their_parameters():
    """100 clipped elements of a norm's 100 and 300 of a matrix's 900 are 40 %, not the 67 % of a plain mean."""
    sample = {
        "decoder.layers.0.input_layernorm.weight": 1.0,
        "decoder.layers.0.mlp.linear_fc1.weight": 1 / 3,
        "embedding.word_embeddings.weight": 0.9,
    }
    sizes = dict(zip(sample, (100, 900, 5000), strict=True))
    assert share_by_layer(sample, sizes) == [pytest.approx(0.4)]
    assert share_by_layer(sample, None) == [1 / 3]  # sizes not known: the matrices alone


def test_a_share_that_says_nothing_is_known():
    """Where a norm alone is clipped, something is."""
    quantities = {quantity.key: quantity for quantity in QUANTITIES}
    values = ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    zeros, ones, mixed = (
        [{key: {"layers.0.norm": a, "layers.0.weight": b} for key in quantities}, {"iteration": 9}] for a, b in values
    )
    assert [is_trivial(rows, quantities["clipped_share"]) for rows in (zeros, ones, mixed)] == [True, False, False]
    assert [is_trivial(rows, quantities["whole_share"]) for rows in (zeros, ones, mixed)] == [False, True, False]
    assert not is_trivial(zeros, quantities["l2_max_gap"])
