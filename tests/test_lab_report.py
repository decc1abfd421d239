# SPDX-License-Identifier: Apache-2.0
"""The report on made-up studies: its numbers, read back from both files, and its links."""

import base64
import json
import re
from urllib.parse import unquote

import pytest
from report_page import BEST, markdown_table, report
from synthetic_study import LOSSES, SEEDS, write_run, write_study

from merit_ds.lab.report import write_report
from merit_ds.lab.report_cost import Times, ratios_to_adamw


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("lab") / "whole")


@pytest.fixture(scope="module")
def whole(study):
    return report(study)


@pytest.mark.parametrize("kind", ["html", "markdown"])
def test_best_learning_rates_means_and_spreads(whole, kind):
    page, text = whole
    table = page.tables[BEST] if kind == "html" else markdown_table(text, BEST)
    found = {(row[1], int(row[0].replace(",", ""))): row for row in table[1:]}
    assert len(found) == 15
    for name, batches in LOSSES.items():
        for batch, (loss, lr) in batches.items():
            row = found[name, batch]
            losses = [f"{loss + shift:.3f}" for shift in SEEDS.values()]
            assert float(row[2]) == lr
            assert row[3] == f"{loss + 0.001:.3f}"
            assert row[4] == f"{loss + (0.0 + 0.013) / 2:.3f}"  # seeds 2 and 3: the choice was made on seed 1
            assert row[5] == f"{losses[0]} to {losses[2]}"
            assert row[6] == "0.012"  # sqrt((11^2 + 1^2 + 12^2) / 2) thousandths
            assert row[7] == ", ".join(f"{seed}: {value}" for seed, value in zip(SEEDS, losses, strict=True))
            assert row[9].startswith("lowest") == (name == "MERIT")


def test_overlapping_ranges_are_not_separated(whole):
    rows = {(row[1], row[0]): row[9] for row in whole[0].tables[BEST]}
    assert rows["MERIT-W", "64"] == "not separated"  # 0.013 apart, ranges of 0.023
    assert rows["maxLAMB", "256"] == ""  # 0.030 apart


def test_best_at_the_edge_of_the_grid_is_warned_of(whole):
    page, text = whole
    warning = "MERIT-W: the best learning rate 0.04 is the highest one tried; a higher one may be better."
    assert f"batch 1,024, {warning}" in page.text
    assert "0.045 below MERIT-W (MERIT-W's best learning rate is the highest one tried)" in text
    assert page.text.count("one tried") == text.count("one tried") == 2


def test_diverged_and_failed_runs_are_listed_and_escaped(whole):
    page, text = whole
    rows = {row[0]: row[5:] for row in page.tables["Diverged and failed runs"]}
    assert rows["AdamW-b64-lr0.008-s1"] == ["diverged", "12 bad steps in a row"]
    assert rows["LAMB-b64-lr0.08-s1"] == ["failed", "no space <left> on …/disk"]
    assert "<left>" not in page.text
    assert r"no space \<left\>" in text
    assert "130 runs: 125 finished, 4 diverged, 1 failed; without a result yet: 1." in page.text


def test_a_diverged_run_is_part_of_its_grid_and_a_failed_one_is_not(whole):
    rows = whole[0].tables["0.8M, 9.83 M tokens: every learning rate"]
    found = {(row[0], row[1], row[2]): row[3:] for row in rows}
    assert found["64", "AdamW", "0.008"] == ["1: diverged", ""]
    assert found["64", "AdamW", "0.002"] == ["1: 1.610, 2: 1.620, 3: 1.633", "best"]
    assert ("64", "LAMB", "0.04") in found
    assert ("64", "LAMB", "0.08") not in found


def test_what_is_said_of_the_marks_is_true(tmp_path, whole):
    """Of means alone, of single seeds alone, and of both."""
    assert "Mark: mean over seeds; ticks beside it: single seeds, bar: their range. Beside" in whole[1]
    for seed in (1, 2, 3):
        optimizer = "MERIT" if seed < 3 else "LAMB"
        write_run(tmp_path / "few", optimizer=optimizer, batch=64, lr=1e-2, seed=seed)
        text = report(tmp_path / "few")[1]
        assert ("Hollow marks: one seed each." in text) == (seed == 1)
        assert ("mean over seeds; ticks" in text) == (seed > 1)
        assert ("hollow: one seed." in text) == (seed == 3)


def test_a_run_that_ended_worse_than_it_began_is_not_the_best(tmp_path):
    """Its loss is finite, but the lab calls it diverged."""
    for lr, status in ((1e-2, "diverged"), (2e-2, "done")):
        write_run(tmp_path / "worse", optimizer="MERIT", batch=64, lr=lr, seed=1, status=status)
    result = tmp_path / "worse" / "runs" / "MERIT-b64-lr0.01-s1" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"final_valid_loss": 0.5}))
    page, _ = report(tmp_path / "worse")
    assert page.tables[BEST][1][2:4] == ["0.02", "1.610"]


def test_ablations_are_differences_by_seed(whole):
    rows = whole[0].tables["0.8M, 9.83 M tokens: MERIT and its ablations"]
    found = {(row[0], row[1]): row[2:6] for row in rows}
    # An ablation's seeds are half as far again from its mean: -0.005, 0 and 0.0065 are added, 0.0005 on average.
    assert found["1,024", "l2 norm"] == ["0.02", "1.864", "+0.063", "+0.057 to +0.069"]
    assert found["256", "without whole bound"][3] == "-0.009 to +0.002"


def test_an_ablation_is_compared_at_the_full_one_s_best_rate_alone(tmp_path):
    """Its own rates, at one of which it beats the full optimizer there, would show it better than the tuned one."""
    study = tmp_path / "rates"
    losses = {(None, 0.02): 1.75, (None, 0.04): 1.79, ("ablated", 0.02): 1.780, ("ablated", 0.04): 1.777}
    for (ablation, lr), loss in losses.items():
        run = write_run(study, optimizer="MERIT", batch=64, lr=lr, seed=1, ablation=ablation)
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | {"final_valid_loss": loss}))
    page, _ = report(study)
    rows = page.tables["0.8M, 9.83 M tokens: MERIT and its ablations"][1:]
    assert [row[1:5] for row in rows] == [
        ["MERIT (full)", "0.02", "1.750", "-"],
        ["ablated", "0.02", "1.780", "+0.030"],
        ["ablated", "0.04", "1.777", "-"],
    ]


def test_steps_to_a_loss(whole):
    """At batch 1,024 AdamW's worst seed ends at 2.163."""
    page, _ = whole
    rows = page.tables["0.8M, 9.83 M tokens: steps to a validation loss of 2.163 (the worst final loss at batch 1,024)"]
    found = {(row[1], row[0]): row for row in rows}
    assert found["AdamW", "1,024"][4].endswith("3: 75")  # its last step
    assert float(found["MERIT", "1,024"][3]) < 20
    for name in ("AdamW", "MERIT"):
        ideal, taken = (float(found[name, batch][3].replace(",", "")) for batch in ("64", "1,024"))
        share = 100 * ideal * 64 / 1024 / taken  # a step's rounding is 3 % of the fewest ones
        assert float(found[name, "1,024"][5][:-1]) == pytest.approx(share, rel=0.04)
    assert float(found["AdamW", "1,024"][5][:-1]) < 50
    assert found["MERIT", "64"][5] == "100%"


def test_attention_logits_of_every_seed(whole):
    """All seeds of an optimizer and batch have the same logits here: 2 + 32 in the first layer of MERIT's last step."""
    rows = whole[0].tables["0.8M, 9.83 M tokens: max attention logit, the largest of all layers, by seed"]
    found = {(row[1], row[0]): row[2:] for row in rows}
    assert found["MERIT", "1,024"] == ["0.02", *["1: 34, 2: 34, 3: 34", "34 to 34"] * 2]
    assert len(found) == 16


def test_cost_leaves_out_the_first_steps_and_compares_with_adamw(whole):
    rows = {(row[2], row[1]): row for row in whole[0].tables["Time a step"]}
    assert 0.180 <= float(rows["AdamW", "64"][3]) <= 0.184
    assert float(rows["MERIT", "64"][4]) == pytest.approx(0.192 / 0.180, abs=0.01)
    assert float(rows["AdamW", "64"][5].replace(",", "")) == pytest.approx(20 / 0.180, rel=0.001)


def test_times_that_cannot_be_compared_have_no_ratio():
    """Neither those on a shared machine nor those that disagree, of either side."""
    adamw, lamb, merit = (Times([seconds] * 2, alone=True) for seconds in (2.0, 3.0, 4.0))
    assert ratios_to_adamw({"AdamW": adamw, "LAMB": lamb}) == {"AdamW": 1.0, "LAMB": 1.5}
    shared, apart = Times([2.0, 2.0], alone=False), Times([1.9, 2.0, 2.3], alone=True)
    assert ratios_to_adamw({"AdamW": adamw, "LAMB": shared, "MERIT": merit}) == {"AdamW": 1.0, "LAMB": None, "MERIT": 2}
    for other in (shared, apart):
        assert set(ratios_to_adamw({"AdamW": other, "MERIT": merit}).values()) == {None}


@pytest.mark.parametrize(
    ("seconds", "agree"),
    [
        ([2.0], True),
        ([2.0, 2.1], True),
        ([2.0, 3.0], False),
        ([1.91, 2.0, 2.09], True),
        ([1.9, 2.0, 4.0], False),
        ([1.0, 2.0, 2.01], False),
        ([2.0, 2.01, 1.99, 40.0, 2.02], True),  # one of five
        ([2.0, 2.01, 1.99, 40.0, 30.0], False),
        ([0.1, 2.01, 1.99, 0.2, 2.0], False),
        ([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 40.0], True),
        ([2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0], False),  # half of them in each of two places
    ],
    ids=str,
)
def test_times_agree_where_their_middle_half_does(seconds, agree):
    assert Times(seconds, alone=True).agree is agree


def test_page_is_self_contained(whole, study):
    page, _ = whole
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", page.text))
    assert not [name for name in page.attributes if name.startswith("on")]
    pictures = {path.read_bytes() for path in (study / "report").glob("*.png")}
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.images]
    assert len(embedded) == 22
    assert set(embedded) == pictures
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_every_link_leads_somewhere(whole, study):
    page, text = whole
    in_text = re.findall(r"\]\(([^)]+)\)", text)
    assert len(page.links) > 200
    assert len(in_text) > 100
    for link in page.links + in_text:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert not link.startswith("/")
            assert (study / "report" / unquote(link)).exists()


def test_every_run_tells_how_it_was_made(whole):
    page, _ = whole
    assert sum(name.startswith("run-") for name in page.ids) == 130
    assert page.text.count("<dt>git revision</dt><dd>abc1234</dd>") == 130
    assert page.text.count("torch 2.13.0, deepspeed 0.19.8</dd>") == 130
    assert page.text.count("<summary>deepspeed.json</summary>") == 130


def test_no_absolute_path_is_shown(whole):
    page, text = whole
    assert "/home" not in page.text + text
    assert "…/novels" in page.text


def test_same_results_give_the_same_bytes(tmp_path):
    study = tmp_path / "study"
    for seed in (1, 2):
        write_run(study, optimizer="MERIT", batch=64, lr=0.01, seed=seed)
    first = [path.read_bytes() for path in write_report([study], output=tmp_path / "a" / "b")]
    again = [path.read_bytes() for path in write_report([study], output=tmp_path / "c" / "d")]
    assert first == again
