# SPDX-License-Identifier: Apache-2.0
"""The report on made-up studies: its numbers, read back from both files, its links, and what it says of what lacks."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from synthetic_study import LOSSES, SEEDS, write_run, write_study

from merit_ds.errors import InputError
from merit_ds.lab.report import main, write_report
from merit_ds.lab.report_comparisons import steps_section
from merit_ds.lab.report_cost import cost_section, ratios_to_adamw
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import tune
from merit_ds.lab.report_page import Table
from merit_ds.lab.report_runs import differences, distinct, read_study, tell_apart


class Page(HTMLParser):
    """Tables as lists of rows of texts, by caption; links, ids, images and tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._text = ""
        self._caption = ""
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.attributes |= attributes.keys()
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        if "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes["src"])
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("caption", "td", "th", "summary"):
            self._text = ""

    def handle_data(self, data):
        self._text += data

    def handle_endtag(self, tag):
        if tag in ("caption", "summary"):
            self._caption = self._text
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append(self._text)


def markdown_table(text: str, title: str) -> list[list[str]]:
    block = text.split(f"**{title}**\n\n", 1)[1].split("\n\n", 1)[0]
    rows = [line[2:-2].split(" | ") for line in block.split("\n") if not line.startswith("|---")]
    return [[re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", entry).replace("**", "") for entry in row] for row in rows]


def report(study: Path, **arguments) -> tuple[Page, str]:
    output = study / "report"
    write_report([study], output=output, **arguments)
    return Page(output / "report.html"), (output / "report.md").read_text()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("lab") / "whole")


@pytest.fixture(scope="module")
def whole(study):
    return report(study)


BEST = "0.8M, 9.83 M tokens: final validation loss (nats a token)"


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


def test_steps_to_a_loss(whole):
    """The default target is the worst of all best runs: AdamW's worst seed at the largest batch ends at 2.163."""
    page, _ = whole
    rows = page.tables["0.8M, 9.83 M tokens: steps to a validation loss of 2.163"]
    found = {(row[1], row[0]): row for row in rows}
    assert found["AdamW", "1,024"][4].endswith("3: 75")  # its last step
    assert float(found["MERIT", "1,024"][3]) < 20
    for name in ("AdamW", "MERIT"):
        ideal, taken = (float(found[name, batch][3].replace(",", "")) for batch in ("64", "1,024"))
        share = 100 * ideal * 64 / 1024 / taken  # a step's rounding is 3 % of the fewest ones
        assert float(found[name, "1,024"][5][:-1]) == pytest.approx(share, rel=0.04)
    assert float(found["AdamW", "1,024"][5][:-1]) < 50
    assert found["MERIT", "64"][5] == "100%"


def test_cost_leaves_out_the_first_steps_and_compares_with_adamw(whole):
    rows = {(row[2], row[1]): row for row in whole[0].tables["Time a step"]}
    assert 0.180 <= float(rows["AdamW", "64"][3]) <= 0.184
    assert float(rows["MERIT", "64"][4]) == pytest.approx(0.192 / 0.180, abs=0.01)
    assert float(rows["AdamW", "64"][5].replace(",", "")) == pytest.approx(20 / 0.180, rel=0.001)


def test_times_on_a_shared_machine_have_no_ratio():
    seconds = {"AdamW": 2.0, "LAMB": 3.0, "MERIT": 4.0}
    assert ratios_to_adamw(seconds, alone=set(seconds)) == {"AdamW": 1.0, "LAMB": 1.5, "MERIT": 2.0}
    assert ratios_to_adamw(seconds, alone={"AdamW", "MERIT"}) == {"AdamW": 1.0, "LAMB": None, "MERIT": 2.0}
    assert set(ratios_to_adamw(seconds, alone={"LAMB", "MERIT"}).values()) == {None}


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


def test_single_run(tmp_path):
    write_run(tmp_path / "one", optimizer="AdamW", batch=64, lr=2e-3, seed=1, telemetry=True)
    page, text = report(tmp_path / "one")
    assert page.tables[BEST][1][:5] == ["64", "AdamW", "0.002", "1.610", "-"]
    assert page.tables[BEST][1][9] == "lowest; one seed; only lr tried"
    assert "one learning rate was tried (0.002), so it is not tuned" in text
    assert not page.ids & {"sensitivity", "steps", "ablations", "clipped-share"}
    assert page.ids >= {"curves", "max-attention-logit", "cost"}


def test_only_failures(tmp_path):
    for lr, status in ((1e-3, "failed"), (8e-3, "diverged")):
        run = write_run(tmp_path / "bad", optimizer="AdamW", batch=64, lr=lr, seed=1, status=status, reason="lost")
        (run / "metrics.jsonl").unlink()
    page, text = report(tmp_path / "bad")
    assert "2 runs: 0 finished, 1 diverged, 1 failed." in text
    assert "No run finished with a validation loss, so there is nothing to compare." in page.text
    assert len(page.tables["Diverged and failed runs"]) == 3
    assert "best" not in page.ids


def test_missing_telemetry_is_said(tmp_path):
    for name, telemetry in (("AdamW", False), ("MERIT", True)):
        write_run(tmp_path / "part", optimizer=name, batch=256, lr=1e-2, seed=1, telemetry=telemetry)
    write_run(tmp_path / "none", optimizer="MERIT", batch=256, lr=1e-2, seed=1)
    assert "no samples of AdamW at batch 256." in report(tmp_path / "part")[0].text
    assert "No run at its optimizer&#x27;s best learning rate has telemetry" in report(tmp_path / "none")[0].text


def test_an_optimizer_that_never_clips_is_named_and_not_drawn(whole):
    """LAMB and maxLAMB have zeros alone; AdamW has no samples."""
    page, text = whole
    assert {row[1] for row in page.tables["0.8M, 9.83 M tokens: clipped elements"][1:]} == {"MERIT", "MERIT-W"}
    batches = "at batch 64, 256, 1,024"
    assert f"0% throughout, so not drawn: LAMB {batches}; maxLAMB {batches}." in text
    assert f"9.83 M tokens: no samples of AdamW {batches}." in text


def test_telemetry_without_sizes_is_said(tmp_path):
    run = write_run(tmp_path / "old", optimizer="MERIT", batch=64, lr=1e-2, seed=1, telemetry=True)
    assert "does not tell the parameters" not in report(tmp_path / "old")[1]
    rows = [json.loads(line) for line in (run / "telemetry.jsonl").read_text().splitlines()]
    (run / "telemetry.jsonl").write_text("".join(json.dumps(row | {"elements": {}}) + "\n" for row in rows))
    text = report(tmp_path / "old")[1]
    assert text.count("the telemetry of MERIT at batch 64 does not tell the parameters' sizes") == 2


def test_not_finite_numbers_and_a_cut_line(tmp_path):
    run = write_run(tmp_path / "nan", optimizer="MERIT", batch=64, lr=1e-2, seed=1, telemetry=True)
    with (run / "telemetry.jsonl").open("a") as file:
        file.write('{"iteration": 1201, "max_attention_logit": [NaN, Infinity, null, 3.0]}\n{"iteration": 12')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1201, "loss": NaN, "seconds": 0.1}\n{"iter')
    page, _ = report(tmp_path / "nan")
    assert page.tables["0.8M, 9.83 M tokens: max attention logit"][1][5] == "3 to 3"


def test_a_line_that_is_not_json_is_refused(tmp_path):
    run = write_run(tmp_path / "torn", optimizer="MERIT", batch=64, lr=1e-2, seed=1)
    (run / "metrics.jsonl").write_text('{"iter\n{"iteration": 1}\n')
    (read,) = read_study(tmp_path / "torn").runs
    with pytest.raises(InputError, match=r"metrics\.jsonl: a line is not JSON"):
        read.curve("loss")


def test_a_point_of_two_studies_counts_once(tmp_path):
    for name in ("first", "second"):
        write_run(tmp_path / name, optimizer="MERIT", batch=64, lr=1e-2, seed=1)
    write_run(tmp_path / "second", optimizer="MERIT", batch=64, lr=1e-2, seed=2)
    main([str(tmp_path / "first"), str(tmp_path / "second"), "--output", str(tmp_path / "out")])
    page = Page(tmp_path / "out" / "report.html")
    assert page.tables[BEST][1][7] == "1: 1.575, 2: 1.585"
    assert "Not counted, since they repeat a point of an earlier study: second/MERIT-b64-lr0.01-s1." in page.text
    assert any(link == "../second/runs/MERIT-b64-lr0.01-s2/" for link in page.links)


def test_two_models_of_one_label_are_never_pooled(tmp_path):
    """Two studies call their model "default"; the points are the same, the widths are not."""
    for name, width in (("narrow", 64), ("wide", 128)):
        for optimizer in ("AdamW", "MERIT"):
            write_run(
                tmp_path / name, optimizer=optimizer, batch=64, lr=1e-2, seed=1, model="default", width=width, jobs=2
            )
    runs = [run for name in ("narrow", "wide") for run in read_study(tmp_path / name).runs]
    apart, doubles = distinct(tell_apart(runs))
    assert not doubles
    assert [run.family.title for run in apart[1:3]] == ["narrow, 9.83 M tokens", "wide, 9.83 M tokens"]
    cost = next(part for part in cost_section(apart, Links(tmp_path)).parts if isinstance(part, Table))
    rows = [[entry.parts[0][0] for entry in row] for row in cost.rows]
    assert [(row[0], row[2], row[4]) for row in rows] == [
        (f"{name}, 9.83 M tokens", optimizer, "-") for name in ("narrow", "wide") for optimizer in ("AdamW", "MERIT")
    ]
    assert differences(run.family for run in apart) == "narrow: hidden_size 64; wide: hidden_size 128"


def test_a_run_without_its_folder_is_of_its_studys_model(tmp_path):
    """Of seed 2 results.jsonl alone was kept."""
    for seed in (1, 2):
        run = write_run(tmp_path / "part", optimizer="MERIT", batch=64, lr=1e-2, seed=seed)
    (tmp_path / "part" / "results.jsonl").write_text(json.dumps(json.loads((run / "result.json").read_text())) + "\n")
    shutil.rmtree(run)
    kept, gone = read_study(tmp_path / "part").runs
    assert gone.folder is None
    assert kept.family == gone.family
    assert dict(gone.family.settings)["hidden_size"] == "64"


def test_results_without_their_folders_lead_to_the_page(tmp_path):
    """results.jsonl alone was kept: losses are there, links lead to the run's entry."""
    run = write_run(tmp_path / "kept", optimizer="MERIT", batch=64, lr=1e-2, seed=1)
    row = json.loads((run / "result.json").read_text())
    (tmp_path / "kept" / "results.jsonl").write_text(json.dumps(row) + "\n")
    shutil.rmtree(tmp_path / "kept" / "runs")
    page, _ = report(tmp_path / "kept")
    assert page.tables[BEST][1][3] == "1.575"
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)


def test_target_loss(tmp_path):
    for batch in (64, 256):
        write_run(tmp_path / "goal", optimizer="MERIT", batch=batch, lr=1e-2, seed=1)
    main([str(tmp_path / "goal"), "--target-loss", "2.5"])
    page = Page(tmp_path / "goal" / "report" / "report.html")
    assert "0.8M, 9.83 M tokens: steps to a validation loss of 2.5" in page.tables
    tuned = tune(read_study(tmp_path / "goal").runs)
    (warning,) = steps_section(tuned, Links(tmp_path), target=4.5).warnings
    assert "MERIT at batch 64, 256: a loss of 4.5 is passed in the first tenth" in warning
    assert steps_section(tuned, Links(tmp_path), target=2.2).warnings == []  # passed after 15 % of the run
    main([str(tmp_path / "goal"), "--target-loss", "1"])
    assert "no run reaches a validation loss of 1." in Page(tmp_path / "goal" / "report" / "report.html").text


def test_errors(tmp_path, capsys):
    with pytest.raises(InputError, match="neither runs/ nor"):
        write_report([tmp_path], output=tmp_path / "report")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="no run has a result yet"):
        write_report([tmp_path], output=tmp_path / "report")
    (tmp_path / "runs" / "a" / "result.json").write_text("{")
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "a/result.json: not JSON" in capsys.readouterr().err
    (tmp_path / "runs" / "a" / "result.json").write_text('{"point": {"optimizer": "MERIT", "lr": "fast", "batch": 1}}')
    with pytest.raises(InputError, match=r"result\.json: its point lacks or misspells"):
        write_report([tmp_path], output=tmp_path / "report")
    assert not (tmp_path / "report").exists()
