# SPDX-License-Identifier: Apache-2.0
"""The report's sections on trust ratios and the output layer."""

import json
import math
from pathlib import Path

import pytest
from report_page import Page, report
from synthetic_study import write_run

from merit_ds.lab.report_spread import KINDS, spreads

SIZES = {"embedding.word_embeddings.weight": 100, "decoder.layers.0.mlp.linear_fc1.weight": 300} | {
    "decoder.layers.0.self_attention.linear_proj.weight": 100,
    "decoder.final_layernorm.weight": 10,
}


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """Two seeds of MERIT, whose samples hold the ratios and the norm alone."""
    for seed, norm in ((1, 40.0), (2, 50.0)):
        run = write_run(tmp_path / "study", optimizer="MERIT", batch=64, lr=1e-2, seed=seed, telemetry=True)
        ratios = dict(zip(SIZES, ([3.0, 300.0, 900.0], [1.0, 2.0, 4.0], [2.0, 6.0, 8.0], [5.0, 5.0, 5.0]), strict=True))
        rows = [
            {"iteration": step, "ratios": ratios, "elements": SIZES, "output_operator_norm": norm - step}
            for step in (1, 10)
        ]
        (run / "telemetry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return report(tmp_path / "study")[0]


def test_trust_ratios_by_kind_of_parameter_and_by_layer(page: Page) -> None:
    """The layer's mean is over elements: (300 x 2 + 100 x 6) / 400."""
    row = page.tables["0.8M, 9.83 M tokens: trust ratio at the last sample"][1]
    assert row[3:] == ["3 / 300 / 900", "1 / 3 / 8", "5 / 5 / 5"]
    assert page.tables["0.8M, 9.83 M tokens: trust ratio"][1][5] == "3 to 3"
    assert "ratios" in page.ids


def test_the_output_layers_norm_of_every_seed(page: Page) -> None:
    row = page.tables["0.8M, 9.83 M tokens: output layer's norm, by seed"][1]
    assert row[3:] == ["1: 30, 2: 40", "30 to 40", "1: 39, 2: 49", "39 to 49"]
    assert "output_operator_norm-peaks-0.8M_9.83_M_tokens" in page.ids


def test_in_how_many_sequences_logits_were_sampled_is_said_where_it_is_known(tmp_path: Path) -> None:
    for batch, micro in ((64, 64), (1024, 256)):
        run = write_run(tmp_path / "study", optimizer="MERIT", batch=batch, lr=1e-2, seed=1, telemetry=True)
        (run / "deepspeed.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": micro}))
    text = report(tmp_path / "study")[1]
    assert "In each rank's first micro-batch: 64 sequences at batch 64, 256 sequences at batch 1,024." in text
    (run / "deepspeed.json").write_text("{}")
    assert "In each rank's first micro-batch." in report(tmp_path / "study")[1]


def test_a_parameter_without_finite_ratios_does_not_count() -> None:
    sample = {"layers.0.a.weight": [1.0, 2.0, 3.0], "layers.0.b.weight": [1.0, math.nan, math.inf]}
    assert spreads(sample, None) == {KINDS[1]: (1.0, 2.0, 3.0)}
