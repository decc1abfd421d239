# SPDX-License-Identifier: Apache-2.0
"""A forecast for people: a page of text."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from merit_ds.plan.curve import Point
from merit_ds.plan.forecast import Estimate, Forecast, Stage
from merit_ds.plan.memory import Memory
from merit_ds.plan.timing import ring_bandwidth
from merit_ds.plan.wire import Transfer
from merit_ds.plan.words import in_bytes, in_gb, in_seconds, in_time, plural
from merit_ds.plan.wrapper import dtype_name, wrapper_of
from merit_ds.training.schedule import nearest_ranks

OPTIMIZER_SHARE = 0.05
"""Of the step's time, from which on the optimizer is not negligible."""
MAXIMA_SHARE = 0.01
"""Of the bytes that data-parallel ranks send, or of the step's time, from which on the maxima are not."""
LAUNCH_BOUND = 1e-3
"""Seconds of work of a layer in a micro-batch, below which launching its kernels may take longer."""
PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")
"""Of a GPU's memory."""
_WIDTH = {part: 1 + max(len(part), len("1234.56")) for part in PARTS}
_WHAT = {
    "gradients": "gradients",
    "weights": "updated weights",
    "maxima": "maxima of cut weights",
    "momentum": "momentum of cut weights",
    "norms": "gradient norm, overflow flag",
    "flags": "trainer's flags",
    "layers": "tensor-parallel layers",
}


def text(forecast: Forecast, *, gpu_name: str) -> str:
    """The whole page."""
    sections = [
        _launch(forecast, gpu_name),
        _memory(forecast),
        _traffic(forecast),
        _time(forecast),
        _assumptions(forecast),
        _warnings(forecast),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def values(forecast: Forecast, points: Sequence[Point], *, gpu_name: str) -> dict[str, Any]:
    """The whole forecast for machines: bytes, seconds, and shares between 0 and 1."""
    plan, paper = forecast.plan, forecast.paper
    return {
        "model": {"parameters": paper.parameters, "flops_per_sequence": paper.flops_per_sequence},
        "optimizer": paper.optimizer.name,
        "batch": asdict(plan.batch) | {"steps": plan.steps},
        "cluster": {"gpu_name": gpu_name, "gpus": forecast.cluster.gpus} | asdict(forecast.cluster),
        "assumed": asdict(forecast.assumed),
        "usable_memory": forecast.usable_memory,
        "fits": forecast.fits,
        "recipe": _estimate_values(forecast.recipe),
        "stages": [
            asdict(row) | {"estimate": None if row.estimate is None else _estimate_values(row.estimate)}
            for row in forecast.stages
        ],
        "curve": [{"gpus": point.gpus} | _estimate_values(point.estimate) for point in points],
        "warnings": warnings(forecast),
    }


def _estimate_values(estimate: Estimate) -> dict[str, Any]:
    return asdict(estimate) | {
        "memory": _memory_values(estimate.memory),
        "transfers": [asdict(one) | {"sent_bytes": one.sent_bytes} for one in estimate.transfers],
        "time": asdict(estimate.time) | {"total": estimate.time.total},
    }


def _memory_values(memory: Memory) -> dict[str, Any]:
    return asdict(memory) | {"total": memory.total}


def warnings(forecast: Forecast) -> list[str]:
    """What should be looked at before paying."""
    found = []
    recipe, total = forecast.recipe, forecast.recipe.time.total
    if not forecast.fits:
        fitting = [f"stage {row.stage} micro-batch {row.largest}" for row in forecast.stages if row.largest]
        advice = f"what fits: {', '.join(fitting)}" if fitting else f"nothing fits: {_how_to_fit(forecast)}"
        found.append(
            f"the recipe needs {in_gb(recipe.memory.total)} GB of {in_gb(forecast.usable_memory)} GB a GPU; {advice}"
        )
    share = recipe.time.optimizer / total
    if share > OPTIMIZER_SHARE:
        shared_out = recipe.stage == 0 and recipe.ranks > 1
        advice = (
            "ZeRO stage 1 or 2 would share it out among the ranks" if shared_out else "a larger batch would hide it"
        )
        found.append(f"the optimizer takes {share:.0%} of the step: {advice}")
    layer = recipe.time.compute / recipe.accumulation / forecast.paper.config.model.num_layers
    if layer < LAUNCH_BOUND:
        found.append(
            f"a layer has {1000 * layer:.2g} ms of work a micro-batch: launching kernels, which is not counted, will "
            "take much of the step"
        )
    data = [transfer for transfer in recipe.transfers if transfer.scope == "data"]
    maxima = sum(transfer.sent_bytes for transfer in data if transfer.what in ("maxima", "momentum"))
    everything = sum(transfer.sent_bytes for transfer in data)
    by_bytes, by_time = maxima / everything if everything else 0.0, recipe.time.maxima / total
    if max(by_bytes, by_time) > MAXIMA_SHARE:
        found.append(
            f"the optimizer exchanges {by_bytes:.1%} of the data-parallel bytes, in {by_time:.1%} of the step's time"
        )
    return found


def _how_to_fit(forecast: Forecast) -> str:
    split = "a larger model.tensor_parallel"
    if forecast.paper.config.model.activation_checkpointing:
        return f"try {split}"
    return f"try --set model.activation_checkpointing=true, then {split}"


def ranks_hint(forecast: Forecast) -> str:
    """One line: that the number of GPUs fits, and the nearest others that would."""
    batch, tensor = forecast.plan.batch, forecast.paper.config.model.tensor_parallel
    near = nearest_ranks(batch.global_batch, batch.micro_batch, ranks=forecast.recipe.ranks)
    others = " and ".join(str(count * tensor) for count in near)
    are = "others are" if len(near) > 1 else "other is"
    gpus = forecast.cluster.gpus
    return f"{plural(gpus, 'GPU')} {'is' if gpus == 1 else 'are'} valid" + (
        f"; the nearest {are} {others}" if others else ""
    )


def _launch(forecast: Forecast, gpu_name: str) -> list[str]:
    plan, paper, cluster, recipe = forecast.plan, forecast.paper, forecast.cluster, forecast.recipe
    model, batch = paper.config.model, plan.batch
    wrapper = wrapper_of(plan.ds_config)
    tensor = f" x {model.tensor_parallel} tensor-parallel" if model.tensor_parallel > 1 else ""
    nodes = f"{plural(cluster.nodes, 'node')} of {plural(cluster.gpus_per_node, 'GPU')}"
    ranks = f"{recipe.ranks:,} data-parallel{tensor} rank{'' if cluster.gpus == 1 else 's'}"
    tokens = batch.global_batch * model.seq_length
    return [
        f"{cluster.gpus} x {gpu_name}  {nodes}: {ranks_hint(forecast)}",
        f"model     {paper.parameters / 1e6:,.1f} M trained parameters, {paper.optimizer.name}, "
        f"{dtype_name(wrapper.dtype)}, ZeRO stage {wrapper.stage}, {_wrapper(wrapper.kind)}",
        f"batch     {batch.global_batch:,} sequences = micro-batch {batch.micro_batch} x {ranks} x accumulation "
        f"{batch.accumulation}",
        f"run       {tokens:,} tokens a step, {plural(plan.steps, 'step')}, {plan.steps * tokens / 1e9:,.2f} B tokens",
    ]


def _memory(forecast: Forecast) -> list[str]:
    lines = [
        f"Memory of the fullest GPU at its fullest moment, GB ({in_gb(forecast.usable_memory)} can be used); what a "
        "rank sends in a step, GB",
        f"  {'ZeRO':<5}" + "".join(f"{part:>{_WIDTH[part]}}" for part in PARTS) + f"{'total':>8}  {'fullest in':<10}"
        f"{'sent':>8}{'step':>9}  largest micro-batch",
    ]
    for row in forecast.stages:
        mark = "*" if row.stage == forecast.recipe.stage else " "
        lines.append(f"{mark} {row.stage:<5}" + _stage(row, forecast))
    return [
        *lines,
        "  * the recipe's, whose micro-batch all but the last column are for. Optimizer: float32 master weights and "
        "moments.",
    ]


def _stage(row: Stage, forecast: Forecast) -> str:
    if row.estimate is None:
        return f" refused: {row.refusal}"
    memory, ranks = row.estimate.memory, forecast.recipe.ranks
    parts = "".join(f"{in_gb(getattr(memory, part)):>{_WIDTH[part]}}" for part in PARTS)
    sent = sum(transfer.sent_bytes for transfer in row.estimate.transfers)
    accumulation = forecast.plan.batch.global_batch // (row.largest * ranks) if row.largest else 0
    largest = f"{row.largest} (accumulation {accumulation})" if row.largest else "none fits"
    seconds = in_seconds(row.estimate.time.total)
    return f"{parts}{in_gb(memory.total):>8}  {memory.moment:<10}{in_gb(sent):>8}{seconds:>9}  {largest}"


def _traffic(forecast: Forecast) -> list[str]:
    if not forecast.recipe.transfers:
        return ["Traffic: none, there is one rank"]
    lines = [
        "Traffic of one rank in a step; handed to collectives (exact), and sent by it on a ring",
        f"  {'':<30}{'collective':<16}{'ranks':>12}{'calls':>8}{'handed in':>14}{'sent':>12}",
    ]
    return lines + [_transfer(transfer) for transfer in forecast.recipe.transfers]


def _transfer(transfer: Transfer) -> str:
    ranks = f"{transfer.ranks} {transfer.scope}"
    return (
        f"  {_WHAT[transfer.what]:<30}{transfer.collective:<16}{ranks:>12}{transfer.calls:>8}"
        f"{in_bytes(transfer.handed_bytes):>14}{in_bytes(transfer.sent_bytes):>12}"
    )


def _time(forecast: Forecast) -> list[str]:
    recipe = forecast.recipe
    parts = {
        "forward and backward": recipe.time.compute,
        "tensor-parallel layers": recipe.time.layers,
        "gradients' reduction": recipe.time.gradients,
        "DeepSpeed's passes over gradients": recipe.time.passes,
        "optimizer": recipe.time.optimizer,
        "maxima or momentum of cut weights": recipe.time.maxima,
        "weights' all-gather": recipe.time.weights,
        "norms and flags": recipe.time.scalars,
    }
    total = recipe.time.total
    lines = ["Time of a step: an estimate, nothing overlapped"]
    lines += [
        f"  {name:<36}{1000 * seconds:>12,.2f} ms{seconds / total:>9.2%}" for name, seconds in parts.items() if seconds
    ]
    return [*lines, f"  {'step':<36}{1000 * total:>12,.2f} ms", _summary(recipe)]


def _summary(recipe: Estimate) -> str:
    return (
        f"  {recipe.tokens_per_second:,.0f} tokens/s, MFU {recipe.mfu:.1%}, {in_time(recipe.days)} for the run, "
        "without evaluation and checkpoints"
    )


def _assumptions(forecast: Forecast) -> list[str]:
    cluster, assumed, gpu = forecast.cluster, forecast.assumed, forecast.cluster.gpu
    wrapper = wrapper_of(forecast.plan.ds_config)
    tensor = forecast.paper.config.model.tensor_parallel
    ring = ring_bandwidth(cluster, "data", tensor_ranks=tensor)
    return [
        "Assumed",
        f"  data sheet: {gpu.rate(wrapper.dtype) / 1e12:,.0f} TFLOP/s in {dtype_name(wrapper.dtype)}, "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s of memory, NVLink {gpu.nvlink / 1e9:.0f} GB/s one way, network "
        f"{cluster.network / 1e9:.0f} GB/s a GPU",
        f"  reached of it: {assumed.compute:.0%} in forward and backward passes, {assumed.memory:.0%} of the memory's "
        f"bandwidth, {assumed.links:.0%} of the links'",
        f"  data-parallel rings at {ring * assumed.links / 1e9:,.0f} GB/s; a collective costs "
        f"{assumed.call_seconds * 1e6:.0f} us and {assumed.hop_seconds * 1e6:.0f} us for each doubling of its ranks",
        f"  {assumed.usable_memory:.0%} of the GPU's memory for tensors; activations as torch's own layers with flash "
        "attention keep them",
        *(["  not counted: the optimizer's own products of matrices"] if forecast.paper.optimizer.momentum else []),
    ]


def _warnings(forecast: Forecast) -> list[str]:
    return [f"warning: {line}" for line in warnings(forecast)]


def _wrapper(kind: str) -> str:
    return {"none": "no wrapper", "float32 copies": "float32 copies of the weights"}.get(kind, kind)
