# SPDX-License-Identifier: Apache-2.0
"""The report on studies that lack something: one run, no telemetry, failures alone, lines that were cut."""

import json
import shutil

import pytest
from report_page import BEST, Page, report
from synthetic_study import write_run, write_study

from merit_ds.errors import InputError
from merit_ds.lab.report import main, write_report
from merit_ds.lab.report_cost import cost_section
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_page import Table
from merit_ds.lab.report_runs import differences, distinct, read_study, tell_apart


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("lab") / "whole")


@pytest.fixture(scope="module")
def whole(study):
    return report(study)


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


def test_an_optimizer_without_a_best_rate_is_not_in_the_picture_of_rates(tmp_path):
    for optimizer, lr in (("MERIT", 1e-2), ("MERIT", 2e-2), ("AdamW", 8e-3)):  # AdamW diverges there
        write_run(tmp_path / "lost", optimizer=optimizer, batch=64, lr=lr, seed=1)
    page, text = report(tmp_path / "lost")
    assert "sensitivity" in page.ids
    assert "Not drawn, as no rate gave a loss: AdamW at batch 64." in text


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
        (f"{name}, 9.83 M tokens", optimizer, "not alone")
        for name in ("narrow", "wide")
        for optimizer in ("AdamW", "MERIT")
    ]
    assert differences(run.family for run in apart) == "narrow: hidden_size 64; wide: hidden_size 128"


def test_times_that_disagree_are_said_and_not_drawn(tmp_path):
    """Another job ran beside one of AdamW's runs."""
    for seed in (1, 2, 3):
        slow = write_run(tmp_path / "times", optimizer="AdamW", batch=64, lr=2e-3, seed=seed)
    write_run(tmp_path / "times", optimizer="MERIT", batch=64, lr=1e-2, seed=1)
    write_run(tmp_path / "times", optimizer="LAMB", batch=64, lr=1e-2, seed=1)
    single = " (of a single run)"
    assert [row[4][5:] for row in _cost_rows(tmp_path / "times")] == ["", single, single]  # behind the ratio
    rows = [json.loads(line) for line in (slow / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"seconds": 2 * row["seconds"]} if "seconds" in row else row for row in rows]
    (slow / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row[4] for row in _cost_rows(tmp_path / "times")] == [
        "times disagree: 0.182 to 0.364 s",
        "AdamW's disagree",
        "AdamW's disagree",
    ]
    (picture, _) = cost_section(read_study(tmp_path / "times").runs, Links(tmp_path)).parts
    ((drawn,),) = (picture.draw.args,)
    assert [list(group) for group in drawn.values()] == [["LAMB", "MERIT"]]
    shutil.rmtree(next((tmp_path / "times/runs").glob("LAMB-*")))
    assert len(cost_section(read_study(tmp_path / "times").runs, Links(tmp_path)).parts) == 1  # one bar is no picture


def test_a_hessian_counts_by_its_share_in_the_report(tmp_path):
    """Every fifth step takes three times as long, which no median shows. result.json, of an older revision, has one."""
    write_run(tmp_path / "times", optimizer="AdamW", batch=1024, lr=2e-3, seed=1)
    run = write_run(tmp_path / "times", optimizer="LAMB", batch=1024, lr=1e-2, seed=1)
    (before,) = [float(row[4].split()[0]) for row in _cost_rows(tmp_path / "times") if row[2] == "LAMB"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "seconds" in row and row["iteration"] % 5 == 1:
            row |= {"seconds": 3 * row["seconds"], "tflops_per_gpu": row["tflops_per_gpu"] / 3}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"type": "MeritSophiaG", "params": {"hessian_interval": 5}}
    (run / "deepspeed.json").write_text(json.dumps({"optimizer": settings}))
    (found,) = [row for row in _cost_rows(tmp_path / "times") if row[2] == "LAMB"]
    assert float(found[4].split()[0]) == pytest.approx(1.4 * before, rel=0.01)
    assert float(found[5]) == pytest.approx(20 / 1.4 / (16 * 0.186), rel=0.02)


def _cost_rows(study):
    table = cost_section(read_study(study).runs, Links(study)).parts[-1]
    return [[entry.parts[0][0] for entry in row] for row in table.rows]


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
