# SPDX-License-Identifier: Apache-2.0
"""The optimizer step of GPT-2 small's 148 weights: Merit against AdamW, LAMB, and the memory's own speed.

    python benchmarks/optimizer_step.py
    python benchmarks/optimizer_step.py --device cuda --rounds 50

All take turns in one process with the same threads, in float32; the result is medians, and ratios of them. "whole" is
the unsharded step, "all cut" one in which every weight lies on several ranks, so that nothing can stay in cache between
the two passes. Then the step of one rank's slice under ZeRO, for 1 to 64 ranks, without communication; the memory that
a step needs beyond weights, gradients and moments; and the time that Python takes for 300 weights beyond the kernel.
On a GPU also the steps without the wait for Python. Writes the numbers as JSON and a bar chart beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import SETTINGS, contenders, gpt2_small, zero_slice
from torch.nn import Parameter
from tqdm import tqdm

from merit_ds import Merit
from merit_ds.training.report import provenance

BENCHMARKS = Path(__file__).resolve().parent
COPIES_AHEAD = 40  # 10 ms on an H200, where Python takes less than 1 ms for a step
RANKS = (1, 2, 4, 8, 16, 32, 64)
COPY, ADAMW, CPU_ADAM = "copy", "torch AdamW fused", "DeepSpeedCPUAdam"
WHOLE, CUT, PLAIN = "Merit fused, whole", "Merit fused, all cut", "MERIT's plain formula"
BYTES = {"cpu": {WHOLE: 28, CUT: 40}, "cuda": {WHOLE: 40, CUT: 40}}
"""Bytes a parameter that a step must move: g, m, v, w in, m, v, w out; twice w, m, v in where no cache holds them.

The CPU's unsharded step makes its second pass over a few rows while its cache holds them. The GPU's passes are launches
over all weights, whole or cut, and its cache holds a small part of them.
"""
READ = {COPY: 4, ADAMW: 16, CPU_ADAM: 16, "Merit fused, pass 1": 16, "Merit fused, pass 2": 12}
"""Of these, those that are read."""


def main() -> None:
    arguments = _arguments()
    if arguments.memory_of_a_step:
        print(json.dumps(memory_of_a_step()))
        return
    device = torch.device(arguments.device)
    weights = gpt2_small(device)
    parameters = sum(weight.numel() for weight in weights)
    on_gpu = device.type == "cuda"
    steps = contenders(weights)
    seconds = take_turns(steps, rounds=arguments.rounds, device=device)
    slices = {
        str(ranks): _median_seconds(zero_slice(weights, ranks=ranks, rank=ranks // 2), arguments.rounds, device)
        for ranks in tqdm(RANKS, desc="slices of 1 to 64 ranks", disable=None)
    }
    result = {
        "parameters": parameters,
        "milliseconds": {name: 1000 * median(times) for name, times in seconds.items()},
        "ratios": ratios(seconds, sizes=BYTES[device.type]),
        "gigabytes_read_per_second": {
            name: size * parameters / median(seconds[name]) / 1e9 for name, size in READ.items() if name in seconds
        },
        **({"milliseconds_without_the_host": without_host(steps, rounds=arguments.rounds)} if on_gpu else {}),
        "milliseconds_by_ranks": {ranks: 1000 * spent for ranks, spent in slices.items()},
        "python_microseconds": python_overhead(device),
        **({} if on_gpu else {"memory": _in_a_fresh_process()}),
        "all_milliseconds": {name: [round(1000 * each, 2) for each in times] for name, times in seconds.items()},
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        **provenance(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)
    draw(result, arguments.output.with_suffix(".png"))


def take_turns(steps: dict[str, Callable[[], Any]], *, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round; every other round runs in reverse, so that a drift favours none."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(rounds), desc="rounds", disable=None):
        for name in steps if number % 2 == 0 else reversed(steps):
            seconds[name].append(_seconds(steps[name], device))
    return seconds


def without_host(steps: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Medians of what the GPU alone takes for a step, in milliseconds, as in a training loop whose host is ahead of it.

    The step is enqueued behind copies, which keep the GPU busy for longer than Python needs.
    """
    spent: dict[str, list[float]] = {name: [] for name in (ADAMW, WHOLE, CUT)}
    for name in spent:
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(COPIES_AHEAD):
                steps[COPY]()
            begin.record()
            steps[name]()
            end.record()
            torch.cuda.synchronize()
            spent[name].append(begin.elapsed_time(end))
    return {name: median(times) for name, times in spent.items()}


def ratios(seconds: dict[str, list[float]], *, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """What is compared, by how much, and what was to be reached: medians of the ratios within a round.

    Args:
        sizes: bytes a parameter that a step moves.
    """

    def ratio(first: str, second: str, scale: float = 1.0) -> float:
        return scale * median(one / other for one, other in zip(seconds[first], seconds[second], strict=True))

    found: list[tuple[str, float, str, float]] = [(f"{WHOLE} / {ADAMW}", ratio(WHOLE, ADAMW), "<=", 1.0)]
    if CPU_ADAM in seconds:
        found.append((f"{WHOLE} / {CPU_ADAM}", ratio(WHOLE, CPU_ADAM), "<=", 1.5))
    found += [
        (f"{PLAIN} / {WHOLE}", ratio(PLAIN, WHOLE), ">=", 10.0),
        (f"{CUT} / {ADAMW}", ratio(CUT, ADAMW), "<=", 1.45),
    ]
    for name, size in sizes.items():
        found.append((f"{name}: bandwidth at {size} B / copy's", ratio(COPY, name, size / 8), ">=", 0.8))
    return [{"what": what, "is": value, "wanted": f"{sign} {bound}"} for what, value, sign, bound in found]


def python_overhead(device: torch.device, *, weights: int = 300, steps: int = 300) -> dict[str, float]:
    """Medians of a step of many tiny weights, and of its part outside the compiled function, in microseconds.

    The gradients stay where they are, as DeepSpeed's do; the learning rate changes with every step. Where the function
    only enqueues work for a GPU, nobody waits for it.
    """
    small = [Parameter(torch.randn(8, 8, device=device)) for _ in range(weights)]
    for weight in small:
        weight.grad = torch.randn_like(weight)
    optimizer = Merit(small, fused=True, **SETTINGS)
    optimizer.step()
    inside: list[float] = []
    ((_, stepper),) = next(iter(optimizer._works.values()))._steppers
    run = stepper._kernel.step
    compiled = run.args[0]

    def timed(batch: Any) -> Any:
        start = time.perf_counter()
        result = compiled(batch)
        inside.append(time.perf_counter() - start)
        return result

    stepper._kernel = replace(stepper._kernel, step=partial(run.func, timed, **run.keywords))
    whole = []
    for _ in range(steps):
        optimizer.param_groups[0]["lr"] *= 0.999
        start = time.perf_counter()
        optimizer.step()
        whole.append(time.perf_counter() - start)
    beyond = [step - kernel for step, kernel in zip(whole, inside, strict=True)]
    return {"weights": weights, "step": 1e6 * median(whole), "beyond_the_kernel": 1e6 * median(beyond)}


def memory_of_a_step() -> dict[str, float]:
    """This process's peak during a step above what weights, gradients and moments take, in MiB."""
    weights = gpt2_small(torch.device("cpu"))
    optimizer = Merit(weights, fused=True, **SETTINGS)
    for weight in weights:  # DeepSpeed and a resumed run have them before the first step
        optimizer._moments(weight)["exp_avg"].add_(0)
        optimizer._moments(weight)["exp_avg_sq"].add_(0)
    before = _status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # makes the peak begin now
    optimizer.step()
    parameters_mib = sum(weight.numel() for weight in weights) * 4 / 2**20
    return {"mib": _status_mib("VmHWM") - before, "wanted_at_most_mib": 0.01 * parameters_mib + 64}


def show(result: dict[str, Any]) -> None:
    """Print the numbers for people."""
    for name, spent in result["milliseconds"].items():
        print(f"{name:24}{spent:10.2f} ms")
    for name, read in result["gigabytes_read_per_second"].items():
        print(f"{name:24}{read:10.1f} GB/s read")
    for name, spent in result.get("milliseconds_without_the_host", {}).items():
        print(f"{name:24}{spent:10.2f} ms where the host is ahead")
    for line in result["ratios"]:
        print(f"{line['what']:60}{line['is']:8.2f}   (wanted {line['wanted']})")
    by_ranks = result["milliseconds_by_ranks"]
    print("one rank of N:", ", ".join(f"{ranks}: {spent:.2f} ms" for ranks, spent in by_ranks.items()))
    python = result["python_microseconds"]
    print(
        f"Python beyond the kernel, {python['weights']} weights: {python['beyond_the_kernel']:.0f} us (wanted <= 200)"
    )
    if "memory" in result:
        memory = result["memory"]
        print(f"memory of a step: {memory['mib']:.0f} MiB (wanted <= {memory['wanted_at_most_mib']:.0f})")


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar for each step, with the copy's speed as the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    spent = {name: time for name, time in result["milliseconds"].items() if name != COPY}
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    colours = ["tab:orange" if name.startswith("Merit") else "tab:grey" for name in spent]
    bars = axes.barh(list(spent), list(spent.values()), color=colours)
    digits = ["{:.0f}" if time >= 10 else "{:.1f}" if time >= 2 else "{:.2f}" for time in spent.values()]
    labels = [form.format(time) for form, time in zip(digits, spent.values(), strict=True)]
    axes.bar_label(bars, labels, padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    sizes = sorted(set(BYTES["cpu" if result["device"] == "cpu" else "cuda"].values()))
    for size, style in zip(sizes, (":", "--"), strict=False):
        limit = result["milliseconds"][COPY] * size / 8
        axes.axvline(
            limit, color="black", linestyle=style, linewidth=1, label=f"{size} bytes a parameter, at a copy's speed"
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"ms a step, {result['parameters'] / 1e6:.0f} M parameters (logarithmic)")
    where = f"{result['threads']} CPU threads" if result["device"] == "cpu" else result["device"]
    axes.set_title(f"Optimizer step on {where}")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    figure.legend(loc="outside lower center", ncols=len(sizes))
    figure.savefig(path, dpi=130)


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _median_seconds(step: Callable[[], Any], rounds: int, device: torch.device) -> float:
    step()  # touches the memory
    return median(_seconds(step, device) for _ in range(rounds))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_a_fresh_process() -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--memory-of-a-step"], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _status_mib(name: str) -> float:
    lines: Iterable[str] = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda where there is one)",
    )
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="of all steps (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="JSON",
        help="where the numbers go, and with .png the chart (default: benchmarks/results/optimizer_step_DEVICE.json)",
    )
    parser.add_argument("--memory-of-a-step", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: PyTorch sees no GPU here")
    if arguments.output is None:
        arguments.output = BENCHMARKS / "results" / f"optimizer_step_{torch.device(arguments.device).type}.json"
    if arguments.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return arguments


if __name__ == "__main__":
    main()
