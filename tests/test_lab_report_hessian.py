# SPDX-License-Identifier: Apache-2.0
"""The report's section on Hessians."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_page import report
from synthetic_study import write_run

from merit_ds.errors import InputError
from merit_ds.lab import report_hessian
from merit_ds.telemetry import hessian_picture
from merit_ds.telemetry.hessian import FORMAT

LABELS = ["AdamW, AdamW-b64-lr0.01-s1", "AdamW, AdamW-b64-lr0.02-s2", "Merit, MERIT-b64-lr0.01-s1"]
TITLE = "curved: the Hessian on 6 validation sequences, 96 tokens"


def write_result(study: Path, folder: str, optimizer: str, top: float, *, seed: int = 5) -> None:
    """What `python -m merit_ds.telemetry.hessian` writes, as far as the report reads it."""
    result = {
        "format": FORMAT,
        "label": f"{optimizer}, {folder}, step 12",
        "run": {"folder": folder, "optimizer": optimizer, "git": "abc1234"},
        "checkpoint": {"step": 12},
        "data": {"sha256": "", "seed": seed, "sequences": 6, "tokens": 96},
        "parameters": 1000,
        "loss": 1.5,
        "top_eigenvalues": [{"value": top, "residual": 0.0}],
        "trace": {"mean": 4327.4, "standard_error": 361.9},
        "quadratures": [{"nodes": [-1.0, top], "weights": [0.5, 0.5], "residuals": [0.0, 0.0]}],
    }
    (study / "hessian").mkdir(exist_ok=True)
    (study / "hessian" / f"{folder}_s{seed}.json").write_text(json.dumps(result))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "curved"
    for name in ("AdamW", "MERIT"):
        write_run(folder, optimizer=name, batch=64, lr=1e-2, seed=1)
    write_result(folder, "MERIT-b64-lr0.01-s1", "Merit", 20.12)
    write_result(folder, "AdamW-b64-lr0.01-s1", "AdamW", 459.0)
    return folder


def test_results_in_the_study_are_shown_with_their_runs(study: Path) -> None:
    page, _ = report(study)
    rows = page.tables[TITLE][1:]
    assert rows[0][:-1] == ["AdamW", "AdamW-b64-lr0.01-s1", "12", "1.500", "459", "4,327 ± 362", "1,000", "abc1234"]
    assert [row[0] for row in rows] == ["AdamW", "MERIT"]
    assert {"../runs/AdamW-b64-lr0.01-s1/", "../hessian/AdamW-b64-lr0.01-s1_s5.json"} <= set(page.links)
    assert (study / "report" / "hessian-curved.png").is_file()


def test_results_on_other_sequences_are_not_compared(study: Path) -> None:
    write_result(study, "MERIT-b64-lr0.01-s1", "Merit", 21.0, seed=6)
    report(study)
    assert (study / "report" / "hessian-curved-2.png").is_file()


def test_the_picture_has_one_seed_of_each_setting(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []

    def spectra(results: list[dict[str, Any]], **options: Any) -> Any:
        drawn.append([result["label"] for result in results])
        return hessian_picture.spectra(results, **options)

    monkeypatch.setattr(report_hessian, "spectra", spectra)
    for seed in (10, 2):  # by name, that of seed 10 comes before those of 1 and 2
        run = write_run(study, optimizer="AdamW", batch=64, lr=2e-2, seed=seed)
        write_result(study, run.name, "AdamW", 400.0)
    page, _ = report(study)
    assert drawn[-1] == [f"{name}, step 12" for name in LABELS]
    assert [row[1] for row in page.tables[TITLE][1:]].count("AdamW-b64-lr0.02-s10") == 1


def test_another_file_there_is_refused(study: Path) -> None:
    (study / "hessian" / "notes.json").write_text("{}")
    with pytest.raises(InputError, match=r"notes\.json: not a result of"):
        report(study)
