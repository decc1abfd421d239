# SPDX-License-Identifier: Apache-2.0
"""The report's section on the models of one study."""

from pathlib import Path

import pytest
from report_page import markdown_table, report
from synthetic_study import write_run

CAPTION = "pair, 9.83 M tokens: the models side by side"
STUDY = "models:\n  small: {}\n  Large: {}\n"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """MERIT with two models, on three seeds and on one, a rate apart; AdamW with one of them."""
    folder = tmp_path / "pair"
    for seed in (1, 2, 3):
        write_run(folder, optimizer="MERIT", batch=256, lr=2e-2, seed=seed, model="small")
    write_run(folder, optimizer="MERIT", batch=256, lr=1e-2, seed=1, model="Large")
    write_run(folder, optimizer="AdamW", batch=256, lr=2e-3, seed=1, model="small")
    (folder / "study.yaml").write_text(STUDY)
    return folder


@pytest.mark.parametrize("kind", ["html", "markdown"])
def test_each_model_is_compared_with_the_studys_first(study: Path, kind: str) -> None:
    page, text = report(study)
    table = page.tables[CAPTION] if kind == "html" else markdown_table(text, CAPTION)
    rows = [row[1:6] for row in table[1:]]
    # The means 1.610 + 0.001, and 1.610 + 0.035 - 0.010 of seed 1 a factor of 2 away from the best rate.
    assert rows == [["MERIT", "small", "0.02", "1.611", "-"], ["MERIT", "Large", "0.01", "1.635", "+0.024"]]
    assert (study / "report/models-pair_9.83_M_tokens.png").is_file()


def test_without_a_readable_study_the_models_stand_by_letters(study: Path) -> None:
    (study / "study.yaml").write_text("models: [\n")
    page, _ = report(study)
    assert [row[2] for row in page.tables[CAPTION][1:]] == ["Large", "small"]


def test_one_model_is_compared_with_nothing(study: Path) -> None:
    for run in (study / "runs").glob("Large-*"):
        run.rename(study / run.name)
    page, _ = report(study)
    assert "models" not in page.ids
