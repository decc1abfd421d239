# SPDX-License-Identifier: Apache-2.0
"""What Merit exchanges under ZeRO-1/2, and how long a rank takes to find its layout: GPT-2's sizes, 8 to 512 ranks.

    python benchmarks/exchange.py

Computed from the recipes' shapes on the meta device; nothing is trained and no ranks are started. For each model and
number of ranks: the bytes of the one all-reduce MAX of a step, their share of the bf16 gradient's bytes, the seconds
that the slowest of eight ranks takes to build its layout, and the peak of the Python memory that it needs for that.
"""

import argparse
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from merit_ds.layout import ShardLayout
from merit_ds.payload import flat_matrices, payload, zero_bounds
from merit_ds.training.config import load_config
from merit_ds.training.model import build_model, initialise_megatron
from merit_ds.training.report import provenance

BENCHMARKS = Path(__file__).resolve().parent
RECIPES = {"small": "gpt2_small_1k", "medium": "gpt2_medium_4k", "large": "gpt2_large_8k"}
RANKS = (8, 64, 512)
GPT2_TOKENS = 50257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=BENCHMARKS / "results" / "exchange.json",
        metavar="JSON",
        help="where the numbers go (default: benchmarks/results/exchange.json)",
    )
    output = parser.parse_args().output
    rows = [measure(name, parameters, ranks) for name, parameters in gpt2_parameters().items() for ranks in RANKS]
    print(f"{'GPT-2':8}{'ranks':>6}{'maxima KB':>11}{'of gradient':>13}{'layout ms':>11}{'memory KB':>11}")
    for row in rows:
        print(
            f"{row['model']:8}{row['ranks']:6}{row['maxima_bytes'] / 1000:11.1f}{row['share']:13.4%}"
            f"{1000 * row['layout_seconds']:11.2f}{row['layout_peak_bytes'] / 1000:11.1f}"
        )
    output.write_text(json.dumps({"rows": rows, **provenance()}, indent=1) + "\n", encoding="utf-8")


def gpt2_parameters() -> dict[str, list[torch.Tensor]]:
    """The recipes' models on the meta device, as the optimizer is handed them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("meta")
    initialise_megatron(seed=1, device=device)
    found = {}
    for name, recipe in RECIPES.items():
        config = load_config(BENCHMARKS.parent / "configs" / f"{recipe}.yaml")
        model = build_model(config.model, vocab_size=GPT2_TOKENS, dtype=torch.bfloat16, device=device, seed=1)
        found[name] = list(model.parameters())
    dist.destroy_process_group()
    return found


def measure(name: str, parameters: list[torch.Tensor], ranks: int) -> dict[str, Any]:
    sent = payload(parameters, ranks=ranks)
    seconds, peaks = [], []
    for rank in range(0, ranks, max(1, ranks // 8)):
        start = time.perf_counter()
        build(parameters, ranks, rank)
        seconds.append(time.perf_counter() - start)
        tracemalloc.start()
        build(parameters, ranks, rank)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return {
        "model": name,
        "ranks": ranks,
        "maxima_bytes": sent.maxima_bytes,
        "gradient_bytes": sent.gradient_bytes,
        "share": sent.share,
        "layout_seconds": max(seconds),
        "layout_peak_bytes": max(peaks),
    }


def build(parameters: list[torch.Tensor], ranks: int, rank: int) -> ShardLayout:
    matrices, length = flat_matrices(parameters)
    return ShardLayout.build(matrices, bounds=zero_bounds(length, ranks), rank=rank)


if __name__ == "__main__":
    main()
