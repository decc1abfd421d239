# SPDX-License-Identifier: Apache-2.0
"""The report's section on steps to a loss: which losses, and which runs count."""

from pathlib import Path

import pytest
from report_page import Page
from synthetic_study import LOSSES, write_run

from merit_ds.lab.figures import to_png
from merit_ds.lab.figures_steps import Panel, draw_steps
from merit_ds.lab.report import main
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import tune
from merit_ds.lab.report_page import Section, Table
from merit_ds.lab.report_runs import read_study
from merit_ds.lab.report_steps import steps_section

TITLE = "0.8M, 9.83 M tokens: steps to a validation loss of"


def write(study: Path, **batches: tuple[int, ...]) -> Path:
    for name, tried in batches.items():
        for batch in tried:
            write_run(study, optimizer=name, batch=batch, lr=LOSSES[name][batch][1], seed=1)
    return study


def section(study: Path, target: float | None = None) -> Section | None:
    return steps_section(tune(read_study(study).runs), Links(study), target=target)


def tables(study: Path, target: float | None = None) -> dict[str, list[list[str]]]:
    parts = [part for part in section(study, target).parts if isinstance(part, Table)]
    return {part.title: [["".join(text for text, _ in c.parts) for c in row] for row in part.rows] for part in parts}


def test_a_loss_for_each_batch_but_the_smallest(tmp_path):
    """What AdamW ends at: 1.780 at batch 256, 2.140 at 1,024; its larger batches do not count for the former."""
    found = tables(write(tmp_path / "three", AdamW=(64, 256, 1024), MERIT=(64, 256, 1024)))
    low, high = (
        f"{TITLE} 1.78 (the worst final loss at batch 256)",
        f"{TITLE} 2.14 (the worst final loss at batch 1,024)",
    )
    assert list(found) == [low, high]
    assert {row[0] for row in found[low]} == {"64", "256"}
    assert {row[0] for row in found[high]} == {"64", "256", "1,024"}


def test_an_optimizer_of_one_batch_does_not_choose_the_loss(tmp_path):
    found = tables(write(tmp_path / "alone", LAMB=(64, 256), MERIT=(64, 256), AdamW=(256,)))
    (rows,) = found.values()
    assert list(found) == [f"{TITLE} 1.65 (the worst final loss at batch 256)"]  # LAMB's, not AdamW's 1.780
    assert [row[3] for row in rows if row[1] == "AdamW"] == ["not reached"]


def test_what_is_passed_early_does_not_count(tmp_path):
    """At batch 64 a loss of 2.6 is passed in the first tenth of the run, at 1,024 it is not."""
    study = write(tmp_path / "early", AdamW=(64, 1024))
    (rows,) = tables(study, 2.6).values()
    assert rows[0][3].endswith("(early)")
    assert [row[5] for row in rows] == ["-", "100%"]
    (warning,) = section(study, 2.6).warnings
    assert warning.endswith("a loss of 2.6 is passed early, which does not count: at batch 64 AdamW.")
    assert section(study, 1.95).warnings == []
    assert section(study, 4.5).parts == []


def test_early_marks_are_hollow_and_off_the_line():
    panel = Panel(2.4, "", sound={"AdamW": {256: 80.0, 1024: 50.0}}, early={"AdamW": {64: 90.0}})
    figure = draw_steps([panel])
    hollow, line, ideal = figure.axes[0].lines
    assert (hollow.get_markerfacecolor(), list(hollow.get_xdata())) == ("white", [64])
    assert list(line.get_xdata()) == [256, 1024]
    assert list(ideal.get_ydata()) == pytest.approx([80.0, 20.0])
    to_png(figure)


def test_target_loss_is_the_only_one(tmp_path):
    study = write(tmp_path / "goal", MERIT=(64, 256))
    main([str(study), "--target-loss", "2.1"])
    page = Page(study / "report" / "report.html")
    assert [title for title in page.tables if title.startswith(TITLE)] == [f"{TITLE} 2.1 (set by --target-loss)"]
    assert "no run reaches a validation loss of 1." in section(study, 1.0).warnings[0]
