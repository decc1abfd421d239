# SPDX-License-Identifier: Apache-2.0
"""Study folders with made-up results of a plausible shape, to test the report on."""

import json
import math
import random
from pathlib import Path

# Lowest final loss and the learning rate that gives it, by optimizer and batch.
LOSSES = {
    "AdamW": {64: (1.620, 2e-3), 256: (1.790, 2e-3), 1024: (2.150, 4e-3)},
    "LAMB": {64: (1.605, 1e-2), 256: (1.660, 1e-2), 1024: (1.905, 2e-2)},
    "maxLAMB": {64: (1.600, 1e-2), 256: (1.640, 2e-2), 1024: (1.870, 2e-2)},
    "MERIT": {64: (1.585, 1e-2), 256: (1.610, 2e-2), 1024: (1.800, 2e-2)},
    "MERIT-W": {64: (1.598, 1e-2), 256: (1.632, 1e-2), 1024: (1.845, 4e-2)},
}
GRIDS = {
    name: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3] if name == "AdamW" else [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2] for name in LOSSES
}
ABLATIONS = {
    "without clip": 0.015,
    "without element-wise ratio": 0.041,
    "without whole bound": -0.0042,
    "l2 norm": 0.0622,
}
SEEDS = {1: -0.010, 2: 0.0, 3: 0.013}
TOKENS = 9_830_400
SEQUENCE = 128
EVALUATIONS = 20
LAYERS = 4
SECONDS = {"AdamW": 0.180, "LAMB": 0.186, "maxLAMB": 0.185, "MERIT": 0.192, "MERIT-W": 0.184}
LOGITS = {"AdamW": 95, "LAMB": 60, "maxLAMB": 48, "MERIT": 32, "MERIT-W": 41}


def write_study(folder: Path) -> Path:
    """Five optimizers, three batches, five learning rates on seed 1; seeds 2 and 3 and ablations at the best ones."""
    for name, batches in LOSSES.items():
        for batch, (_, best) in batches.items():
            for lr in GRIDS[name]:
                for seed in (1, 2, 3) if lr == best else (1,):
                    write_run(folder, optimizer=name, batch=batch, lr=lr, seed=seed, telemetry=True)
    for batch in (256, 1024):
        for label in ABLATIONS:
            for seed in (1, 2, 3):
                write_run(
                    folder, optimizer="MERIT", batch=batch, lr=LOSSES["MERIT"][batch][1], seed=seed, ablation=label
                )
    failed = write_run(
        folder, optimizer="LAMB", batch=64, lr=8e-2, seed=1, status="failed", reason="no space <left> on /home/x/disk"
    )
    (failed / "metrics.jsonl").unlink()
    (folder / "study.yaml").write_text("base: small.yaml\ntokens: 9_830_400\n")
    (folder / "runs" / "AdamW-b64-lr0.016-s1").mkdir()  # still at work
    return folder


def final_loss(optimizer: str, batch: int, lr: float, seed: int, ablation: str | None = None) -> float:
    """Infinity: diverged."""
    lowest, best = LOSSES[optimizer][batch]
    steps_away = math.log2(lr / best)
    if steps_away > 1.5 and optimizer in ("AdamW", "LAMB"):
        return math.inf
    sharpness = {"AdamW": 0.11, "LAMB": 0.06}.get(optimizer, 0.035)
    return (
        lowest + sharpness * steps_away**2 + SEEDS[seed] * (1.5 if ablation else 1) + ABLATIONS.get(ablation or "", 0.0)
    )


def _outcome(loss: float, status: str | None, reason: str | None) -> dict[str, object]:
    """How a run of that loss ended, unless it is said."""
    status = status or ("done" if math.isfinite(loss) else "diverged")
    final = loss if status == "done" else None
    return {
        "status": status,
        "reason": reason or ("12 bad steps in a row" if status == "diverged" else None),
        "final_valid_loss": final,
        "best_valid_loss": final,
    }


def _circumstances(optimizer: str, batch: int) -> dict[str, object]:
    """What a run took, and with what it was made."""
    return {
        "seconds_per_step": SECONDS[optimizer] * batch / 64,
        "tflops_per_gpu": 0.09 / SECONDS[optimizer] * 0.18,
        "wall_seconds": 4000.5,
        "git": "abc1234",
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "apex": None},
        "time": "2026-01-02T03:04:05",
        "device": "cpu (x86_64)",
    }


def write_run(
    study: Path,
    *,
    optimizer: str,
    batch: int,
    lr: float,
    seed: int,
    ablation: str | None = None,
    status: str | None = None,
    reason: str | None = None,
    telemetry: bool = False,
    model: str = "0.8M",
    width: int = 64,
    jobs: int = 1,
) -> Path:
    """One run's folder with all of its files."""
    loss = final_loss(optimizer, batch, lr, seed, ablation)
    prefix = "" if model == "0.8M" else f"{model}-"
    id_ = f"{prefix}{ablation or optimizer}-b{batch}-lr{lr:g}-s{seed}".replace(" ", "_")
    folder = study / "runs" / id_
    folder.mkdir(parents=True)
    steps = TOKENS // (batch * SEQUENCE)
    point = {"optimizer": optimizer, "model": model, "batch": batch, "tokens": TOKENS, "lr": lr, "seed": seed}
    result = {"id": id_, "point": point | {"ablation": ablation}, "steps": steps, "jobs": jobs}
    result |= _outcome(loss, status, reason) | _circumstances(optimizer, batch)
    (folder / "result.json").write_text(json.dumps(result))
    recipe = {
        "model": {"num_layers": LAYERS, "hidden_size": width, "num_attention_heads": 4},
        "data": {"prefix": "/home/someone/data/novels"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (folder / "deepspeed.json").write_text(
        json.dumps({"optimizer": {"type": optimizer, "params": {"lr": lr}}}, indent=1)
    )
    (folder / "run.json").write_text(json.dumps({"git": "abc1234"}))
    noise = random.Random(f"{id_}")
    _write_rows(folder / "metrics.jsonl", _metrics(loss, steps, SECONDS[optimizer] * batch / 64, noise))
    if telemetry:
        _write_rows(folder / "telemetry.jsonl", _telemetry(optimizer, lr / LOSSES[optimizer][batch][1], batch, steps))
    return folder


def curve(final: float, share: float) -> float:
    """Validation loss when `share` of the steps are done; a straight line in 1 / (1 + 30 share)."""
    last = 1 / 31
    return final + (5.55 - final) * (1 / (1 + 30 * share) - last) / (1 - last)


def _metrics(final: float, steps: int, seconds: float, noise: random.Random) -> list[dict]:
    rows = []
    interval, every = max(1, steps // 100), max(1, steps // EVALUATIONS)
    for step in range(steps + 1):
        loss = curve(final if math.isfinite(final) else 2.2, step / steps)
        if math.isinf(final) and step > 0.4 * steps:
            loss = math.nan
        if step and step % interval == 0:
            slow = 5 if step == interval else 1
            rows.append(
                {
                    "iteration": step,
                    "loss": loss + noise.gauss(0, 0.03),
                    "seconds": seconds * slow * (1 + 0.02 * noise.random()),
                    "tflops_per_gpu": 0.02 / seconds,
                }
            )
        if step % every == 0 or step == steps:
            rows.append({"iteration": step, "valid_loss": loss})
    return rows


def _telemetry(optimizer: str, far: float, batch: int, steps: int) -> list[dict]:
    rows = []
    ours = optimizer.startswith("MERIT")
    for step in range(0, steps + 1, max(1, steps // 24)):
        share = step / steps
        grown = [2 + LOGITS[optimizer] * (batch / 1024) ** 0.3 * far**0.5 * share**0.7 / (1 + n) for n in range(LAYERS)]
        row = {
            "iteration": step,
            "max_attention_logit": grown,
            "attention_entropy": [3.6 - 0.5 * math.log(value) / (1 + 0.2 * n) for n, value in enumerate(grown)],
        }
        if optimizer != "AdamW":
            row["elements"] = {name: 16_384 for name in _by_parameter([0.0] * LAYERS)}
            row["clipped_share"] = _by_parameter([0.0] * LAYERS) | {"embedding.word_embeddings.weight": 0.0}
        if optimizer in ("MERIT", "MERIT-W"):
            row["clipped_share"] = _by_parameter(
                [0.12 * math.exp(-6 * share) / (1 + abs(n - 1)) for n in range(LAYERS)]
            )
        if optimizer == "MERIT":
            row["whole_share"] = _by_parameter([0.02 + 0.3 * share / (1 + n) for n in range(LAYERS)])
        if ours or optimizer == "maxLAMB":
            row["l2_max_gap"] = {
                f"decoder.layers.{n}.self_attention.linear_qkv.weight.{part}": 0.99 + 0.005 * share - 0.001 * n
                for n in range(LAYERS)
                for part in ("query", "key")
            }
        rows.append(row)
    return rows


def _by_parameter(values: list[float]) -> dict[str, float]:
    kinds = ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight")
    layers = {f"decoder.layers.{n}.{kind}": values[n] for n in range(LAYERS) for kind in kinds}
    return layers | {"embedding.word_embeddings.weight": 0.5}


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
