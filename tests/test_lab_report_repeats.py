# SPDX-License-Identifier: Apache-2.0
"""The report's section on settings that were run more than once."""

import json
from pathlib import Path

from report_page import BEST, Page
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


def test_other_settings_are_neither_a_repeat_nor_another_seed(tmp_path: Path) -> None:
    """Another weight decay or warm-up, in another study or in this one; a batch has steps of its own."""
    scheduler = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 6}}
    decayed = {"optimizer": {"type": "MeritLAMB", "params": {"weight_decay": 0.1}}, "scheduler": scheduler}
    fresh = {"optimizer": {"type": "MeritLAMB", "params": {"weight_decay": 1e-4}}, "scheduler": scheduler}
    warm = {"optimizer": {"type": "Merit"}, "scheduler": {"params": {"warmup_num_steps": 100}}}
    for study, seed, optimizer, batch, config in (
        ("one", 1, "LAMB", 256, decayed),
        ("one", 2, "LAMB", 256, fresh),
        ("two", 1, "LAMB", 256, fresh),
        ("one", 1, "MERIT", 64, {"optimizer": {"type": "Merit"}, "scheduler": scheduler}),
        ("one", 1, "MERIT", 256, warm),
    ):
        run = write_run(tmp_path / study, optimizer=optimizer, batch=batch, lr=2e-2, seed=seed)
        (run / "deepspeed.json").write_text(json.dumps(config))
    write_report([tmp_path / "one", tmp_path / "two"], output=tmp_path / "report")
    page = Page(tmp_path / "report/report.html")
    assert "repeats" not in page.ids
    assert [(row[0], row[1], row[7]) for row in page.tables[BEST][1:]] == [
        ("64", "MERIT", "1: 1.610"),
        ("256", "MERIT", "1: 1.600"),
        ("256", "LAMB (weight_decay 0.0001)", "1: 1.710, 2: 1.720"),
        ("256", "LAMB (weight_decay 0.1)", "1: 1.710"),
    ]


def test_without_repeats_there_is_no_section(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / "one", optimizer="MERIT", batch=256, lr=2e-2, seed=seed)
    write_report([tmp_path / "one"], output=tmp_path / "report")
    assert "repeats" not in Page(tmp_path / "report/report.html").ids
