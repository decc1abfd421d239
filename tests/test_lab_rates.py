# SPDX-License-Identifier: Apache-2.0
"""Which learning rates a study tries, and which it takes for the best."""

import math

import pytest
from tiny_study import ADAMW, MERIT, ids, loader

from merit_ds.errors import InputError
from merit_ds.lab.points import Cell, expand
from merit_ds.lab.report_statistics import Outcome, best_lr
from merit_ds.lab.result import losses_of
from merit_ds.lab.status import describe_doubts

ABLATION = Cell("MERIT without clip", "default", 8, 81920)


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def test_the_best_is_taken_once_every_rate_has_its_loss(load):
    losses = {"MERIT-b8-lr0.01-s1": 2.0, "MERIT-b8-lr0.02-s1": 1.5}
    assert expand(load(), losses).waiting[MERIT] == 3
    expansion = expand(load(), losses | {"MERIT-b8-lr0.04-s1": 1.7})
    assert expansion.tunings[MERIT].best == 0.02 and expansion.tunings[MERIT].edge is None
    assert MERIT not in expansion.waiting and expansion.waiting[ADAMW] == 3
    new = set(ids(expansion)) - set(ids(expand(load(), {})))
    assert new == {
        "MERIT-b8-lr0.02-s2",
        "MERIT-b8-lr0.02-s3",
        "MERIT_without_clip-b8-lr0.02-s1",
        "MERIT_without_clip-b8-lr0.02-s2",
    }


@pytest.mark.parametrize(
    ("losses", "best", "edge"),
    [
        ((1.0, 2.0, 3.0), 0.01, "low"),
        ((3.0, 2.0, 1.0), 0.04, "high"),
        ((3.0, 2.0, math.inf), 0.02, None),
        ((math.inf, 2.0, math.inf), 0.02, None),
        ((math.inf, math.inf, 2.0), 0.04, "high"),
        ((math.inf, math.inf, math.inf), None, None),
    ],
)
def test_an_edge_is_seen_and_a_diverged_run_is_an_infinite_loss(load, losses, best, edge):
    found = {f"MERIT-b8-lr{lr}-s1": loss for lr, loss in zip((0.01, 0.02, 0.04), losses, strict=True)}
    expansion = expand(load(), found)
    assert (expansion.tunings[MERIT].best, expansion.tunings[MERIT].edge) == (best, edge)
    assert (MERIT in expansion.hopeless) == (best is None)


@pytest.mark.parametrize(
    ("losses", "best", "edge", "added"),
    [
        ((math.nan, 2.0, 3.0), 0.02, "low", "0.005"),  # 0.02 is the lowest of those that say anything
        ((3.0, 2.0, math.nan), 0.02, "high", "0.08"),
        ((math.nan, 2.0, math.nan), 0.02, "low", "0.005"),
        ((math.nan, math.inf, math.inf), None, None, "0.005"),
        ((math.inf, math.inf, math.inf), None, None, "0.005"),
        ((math.nan, math.nan, math.nan), None, None, None),
        ((3.0, math.nan, 2.0), 0.04, "high", "0.08"),
    ],
)
def test_a_failed_run_says_nothing_of_its_rate_and_rates_that_all_diverged_were_too_high(
    load, losses, best, edge, added
):
    study = load({"batch: [8, 48], lr: {": "batch: [8, 48], extend: 1, lr: {"})
    found = {f"MERIT-b8-lr{lr}-s1": loss for lr, loss in zip((0.01, 0.02, 0.04), losses, strict=True)}
    listed = ids(expand(study, {}))
    new = [id_ for id_ in ids(expand(study, found)) if id_ not in listed and id_.startswith("MERIT-b8")]
    assert new == ([] if added is None else [f"MERIT-b8-lr{added}-s1"])
    expansion = expand(load(), found)
    tuning = expansion.tunings[MERIT]
    assert (tuning.best, tuning.edge) == (best, edge) and (MERIT in expansion.hopeless) == (best is None)
    assert list(tuning.failed) == [id_ for id_, loss in found.items() if math.isnan(loss)]
    doubts = describe_doubts(tuning)
    assert any("left out" in doubt and "--retry-failed" in doubt for doubt in doubts) == bool(tuning.failed)
    left = ", ".join(f"{lr:g}" for lr, loss in zip((0.01, 0.02, 0.04), losses, strict=True) if not math.isnan(loss))
    assert edge is None or f"{best:g} is the {edge}est of {left};" in doubts[-1]


def test_a_rate_whose_one_seed_failed_is_judged_by_the_seeds_that_all_rates_have(load):
    """As the report does it, so both name the same rate."""
    study = load({"batch: [8, 48], lr: {": "batch: [8, 48], seed: [1, 2], lr: {"})
    losses = {0.01: (2.0, 2.0), 0.02: (1.5, math.nan), 0.04: (1.6, 1.0)}
    found = {f"MERIT-b8-lr{lr}-s{seed}": pair[seed - 1] for lr, pair in losses.items() for seed in (1, 2)}
    tuning = expand(study, found).tunings[MERIT]
    assert tuning.losses == {0.01: 2.0, 0.02: 1.5, 0.04: 1.3} and (tuning.best, tuning.edge) == (0.02, None)


def test_one_status_is_one_kind_of_loss():
    rows = {"a": ("done", 2.0), "b": ("diverged", None), "c": ("failed", None), "d": ("failed", 3.0)}
    losses = losses_of({id_: {"status": status, "final_valid_loss": loss} for id_, (status, loss) in rows.items()})
    assert losses == pytest.approx({"a": 2.0, "b": math.inf, "c": math.nan, "d": math.nan}, nan_ok=True)


def test_one_rate_has_no_edge_and_seeds_are_averaged(load):
    single = load({"{\n      from: 1e-2, to: 4e-2, factor: 2}": "[0.02]"})
    tuning = expand(single, {"MERIT-b8-lr0.02-s1": 1.0}).tunings[MERIT]
    assert (tuning.best, tuning.edge) == (0.02, None)
    two = load({"batch: [8, 48], lr: {": "batch: [8, 48], seed: [1, 2], lr: {"})
    found = {"MERIT-b8-lr0.01-s1": 1.0, "MERIT-b8-lr0.01-s2": 3.0, "MERIT-b8-lr0.02-s1": 1.5, "MERIT-b8-lr0.02-s2": 1.6}
    found |= {"MERIT-b8-lr0.04-s1": 1.4}
    assert expand(two, found).tunings[MERIT].best is None
    tuning = expand(two, found | {"MERIT-b8-lr0.04-s2": math.inf}).tunings[MERIT]
    assert tuning.losses == {0.01: 2.0, 0.02: 1.55, 0.04: math.inf} and tuning.best == 0.02


def test_extend_goes_on_until_the_best_is_inside_or_the_bound_is_met(load):
    study = load({"batch: [8, 48], lr: {": "batch: [8, 48], extend: 2, lr: {"})
    losses = {f"MERIT-b8-lr{lr}-s1": loss for lr, loss in ((0.01, 1.0), (0.02, 2.0), (0.04, 3.0))}
    assert "MERIT-b8-lr0.005-s1" in ids(expand(study, losses))
    assert expand(study, losses).waiting[MERIT] == 3
    inside = expand(study, losses | {"MERIT-b8-lr0.005-s1": 1.1}).tunings[MERIT]
    assert (inside.best, inside.edge, inside.added) == (0.01, None, 1)
    losses |= {"MERIT-b8-lr0.005-s1": 0.9, "MERIT-b8-lr0.0025-s1": 0.8}
    bound = expand(study, losses)
    assert (bound.tunings[MERIT].best, bound.tunings[MERIT].edge) == (0.0025, "low")
    assert not any("lr0.00125" in id_ for id_ in ids(bound)) and "MERIT-b8-lr0.0025-s3" in ids(bound)


def test_a_model_may_take_the_rates_of_another(load):
    models = "models: {plain: {}, deep: {set: {model.num_layers: 4}, micro_batch: 2, lr_of: plain}}\noptimizers:"
    study = load(
        {
            "optimizers:": models,
            "batch: [8, 48], lr: {": "batch: [8, 48], model: [plain], lr: {",
            "batch: [8, 48], seed: [1, 2, 3], lr": "batch: [8], model: [deep], seed: [1], tokens: 163840, lr",
            "batch: [8], seed: [1, 2], lr: best": "batch: [8], model: [deep], seed: [1], lr: best",
        }
    )
    with pytest.raises(InputError, match=r"AdamW at batch 8, model plain \(163840 tokens\)"):
        expand(study, {})


CLOSE = {"seed: [1, 2, 3], lr: best": "seed: [1, 2, 3], lr: best, within: 0.1"}


def test_rates_close_to_the_best_run_with_all_seeds_before_one_is_chosen(load):
    study = load(CLOSE)
    first = {"MERIT-b8-lr0.01-s1": 1.6, "MERIT-b8-lr0.02-s1": 1.5, "MERIT-b8-lr0.04-s1": 1.7}
    expansion = expand(study, first)
    new = {id_ for id_ in ids(expansion) if id_.startswith("MERIT-b8") and not id_.endswith("s1")}
    assert new == {f"MERIT-b8-lr{lr}-s{seed}" for lr in ("0.01", "0.02") for seed in (2, 3)}
    assert expansion.tunings[MERIT].best is None and MERIT not in expansion.waiting
    assert expansion.waiting[ABLATION] == 2
    seeds = {f"MERIT-b8-lr{lr}-s{seed}": loss for lr, loss in (("0.01", 1.5), ("0.02", 1.9)) for seed in (2, 3)}
    assert expand(study, first | dict(list(seeds.items())[:3])).tunings[MERIT].best is None
    expansion = expand(study, first | seeds)
    assert expansion.tunings[MERIT].best == 0.01
    assert {id_ for id_ in ids(expansion) if "without_clip" in id_} == {
        "MERIT_without_clip-b8-lr0.01-s1",
        "MERIT_without_clip-b8-lr0.01-s2",
    }


def test_a_list_also_grows_where_all_seeds_have_put_the_best_at_its_edge(load):
    """On seed 1 the best is inside; with the others it is the highest, and the next one's first seed is wanted."""
    study = load(CLOSE | {"batch: [8, 48], lr: {": "batch: [8, 48], extend: 1, lr: {"})
    losses = {"MERIT-b8-lr0.01-s1": 1.7, "MERIT-b8-lr0.02-s1": 1.5, "MERIT-b8-lr0.04-s1": 1.55}
    losses |= {f"MERIT-b8-lr{lr}-s{seed}": loss for lr, loss in (("0.02", 1.9), ("0.04", 1.5)) for seed in (2, 3)}
    expansion = expand(study, losses)
    assert "MERIT-b8-lr0.08-s1" in ids(expansion) and "MERIT-b8-lr0.08-s2" not in ids(expansion)
    assert expansion.tunings[MERIT].best is None
    tuning = expand(study, losses | {"MERIT-b8-lr0.08-s1": 2.0}).tunings[MERIT]
    assert (tuning.best, tuning.edge, tuning.added) == (0.04, None, 1)


def test_the_choice_is_the_report_s_where_rates_were_close_before_the_list_grew(load):
    """Seed 1 puts 0.08 far ahead of two rates that have three seeds by then: these decide over it as well."""
    study = load(CLOSE | {"batch: [8, 48], lr: {": "batch: [8, 48], extend: 3, lr: {"})
    seeds = {0.01: (2.0,), 0.02: (1.80, 1.70, 1.70), 0.04: (1.79, 1.65, 1.65), 0.08: (1.55, 1.9, 1.9), 0.16: (2.0,)}
    losses = {f"MERIT-b8-lr{lr}-s{seed}": loss for lr, row in seeds.items() for seed, loss in enumerate(row, start=1)}
    lacking = {id_: loss for id_, loss in losses.items() if id_ not in ("MERIT-b8-lr0.08-s2", "MERIT-b8-lr0.08-s3")}
    early = expand(study, lacking)
    assert early.tunings[MERIT].best is None and {"MERIT-b8-lr0.08-s2", "MERIT-b8-lr0.08-s3"} <= set(ids(early))
    tuning = expand(study, losses).tunings[MERIT]
    report = best_lr([Outcome(lr, seed, loss) for lr, row in seeds.items() for seed, loss in enumerate(row, start=1)])
    assert (report.lr, report.chosen_on) == (0.04, (1, 2, 3))
    assert (tuning.best, tuning.edge) == (0.04, None)


def test_seeds_that_another_grid_ran_count_in_the_choice(load):
    """As in the report: here the seeds of a grid without `within`, whose best of seed 1 was another for a while."""
    losses = {"MERIT-b8-lr0.01-s1": 1.6, "MERIT-b8-lr0.02-s1": 1.5, "MERIT-b8-lr0.04-s1": 1.7}
    more = {f"MERIT-b8-lr{lr}-s{seed}": loss for lr, loss in ((0.01, 1.5), (0.02, 1.9)) for seed in (2, 3)}
    assert expand(load(), losses).tunings[MERIT].best == 0.02
    tuning = expand(load(), losses | more).tunings[MERIT]
    assert tuning.best == 0.01 and tuning.losses[0.01] == pytest.approx(4.6 / 3)


def test_a_best_rate_that_is_far_ahead_runs_alone(load):
    losses = {"MERIT-b8-lr0.01-s1": 1.7, "MERIT-b8-lr0.02-s1": 1.5, "MERIT-b8-lr0.04-s1": 1.7}
    expansion = expand(load(CLOSE), losses)
    assert {id_ for id_ in ids(expansion) if id_.startswith("MERIT-b8") and "s1" not in id_} == {
        "MERIT-b8-lr0.02-s2",
        "MERIT-b8-lr0.02-s3",
    }
    assert expansion.tunings[MERIT].best == 0.02 and ABLATION not in expansion.waiting


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch: [8, 48], lr: {", "batch: [8, 48], within: 0.1, lr: {", "within belongs to a grid with `lr: best`"),
        ("seed: [1, 2], lr: best", "seed: [1, 2], lr: best, within: 0.1", "not for lr_of"),
    ],
)
def test_within_is_refused_where_it_would_do_nothing(load, old, new, message):
    with pytest.raises(InputError, match=message):
        load({old: new})
