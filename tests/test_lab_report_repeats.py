# SPDX-License-Identifier: Apache-2.0
"""The report's section on settings that were run more than once."""

from pathlib import Path

from report_page import Page
from synthetic_study import write_run

from merit_ds.lab.report import write_report

CAPTION = "Settings that were run more than once"


def test_repeats_are_found_whatever_the_models_label_and_only_of_one_model(tmp_path: Path) -> None:
    """The same point in two studies, with another label in one of them; a wider model is another one."""
    for study, model, width in (("one", "0.8M", 64), ("two", "plain", 64), ("three", "wide", 128)):
        write_run(tmp_path / study, optimizer="MERIT", batch=256, lr=2e-2, seed=1, model=model, width=width)
        write_run(tmp_path / study, optimizer="MERIT", batch=256, lr=2e-2, seed=2, model=f"{model}-{study}", width=32)
    result = tmp_path / "two/runs/plain-MERIT-b256-lr0.02-s1/result.json"
    result.write_text(result.read_text().replace('"final_valid_loss": 1.6', '"final_valid_loss": 1.612345'))
    write_report([tmp_path / name for name in ("one", "two", "three")], output=tmp_path / "report")
    rows = Page(tmp_path / "report/report.html").tables[CAPTION][1:]
    assert [row[:4] for row in rows] == [["MERIT", "256", "0.02", "1"], ["MERIT", "256", "0.02", "2"]]
    assert rows[0][4] == "0.0123" and rows[0][5].startswith("one: 1.6000 cpu (x86_64), torch 2.13.0; two: 1.6123")
    assert rows[1][5].count("torch") == 3


def test_without_repeats_there_is_no_section(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / "one", optimizer="MERIT", batch=256, lr=2e-2, seed=seed)
    write_report([tmp_path / "one"], output=tmp_path / "report")
    assert "repeats" not in Page(tmp_path / "report/report.html").ids
